"""The paper's protocols."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from cluster.commands.shared import (
    Report,
    Sets,
    check_device,
    err,
    key_values,
    numbers,
    out,
    progress_line,
)

app = typer.Typer()


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
    check_device(device)
    from dpdl_core import config
    from dpdl_core.protocol import Rejected
    from pipelines.evaluate import EvaluateOptions, left_out
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
    if shots == 0 and method == "dpdl" and config.recipe(recipe).tuned_stages:
        _warn(f"shots=0: without anomalies nothing is tuned, the trunk of {recipe} neither")
    if done["rejected"]:
        _warn(left_out([Rejected(**each) for each in done["rejected"]]))
    for name, count in done["classes_not_seen"].items():
        _warn(f"{name}: {count} images, too few to see {shots} of; tested only")
    for name in ("auroc", "ap"):
        out.print(f"{name}  {done[name]['mean']:.4f} +- {done[name]['sd']:.4f}")


def _warn(line: str) -> None:
    err.print(line, style="yellow", markup=False, soft_wrap=True)
