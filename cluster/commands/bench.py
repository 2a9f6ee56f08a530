"""Speed, measured as ratios in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.shared import (
    Device,
    Report,
    Sets,
    device_here,
    err,
    key_values,
    out,
    progress_line,
    write_report,
)

app = typer.Typer(help="Speed, measured as ratios in one run.", no_args_is_help=True)


@app.command("score")
def bench_score(
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    repetitions: Annotated[int, typer.Option(min=1)] = 20,
    sets: Sets = None,
    device: Device = "",
    report: Report = None,
) -> None:
    """Scoring against the bare trunk, in turns, at the same batch size."""
    device = device_here(device)
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
    rates = [f"{name}_images_per_second" for name in ("timm", "trunk", "score")]
    for name in (*rates, "ratio", "timm_ratio"):
        out.print(f"{name.replace('_', ' ')}  {done[name]:.3g}")


@app.command("stream")
def bench_stream(
    frames: Annotated[int, typer.Option(min=64)] = 1000,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images; default: made-up JPEGs.", exists=True, file_okay=False
        ),
    ] = None,
    report: Report = None,
) -> None:
    """The whole stream against decode alone and scoring alone, on the same images, in one run."""
    from cluster.bench_stream import BenchStreamOptions
    from cluster.bench_stream import bench_stream as run

    done = run(BenchStreamOptions(frames=frames, data=data), err)
    for name in ("decode_fps", "score_fps", "stream_fps", "ratio"):
        out.print(f"{name.replace('_', ' ')}  {done[name]:.3g}")
    write_report(report, done)
