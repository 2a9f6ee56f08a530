"""Training and renewal."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cluster.commands.shared import (
    Model,
    Report,
    Sets,
    check_device,
    duration,
    err,
    key_values,
    out,
    progress_line,
    write_report,
)

app = typer.Typer()


def _given(context: Any) -> set[str]:
    """Names of the options that somebody wrote. Typer's contexts share no public type."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _check_train(context: Any) -> None:
    given = _given(context)
    if ("dataset" in given) == ("resume" in given):
        raise ValueError("wanted either --dataset NAME, or --resume RUN of a run that was cut off")
    idle = given - {"resume", "model", "report"}
    if "resume" in given and idle:
        names = sorted(each.opts[0] for each in context.command.params if each.name in idle)
        raise ValueError(
            f"--resume goes on with the run's own options: leave out {', '.join(names)}"
        )


def _check_refresh(context: Any) -> None:
    if len(_given(context) & {"once", "every", "watch"}) > 1:
        raise ValueError("--once, --every and --watch: choose one")


CHECKS = {"train": _check_train, "refresh": _check_refresh}
"""Raise ValueError for options that do not go together."""


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[
        str | None, typer.Option(help="Name of an imported data set; elpv is imported if need be.")
    ] = None,
    model: Model = "default",
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    workers: Annotated[
        str | None, typer.Option(help="Training processes: a number, or LEAST:MOST as in 1:4.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="cpu, or cuda: wait for GPUs. Default: GPUs where there are enough."),
    ] = "",
    seed: int = 0,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Share of normal images that may alert.")
    ] = 0.01,
    sets: Sets = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run, by its own options.", metavar="RUN")
    ] = None,
    report: Report = None,
) -> None:
    """Train with Ray Train and register a version; the gate decides whether it becomes current."""
    _check_train(context)
    from infra.settings import load_settings
    from pipelines import train as training

    settings = load_settings()
    with progress_line("training") as progress:
        if resume is not None:
            done = training.resume(settings, model, resume, progress)
        else:
            chosen = training.TrainOptions(
                dataset=str(dataset),
                model_name=model,
                recipe=recipe,
                overrides=key_values(sets),
                workers=training.parse_workers(workers) if workers else None,
                device=device,
                seed=seed,
                false_alarm_rate=false_alarm_rate,
            )
            done = training.train(settings, chosen, progress)
    out.print(f"{done.version} {done.decision}: {done.why}", markup=False)
    for note in done.notes:
        err.print(note, style="yellow", markup=False)
    write_report(report, asdict(done))


@app.command()
def refresh(
    context: typer.Context,
    model: Model = "default",
    once: Annotated[bool, typer.Option("--once", help="Look once: the default.")] = False,
    every: Annotated[
        float | None,
        typer.Option(parser=duration, metavar="TIME", help="Look again every 30s, 15m, 6h, ..."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh as soon as new normals are in S3.")
    ] = False,
    min_new: Annotated[int, typer.Option(min=1, help="Fewer new images than this wait.")] = 16,
    device: Annotated[
        str, typer.Option(help="cpu or cuda. Default: a GPU where there is one.")
    ] = "",
    report: Report = None,
) -> None:
    """Renew the current version on the new normals in S3; the gate decides.

    With --every and --watch it goes on until Ctrl-C or SIGTERM, and --report holds the last
    refresh that came to a decision. Killed at any moment, the next run takes up what was left.
    """
    _check_refresh(context)
    check_device(device)
    from infra.errors import DpdlError
    from infra.settings import load_settings
    from pipelines.refresh import RefreshOptions, RefreshReport, refresh_once
    from pipelines.refresh_loop import refresh_every, refresh_on_arrival

    settings = load_settings()
    chosen = RefreshOptions(model_name=model, min_new=min_new, device=device)
    said: list[str] = []

    def say(line: str) -> None:
        if said[-1:] != [line]:
            said[:] = [line]
            err.print(line, style="dim", markup=False)

    told: set[str] = set()

    def show(done: RefreshReport | DpdlError) -> None:
        if isinstance(done, DpdlError):
            err.print(f"{done}: trying again", style="yellow", markup=False)
            return
        for note in done.notes:
            if note not in told:
                err.print(note, style="yellow", markup=False)
        told.clear()
        told.update(done.notes)
        if done.decision == "none" and (every is not None or watch):
            say(f"nothing to do: {done.why}")
            return
        out.print(f"{done.decision} {done.to_version or ''}: {done.why}", markup=False)
        if done.set_aside:
            bucket, where = settings.s3.models_bucket, f"{model}/versions/{done.to_version}"
            out.print(
                f"{done.set_aside} new images look like defects and were set aside: "
                f"s3://{bucket}/{where}/set_aside.json lists them",
                markup=False,
                highlight=False,
            )
        write_report(report, asdict(done))

    with progress_line("refresh") as progress:
        if every is None and not watch:
            show(refresh_once(settings, chosen, progress))
            return
        stop = threading.Event()
        try:
            if every is not None:
                refresh_every(settings, chosen, every, show, stop, progress)
            else:
                refresh_on_arrival(settings, chosen, show, stop, progress, say=say)
        except KeyboardInterrupt:  # the way to end it; nothing is half done
            err.print("stopped", style="dim")
