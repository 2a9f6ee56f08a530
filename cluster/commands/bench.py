"""Speed, measured as ratios in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.shared import Report, Sets, key_values, out, progress_line

app = typer.Typer(help="Speed, measured as ratios in one run.", no_args_is_help=True)


@app.command("score")
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
