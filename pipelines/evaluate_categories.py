"""A folder of several MVTec AD categories: each is evaluated by itself, and their mean is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpdl_core.protocol import Categories, load_dataset
from pipelines.evaluate import EvaluateOptions, Progress, evaluate, plan, spread
from pipelines.evaluate_methods import forget_images
from pipelines.evaluate_run import write


def evaluate_each(options: EvaluateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """evaluate() for one data set. For a folder of categories the figures are means over them, with
    each one's report under "categories", and beside options.report as NAME-<category>.json. In the
    hard setting those of a single class of defects, of which none would be unseen, are left out
    and listed, as long as there are others.

    Raises as evaluate() does: for what a category's folder cannot give, before any is trained on.
    """
    try:
        return evaluate(options, progress)
    except Categories as several:
        names = several.names
    each = {name: _of_category(options, name) for name in names}
    found = {name: load_dataset(one.data) for name, one in each.items()}
    single = [name for name in names if len(found[name].defects) < 2]
    if options.protocol != "hard" or len(single) == len(names):
        single = []
    for name in single:
        del each[name]
    for name, one in each.items():
        plan(found[name], one)
    reports: dict[str, dict[str, Any]] = {}
    for place, (name, one) in enumerate(each.items()):

        def tell(
            stage: str, share: float, figures: dict[str, Any], name: str = name, place: int = place
        ) -> None:
            if progress is not None:
                progress(f"{name}: {stage}", (place + share) / len(each), figures)

        reports[name] = evaluate(one, tell)
        forget_images()
    shared = ("protocol", "shots", "seeds", "method", "recipe", "settings", "date")
    first = next(iter(reports.values()))
    done = {
        "data": Path(options.data).resolve().name,
        **{key: first[key] for key in shared},
        **{key: _mean(reports, key) for key in ("auroc", "ap")},
        "categories": reports,
        "categories_left_out": single,
    }
    if options.report is not None:
        write(options.report, json.dumps(done, indent=1) + "\n")
    return done


def _of_category(options: EvaluateOptions, name: str) -> EvaluateOptions:
    report = options.report
    if report is not None:
        report = report.with_name(f"{report.stem}-{name}{report.suffix}")
    return replace(options, data=str(Path(options.data) / name), report=report)


def _mean(reports: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """Over the categories, seed by seed."""
    by_seed = np.mean([report[key]["per_seed"] for report in reports.values()], axis=0)
    return spread(by_seed.tolist())
