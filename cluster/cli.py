"""The `dpdl` command: what people type. Wiring only; each command calls one function.

Heavy packages (torch, ray) are imported inside the commands, so that `dpdl --help` is quick.
Exit code 0 only if the command did what it says; an expected failure is one line on stderr.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Open-set visual anomaly detection for live camera streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets in S3.", no_args_is_help=True)
models_app = typer.Typer(help="Model versions: list, show, promote, roll back.")
camera_app = typer.Typer(help="Cameras: list them, set a threshold.", no_args_is_help=True)
bench_app = typer.Typer(help="Speed, measured as ratios in one run.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models", no_args_is_help=True)
app.add_typer(camera_app, name="camera")
app.add_typer(bench_app, name="bench")

out, err = Console(), Console(stderr=True)
traceback_wanted = False

Report = Annotated[Path | None, typer.Option("--report", help="Write what happened as JSON here.")]
Model = Annotated[str, typer.Option("--model", help="Name of the model.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the recipe; may be repeated.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of expected failures.")] = False,
) -> None:
    global traceback_wanted
    traceback_wanted = debug


# -- everything on one machine ----------------------------------------------------------------


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
def status() -> None:
    """Show the services; exit code 1 unless all that should run answer."""
    from cluster import stack
    from infra.settings import load_settings

    settings = load_settings()
    found = stack.status(settings, out)
    if not all(one.healthy for one in found if not settings.is_external(one.name)):
        raise typer.Exit(1)


@app.command()
def config() -> None:
    """Print the effective settings, secrets hidden."""
    import yaml

    from infra.settings import load_settings

    print(yaml.safe_dump(load_settings().redacted(), sort_keys=False), end="")


# -- data, models -----------------------------------------------------------------------------


@data_app.command("import")
def data_import(
    src: Annotated[str, typer.Argument(help="elpv, or a folder in a layout that is known.")],
    name: Annotated[str, typer.Option(help="Name of the data set in S3.")],
    shots: Annotated[int, typer.Option(min=1, help="Defects for training.")] = 10,
    seed: int = 0,
    report: Report = None,
) -> None:
    """Import a folder of images into S3 as Parquet, split for training, thresholds and test."""
    from infra.settings import load_settings
    from pipelines.datasets import import_dataset

    with progress_line("import") as progress:
        done = import_dataset(load_settings(), src, name, shots=shots, seed=seed, progress=progress)
    if done.licence:
        out.print(f"licence: {done.licence}", style="dim")
    for image in done.skipped:
        err.print(f"left out: {escape(image['source'])}: {image['reason']}", style="yellow")
    for split, counts in done.counts.items():
        out.print(f"{split}: {counts['normal']} normal, {counts['anomaly']} anomalous")
    write_report(report, asdict(done))


@data_app.command("add")
def data_add(
    folder: Annotated[Path, typer.Argument(help="Folder of normal images.")],
    name: Annotated[str, typer.Option(help="Name of the data set in S3.")],
    camera: Annotated[str, typer.Option(help="The camera that took them.")] = "",
) -> None:
    """Add new normal images to a data set, for the next refresh."""
    from cluster.camera import folder_frames
    from infra.settings import load_settings
    from pipelines.datasets import NewImage, put_incoming

    frames = folder_frames(folder, camera or "unnamed")
    images = (NewImage(f.image, camera=camera, source=f.source) for f in frames)
    done = put_incoming(load_settings(), name, images)
    for image in done.skipped:
        err.print(f"left out: {escape(image['source'])}: {image['reason']}", style="yellow")
    out.print(f"{done.images} new normal images for {name}")


@app.command()
def train(
    dataset: Annotated[str, typer.Option(help="Name of an imported data set.")],
    model: Model = "default",
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    workers: Annotated[int | None, typer.Option(min=1, help="Training processes.")] = None,
    seed: int = 0,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Share of normal images that may alert.")
    ] = 0.01,
    sets: Sets = None,
    report: Report = None,
) -> None:
    """Train with Ray Train and register a version; the gate decides whether it becomes current."""
    from infra.settings import load_settings
    from pipelines.train import TrainOptions
    from pipelines.train import train as run

    chosen = TrainOptions(
        dataset=dataset,
        model_name=model,
        recipe=recipe,
        overrides=key_values(sets),
        workers=workers,
        seed=seed,
        false_alarm_rate=false_alarm_rate,
    )
    with progress_line("training") as progress:
        done = run(load_settings(), chosen, progress)
    out.print(f"{done.version} {done.decision}: {done.why}", markup=False)
    for note in done.notes:
        err.print(note, style="yellow", markup=False)
    write_report(report, asdict(done))


@app.command()
def refresh(
    model: Model = "default",
    every: Annotated[
        float | None, typer.Option(min=1, help="Look again every so many seconds until Ctrl-C.")
    ] = None,
    min_new: Annotated[int, typer.Option(min=1, help="Fewer new images than this wait.")] = 16,
    report: Report = None,
) -> None:
    """Renew the current version on the new normals in S3; the gate decides."""
    from infra.errors import DpdlError
    from infra.settings import load_settings
    from pipelines.refresh import RefreshOptions, RefreshReport, refresh_every, refresh_once

    settings, chosen = load_settings(), RefreshOptions(model_name=model, min_new=min_new)

    def show(done: RefreshReport | DpdlError) -> None:
        if isinstance(done, DpdlError):
            err.print(f"{done}: trying again", style="yellow", markup=False)
            return
        out.print(f"{done.decision} {done.to_version or ''}: {done.why}", markup=False)
        write_report(report, asdict(done))

    with progress_line("refresh") as progress:
        if every is None:
            show(refresh_once(settings, chosen, progress))
        else:
            refresh_every(settings, chosen, every, show, threading.Event(), progress)


@models_app.command("list")
def models_list(model: Model = "default") -> None:
    """Versions, newest first."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    table = Table(box=None, pad_edge=False)
    for column in ("", "version", "kind", "created", "parent", "gate", "AUROC"):
        table.add_column(column)
    for one in Registry(load_settings(), model).list():
        table.add_row(
            "*" if one.current else "",
            one.version,
            one.kind,
            one.created_at,
            one.parent or "",
            one.decision,
            "" if one.auroc is None else f"{one.auroc:.3f}",
        )
    out.print(table)


