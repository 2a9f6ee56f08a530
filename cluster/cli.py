"""The `dpdl` command: what people type. Wiring only; each command calls one function.

Heavy packages (torch, ray) are imported inside the commands, so that `dpdl --help` is quick.
Exit code 0 only if the command did what it says; an expected failure is one line on stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Open-set visual anomaly detection for live camera streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets in S3.", no_args_is_help=True)
models_app = typer.Typer(
    help="Model versions: list, show, promote, roll back.", no_args_is_help=True
)
bench_app = typer.Typer(help="Speed, measured as ratios in one run.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

Report = Annotated[Path | None, typer.Option("--report", help="Write what happened as JSON here.")]
console = Console(stderr=True)


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write `report` as JSON, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
    console.print(f"report: {path}")


@app.command()
def demo(
    frames: Annotated[
        int | None, typer.Option(min=8, help="Frames to stream; default: all held-out images.")
    ] = None,
    cameras: Annotated[int, typer.Option(min=1, max=64, help="Cameras to stream as.")] = 4,
    data: Annotated[
        str, typer.Option(help="elpv, or a folder: normal/ + anomaly/<class>/, or MVTec AD.")
    ] = "elpv",
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of each camera.")] = 5.0,
    shots: Annotated[int, typer.Option(min=1, help="Defects known in training.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of split, training and order of frames.")] = 0,
    exit_: Annotated[
        bool, typer.Option("--exit", help="End after the report; do not stay up.")
    ] = False,
    report: Report = None,
) -> None:
    """Run the main job on this machine: services, data, training, stream, renewal, report."""
    from cluster.demo import DemoOptions, run_demo

    options = DemoOptions(
        frames=frames, cameras=cameras, data=data, fps=fps, shots=shots, seed=seed, stay=not exit_
    )
    run_demo(options, write=lambda result: write_report(report, result))


@app.command()
def up() -> None:
    """Start Kafka, S3 and Redis on this machine; they stay until `dpdl down`."""
    from cluster import stack

    stack.up(_state_dir())


@app.command()
def down() -> None:
    """End the services that `dpdl up` started."""
    from cluster import stack

    stack.down(_state_dir())


@app.command()
def status() -> None:
    """Show the services: state, process, endpoint, memory."""
    from cluster import stack

    stack.status(_state_dir())


@app.command()
def config() -> None:
    """Print the effective settings, secrets hidden."""
    import yaml

    from infra.settings import load_settings

    print(yaml.safe_dump(load_settings().redacted(), sort_keys=False), end="")


def _state_dir() -> Path:
    from infra.settings import state_dir

    return state_dir()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # SIGTERM takes the same way out as Ctrl-C, so that context managers end what they started.
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: run a command, turn expected failures into one line and exit code 1."""
    signal.signal(signal.SIGTERM, _interrupt)
    from infra.errors import DpdlError

    try:
        app()
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    except (DpdlError, ValueError, OSError) as error:
        if os.environ.get("DPDL_DEBUG"):
            raise
        console.print(
            f"[red]dpdl:[/red] {' '.join(str(error).split())}", soft_wrap=True, highlight=False
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
