"""Everything on one machine: demo, up, down, status, config."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.shared import Model, Report, out, write_report

app = typer.Typer()


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
    seed: Annotated[int, typer.Option(help="Of the split, training and order of frames.")] = 0,
    exit_: Annotated[
        bool, typer.Option("--exit", help="End after the report; do not stay up.")
    ] = False,
    report: Report = None,
) -> None:
    """Run the main job on this machine: services, data, training, stream, renewal, report."""
    from cluster.demo import DemoOptions, run_demo

    chosen = DemoOptions(
        frames=frames, cameras=cameras, data=data, fps=fps, shots=shots, seed=seed, stay=not exit_
    )
    run_demo(chosen, write=lambda result: write_report(report, result))


@app.command()
def up() -> None:
    """Start Kafka, S3 and Redis on this machine; they stay until `dpdl down`."""
    from cluster import stack
    from infra.settings import load_settings

    stack.up(load_settings(), out)


@app.command()
def down() -> None:
    """Stop the services that `dpdl up` started; their data stays."""
    from cluster import stack
    from infra.settings import load_settings

    stack.down(load_settings(), out)


@app.command()
def status(model: Model = "default", report: Report = None) -> None:
    """Show services, lag, versions and cameras; exit code 1 unless all services answer."""
    from cluster.status import show_status
    from infra.settings import load_settings

    found = show_status(load_settings(), model, out)
    write_report(report, found)
    if not found["healthy"]:
        raise typer.Exit(1)


@app.command()
def config() -> None:
    """Print the effective settings, secrets hidden."""
    import yaml

    from infra.settings import load_settings

    print(yaml.safe_dump(load_settings().redacted(), sort_keys=False), end="")