@models_app.command("show")
def models_show(
    version: Annotated[str | None, typer.Argument(help="Default: the current one.")] = None,
    model: Model = "default",
) -> None:
    """All that is known of a version, as JSON; its files are verified."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    print(json.dumps(Registry(load_settings(), model).show(version), indent=2, sort_keys=True))


@models_app.command("promote")
def models_promote(
    version: str,
    why: Annotated[str, typer.Option(help="Kept with the pointer.")] = "promoted by hand",
    model: Model = "default",
) -> None:
    """Make a version current, whatever the gate said; it is verified first."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    pointer = Registry(load_settings(), model).promote(version, why)
    out.print(f"current: {pointer.version}")


@models_app.command("rollback")
def models_rollback(
    why: Annotated[str, typer.Option(help="Kept with the pointer.")] = "rolled back by hand",
    model: Model = "default",
) -> None:
    """Go back to the version before the current one."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    pointer = Registry(load_settings(), model).rollback(why)
    out.print(f"current: {pointer.version}")


# -- the stream -------------------------------------------------------------------------------


@app.command()
def serve(model: Model = "default") -> None:
    """Deploy the stream application (consumer, scorer, console) and keep it until Ctrl-C."""
    import ray

    from infra.settings import load_settings
    from serving import app as stream_app

    try:
        deployed = stream_app.deploy(load_settings(), model_name=model, say=out.print)
        out.print(f"{deployed.version} scores; alerts at {deployed.url}   (Ctrl-C ends)")
        threading.Event().wait()
    finally:
        if ray.is_initialized():
            stream_app.shutdown()
            ray.shutdown()


@app.command()
def stream(
    src: Annotated[Path, typer.Argument(help="Folder of images.", exists=True, file_okay=False)],
    camera: Annotated[str, typer.Option(help="Camera id.")],
    fps: Annotated[float, typer.Option(min=0.01, help="Frames per second.")] = 5.0,
) -> None:
    """Send the images of a folder as a camera's frames."""
    from cluster.camera import SentFrame, folder_frames
    from cluster.camera import stream as send
    from infra.kafka_client import ensure_topics
    from infra.settings import load_settings

    settings = load_settings()
    ensure_topics(settings)
    sent: list[SentFrame] = []
    try:
        send(
            settings,
            folder_frames(src, camera),
            frames_per_second=fps,
            stop=threading.Event(),
            on_sent=sent.append,
        )
    finally:
        out.print(f"{len(sent)} frames sent as {camera}", markup=False)


@app.command()
def alerts(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    count: Annotated[int, typer.Option(min=1, max=500, help="How many of the past.")] = 20,
) -> None:
    """Print alerts, oldest first, one JSON object a line."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    store = ResultStore(load_settings())
    shown = store.latest_alerts(count)[::-1]
    last = shown[-1].id if shown else "0"
    while True:
        for stored in shown:
            print(json.dumps({"id": stored.id, **asdict(stored.result)}), flush=True)
            last = stored.id
        if not follow:
            return
        shown = store.alerts(last, block_s=3.0)


@camera_app.command("list")
def camera_list() -> None:
    """Cameras, the latest seen first."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    table = Table(box=None, pad_edge=False)
    for column in ("camera", "frames", "alerts", "last score", "threshold", "set by"):
        table.add_column(column, justify="left" if column in ("camera", "set by") else "right")
    for one in ResultStore(load_settings()).cameras():
        override = one.override
        used = override.threshold if override else one.threshold_used
        table.add_row(
            escape(one.camera),
            str(one.frames),
            str(one.alerts),
            "" if one.last_score is None else f"{one.last_score:.3f}",
            "" if used is None else f"{used:.3f}",
            escape(override.by) if override else "",
        )
    out.print(table)


