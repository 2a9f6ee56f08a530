"""Training and renewal."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Annotated

import typer

from cluster.commands.shared import (
    Model,
    Report,
    Sets,
    err,
    key_values,
    out,
    progress_line,
    write_report,
)

app = typer.Typer()


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
