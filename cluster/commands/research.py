"""The paper's protocols."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from cluster.commands.shared import (
    Device,
    Report,
    Sets,
    device_here,
    err,
    key_values,
    numbers,
    out,
    progress_line,
)

app = typer.Typer()


@app.command()
def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="elpv, or a folder as in docs/layouts.md; of MVTec AD one category, or all."
        ),
    ],
    protocol: Annotated[str, typer.Option(help="general or hard.")] = "general",
    shots: Annotated[int, typer.Option(min=0, help="Anomalies seen in training, M.")] = 10,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2,3,4",
    method: Annotated[
        str, typer.Option(help="dpdl, mahalanobis, mahalanobis-all, knn, tails, devnet or dra.")
    ] = "dpdl",
    recipe: Annotated[str, typer.Option(help="edge or paper.")] = "edge",
    sets: Sets = None,
    without: Annotated[
        str,
        typer.Option(
            help="Parts of dpdl left out of the score: prototypes, directions, heads, "
            "or single ones, comma-separated."
        ),
    ] = "",
    device: Device = "",
    report: Report = None,
) -> None:
    """Train and test by the paper's protocol, seed by seed; with --report it resumes."""
    device = device_here(device)
    from dpdl_core import config
    from dpdl_core.protocol import Rejected
    from pipelines.evaluate import EvaluateOptions, left_out
    from pipelines.evaluate_categories import evaluate_each

    chosen = EvaluateOptions(
        data=data,
        protocol=cast("Any", protocol),  # checked there
        shots=shots,
        seeds=tuple(numbers(seeds)),
        method=method,
        recipe=recipe,
        overrides=key_values(sets),
        without=tuple(name.strip() for name in without.split(",")) if without else (),
        report=report,
        device=device,
    )
    with progress_line("evaluate") as progress:
        done = evaluate_each(chosen, progress)
    if shots == 0 and method == "dpdl" and config.recipe(recipe).tuned_stages:
        _warn(f"shots=0: without anomalies nothing is tuned, the trunk of {recipe} neither")
    for category in done.get("categories_left_out", []):
        _warn(f"{category}: one class of defects, none would be unseen; left out")
    for category, one in done.get("categories", {"": done}).items():
        where = f"{category}: " if category else ""
        if one["rejected"]:
            _warn(where + left_out([Rejected(**each) for each in one["rejected"]]))
        for name, count in one["classes_not_seen"].items():
            _warn(f"{where}{name}: {count} images, too few to see {shots} of; tested only")
        if one["auroc_without_copies"]:
            _warn(
                f"{where}up to {max(one['copies_in_test'])} test images are copies of training "
                f"ones; without them auroc {_figure(one['auroc_without_copies'])}"
            )
        if category:
            line = f"{where}auroc {_figure(one['auroc'])}, ap {_figure(one['ap'])}"
            out.print(line, markup=False, soft_wrap=True)
    for name in ("auroc", "ap"):
        out.print(f"{name}  {_figure(done[name])}")


def _figure(spread: dict[str, Any]) -> str:
    if spread["mean"] is None:
        return "unknown"
    if spread["sd"] is None:  # of one seed
        return f"{spread['mean']:.4f}"
    return f"{spread['mean']:.4f} +- {spread['sd']:.4f}"


def _warn(line: str) -> None:
    err.print(line, style="yellow", markup=False, soft_wrap=True)