@camera_app.command("set")
def camera_set(
    camera: str,
    threshold: Annotated[
        float | None, typer.Option(help="Alert above this score; leave out to clear.")
    ] = None,
    by: Annotated[str, typer.Option(envvar="USER", help="Who sets it.")] = "unknown",
) -> None:
    """Set a camera's own threshold, in place of the model's; without --threshold, clear it."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    ResultStore(load_settings()).set_threshold(camera, threshold, by=by)
    shown = "the model's" if threshold is None else f"{threshold:g}"
    out.print(f"{camera}: threshold {shown}", markup=False)


# -- research ---------------------------------------------------------------------------------


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(help="elpv, or a folder in a layout that is known.")],
    protocol: Annotated[str, typer.Option(help="general or hard.")] = "general",
    shots: Annotated[int, typer.Option(min=0, help="Anomalies seen in training, M.")] = 10,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2,3,4",
    method: Annotated[
        str, typer.Option(help="dpdl, mahalanobis, mahalanobis-all, knn, tails, devnet or dra.")
    ] = "dpdl",
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    sets: Sets = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    report: Report = None,
) -> None:
    """Train and test by the paper's protocol, seed by seed; with --report it resumes."""
    from pipelines.evaluate import EvaluateOptions
    from pipelines.evaluate import evaluate as run

    chosen = EvaluateOptions(
        data=data,
        protocol=cast("Any", protocol),  # checked there
        shots=shots,
        seeds=tuple(numbers(seeds)),
        method=method,
        recipe=recipe,
        overrides=key_values(sets),
        report=report,
        device=device,
    )
    with progress_line("evaluate") as progress:
        done = run(chosen, progress)
    for name in ("auroc", "ap"):
        out.print(f"{name}  {done[name]['mean']:.4f} +- {done[name]['sd']:.4f}")


@bench_app.command("score")
def bench_score(
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    repetitions: Annotated[int, typer.Option(min=1)] = 20,
    sets: Sets = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    report: Report = None,
) -> None:
    """Scoring against the bare trunk, in turns, at the same batch size."""
    from pipelines.bench_score import BenchScoreOptions
    from pipelines.bench_score import bench_score as run

    chosen = BenchScoreOptions(
        recipe=recipe,
        overrides=key_values(sets),
        batch_size=batch_size,
        repetitions=repetitions,
        device=device,
        report=report,
    )
    with progress_line("bench") as progress:
        done = run(chosen, progress)
    for name in ("trunk_images_per_second", "score_images_per_second", "ratio"):
        out.print(f"{name.replace('_', ' ')}  {done[name]:.3g}")


# -- helpers ----------------------------------------------------------------------------------


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write `report` as JSON, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=2, sort_keys=True, default=str) + "\n")
    partial.replace(path)
    err.print(f"report: {path}", style="dim", markup=False)


def key_values(pairs: list[str] | None) -> dict[str, str]:
    """`--set key=value` as a dictionary. Raises ValueError for one without "="."""
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: wanted key=value")
        found[key.strip()] = value.strip()
    return found


def numbers(text: str) -> list[int]:
    """ "0,1,2" as integers. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text}: wanted whole numbers with commas between") from None


@contextmanager
def progress_line(title: str) -> Iterator[Callable[[str, float, dict[str, Any]], None]]:
    """One line that says how far a long job is; stages go by as plain lines where no one looks."""
    if err.is_terminal:
        with err.status(title) as live:

            def show(stage: str, fraction: float, figures: dict[str, Any]) -> None:
                live.update(f"{title}: {stage} {fraction:.0%}  {_figures(figures)}")

            yield show
        return
    seen: list[str] = []

    def say(stage: str, fraction: float, figures: dict[str, Any]) -> None:
        if seen[-1:] != [stage]:
            seen.append(stage)
            err.print(f"{title}: {stage}", markup=False)

    yield say


def _figures(figures: dict[str, Any]) -> str:
    parts = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    return escape(", ".join(parts))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # SIGTERM takes the same way out as Ctrl-C, so that context managers end what they started.
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: run a command, turn expected failures into one line and exit code 1."""
    signal.signal(signal.SIGTERM, _interrupt)
    from infra.errors import DpdlError

    try:
        app()
    except (DpdlError, ValueError, OSError) as error:
        if traceback_wanted:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        err.print(f"dpdl: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
