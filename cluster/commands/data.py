"""Data sets in S3."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.shared import Report, err, out, progress_line, write_report

app = typer.Typer(help="Data sets in S3.", no_args_is_help=True)


@app.command("import")
def data_import(
    src: Annotated[str, typer.Argument(help="elpv, or a folder in a layout that is known.")],
    name: Annotated[str, typer.Option(help="Name of the data set in S3.")],
    shots: Annotated[
        int, typer.Option(min=0, help="Defects for training; the others are for the test.")
    ] = 10,
    seed: int = 0,
    camera: Annotated[str, typer.Option(help="The camera that took them, if one did.")] = "",
    report: Report = None,
) -> None:
    """Import a folder of images into S3 as Parquet, split for training, thresholds and test."""
    from infra.settings import load_settings
    from pipelines.datasets import import_dataset

    with progress_line("import") as progress:
        done = import_dataset(
            load_settings(), src, name, shots=shots, seed=seed, camera=camera, progress=progress
        )
    if done.licence:
        out.print(f"licence: {done.licence}", style="dim")
    for image in done.skipped:
        _left_out(image)
    for split, counts in done.counts.items():
        out.print(f"{split}: {counts['normal']} normal, {counts['anomaly']} anomalous")
    write_report(report, asdict(done))


@app.command("add")
def data_add(
    folder: Annotated[Path, typer.Argument(help="Folder of normal images.")],
    name: Annotated[str, typer.Option(help="Name of the data set in S3.")],
    camera: Annotated[str, typer.Option(help="The camera that took them.")] = "",
    vouched_by: Annotated[
        str,
        typer.Option(
            help="Who looked at them: learnt as false alarms are, whatever the sieve says.",
            metavar="PERSON",
        ),
    ] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also those in folders below it: normal, too.")
    ] = False,
) -> None:
    """Add new normal images to a data set, for the next refresh; exit code 1 where none is."""
    from cluster.camera import folder_frames
    from infra.settings import load_settings
    from pipelines.datasets import NewImage, put_incoming

    frames = folder_frames(folder, camera or "unnamed", recursive=recursive)
    images = (NewImage(f.image, camera=camera, source=f.source) for f in frames)
    done = put_incoming(load_settings(), name, images, vouched_by=vouched_by)
    for image in done.skipped:
        _left_out(image)
    out.print(f"{done.images} new normal images for {name}")
    if not done.images:
        raise typer.Exit(1)


def _left_out(image: dict[str, str]) -> None:
    # The reason too may name a file, and a file's name is no markup.
    err.print(f"left out: {image['source']}: {image['reason']}", style="yellow", markup=False)
