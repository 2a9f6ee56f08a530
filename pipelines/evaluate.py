"""Train and test a method on a data set, seed by seed, and say how well it did.

One run is one seed (and, in the hard setting, one seen class). Each run's scores are written
beside the report as soon as they are there, under a hash of all that they depend on: the split,
the pixels, the method's settings, its weights, the device, the seed, the source of the method and
the versions of the packages that it computes with (evaluate_run.py). A second call with the same
options goes on where the first was stopped, and a changed option starts anew.
Letters: N images of the data set, S side in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpdl_core import protocol
from dpdl_core.baselines import check_shots
from dpdl_core.fit import MIN_NORMALS
from dpdl_core.images import Pixels
from dpdl_core.metrics import auroc
from dpdl_core.protocol import Dataset, DatasetError, Rejected, Sample, Setting, Split
from pipelines.evaluate_methods import Method, make_method
from pipelines.evaluate_report import RunPictures, draw_report
from pipelines.evaluate_run import Run, code_sha256, keep, key, machine_of, resume, write

Progress = Callable[[str, float, dict[str, Any]], None]
"""progress(what is done now, share of the whole 0..1, figures)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `dpdl evaluate` was asked."""

    data: str
    """"elpv" or a folder in a layout that protocol.load_dataset reads."""
    protocol: Setting = "general"
    shots: int = 10
    """Anomalies that a method may see, M."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    method: str = "dpdl"
    """dpdl or one of dpdl_core.baselines.BASELINES."""
    recipe: str = "edge"
    """Also gives a baseline its trunk, weights and resolution."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Fields of DpdlConfig, or of BaselineConfig for a baseline, as text."""
    without: tuple[str, ...] = ()
    """Parts of DPDL, or groups of them, that count for nothing in the score."""
    report: Path | None = None
    """JSON file; a picture and the runs are put beside it. None: nothing is written or resumed."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: need one or more, each once")
        if not all(0 <= seed < 2**31 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds}: need whole numbers from 0 to {2**31 - 1}")
        if self.protocol not in ("general", "hard"):
            raise ValueError(f"protocol={self.protocol!r}: general or hard")
        check_shots(self.method, self.shots)
        if self.report is not None:
            _check_report(self.report)


def _check_report(path: Path) -> None:
    """Raises ValueError where the report could not be written, hours before it is."""
    if path.is_dir():
        raise ValueError(f"report={path} is a folder: name a file in it, {path / 'report.json'}")
    if path.suffix.lower() in (".png", ".runs"):
        raise ValueError(
            f"report={path}: that is where its picture or its runs are put; "
            f"name it {path.with_suffix('.json')}"
        )
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"report={path}: nothing can be written in {there}; name another place")


def evaluate(options: EvaluateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Run every seed that has no result yet; returns the report, and writes it if asked to.

    Raises ValueError (DatasetError and others are such) in one line for what cannot be done.
    """
    tell: Progress = progress or (lambda stage, share, figures: None)
    method = make_method(
        options.method,
        options.recipe,
        options.overrides,
        options.device,
        options.shots,
        options.without,
    )
    dataset = protocol.load_dataset(options.data)
    splits, not_seen = plan(dataset, options)  # what cannot be is said before anything slow
    with tempfile.TemporaryFile() as file:
        images, dataset, rejected = _decode(dataset, method.image_size, file, tell)
        rejected = [*dataset.left_out, *rejected]
        if rejected:
            try:
                splits, not_seen = plan(dataset, options)
            except DatasetError as error:
                raise DatasetError(f"{error}; {left_out(rejected)}") from None
        runs = _run_all(options, splits, images, dataset, method, tell)
        copies = _copies(splits, images, _rows(dataset))
    report = _summary(options, dataset, rejected, method, [run for run, _ in runs], copies)
    report["classes_not_seen"] = not_seen
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        picture = options.report.with_suffix(".png")
        curves = [(run.labels, run.scores) for run, _ in runs]
        draw_report(picture, title=_title(options, report), curves=curves, shown=runs[0][1])
        report["picture"] = picture.name
        write(options.report, json.dumps(report, indent=1) + "\n")
    return report


def left_out(rejected: Sequence[Rejected]) -> str:
    """What is said of one or more images that do not decode."""
    first = rejected[0]
    return f"{len(rejected)} images left out, the first: {first.source}: {first.reason}"


def plan(dataset: Dataset, options: EvaluateOptions) -> tuple[list[Split], dict[str, int]]:
    """Every run's split, and the classes that are too small to be seen, with their images.

    In the hard setting each class of at least M images is seen once; the others are in the test
    of every run. Raises DatasetError where there are too few images.
    """
    sizes = Counter(sample.defect for sample in dataset.anomalies)
    too_few: dict[str, int] = {}
    classes: list[str | None] = [None]
    if options.protocol == "hard" and len(sizes) > 1:
        too_few = {c: n for c, n in sorted(sizes.items()) if n < options.shots}
        classes = [c for c in dataset.defects if c not in too_few]
        if not classes:
            name, most = max(sizes.items(), key=lambda item: item[1])
            raise DatasetError(
                f"{dataset.name}: no class has the {options.shots} anomalies that shots="
                f"{options.shots} asks for; the largest, {name}, has {most} anomalies: lower it"
            )
    splits = [
        protocol.split(
            dataset, setting=options.protocol, shots=options.shots, seed=seed, seen_class=seen
        )
        for seed in options.seeds
        for seen in classes
    ]
    normals = len(splits[0].train_normals)  # the same in all
    least = MIN_NORMALS if options.method == "dpdl" else 2
    if normals < least:
        share = "" if dataset.test_normals else f", three in four of its {len(dataset.normals)}"
        other = ", or take a method that does with fewer, such as knn" if normals >= 2 else ""
        raise DatasetError(
            f"{dataset.name}: {normals} normals to train on{share}, and {options.method} needs "
            f"{least}: add normal images{other}"
        )
    return splits, too_few


def _decode(
    dataset: Dataset, size: int, file: Any, tell: Progress
) -> tuple[Pixels, Dataset, list[Rejected]]:
    """All images once, in a memory map: five seeds share them, and no set outgrows memory."""
    samples = [*dataset.normals, *(dataset.test_normals or []), *dataset.anomalies]
    num_bytes = len(samples) * size * size * 3
    try:
        # A full disk is an error here; behind the map it would be a signal that ends the process.
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise ValueError(
            f"{len(samples)} images of {size} px take {num_bytes / 1e9:.3g} GB in "
            f"{tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder with room"
        ) from error
    out = np.memmap(file, np.uint8, "w+", shape=(len(samples), size, size, 3))

    def decoded(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            tell("decoding images", 0.0, {"images": done, "of": total})

    images, kept, rejected = protocol.decode_samples(samples, size, out=out, progress=decoded)
    names = {sample.source for sample in kept}

    def usable(part: list[Sample]) -> list[Sample]:
        return [sample for sample in part if sample.source in names]

    return (
        images,
        replace(
            dataset,
            normals=usable(dataset.normals),
            test_normals=None if dataset.test_normals is None else usable(dataset.test_normals),
            anomalies=usable(dataset.anomalies),
        ),
        rejected,
    )


def _run_all(
    options: EvaluateOptions,
    splits: Sequence[Split],
    images: Pixels,
    dataset: Dataset,
    method: Method,
    tell: Progress,
) -> list[tuple[Run, RunPictures]]:
    rows = _rows(dataset)
    pixels = hashlib.blake2b(images.data).hexdigest()
    folder = None if options.report is None else options.report.with_suffix(".runs")
    done: list[tuple[Run, RunPictures]] = []
    for number, split in enumerate(splits):
        name = f"seed {split.seed}" + (f", {split.seen_class} seen" if split.seen_class else "")

        def tell_run(stage: str, share: float, figures: dict[str, Any], n: int = number) -> None:
            aurocs = [run.auroc for run, _ in done]
            mean = {"auroc": round(float(np.mean(aurocs)), 4)} if aurocs else {}
            tell(f"{name}: {stage}", (n + share) / len(splits), {**mean, **figures})  # noqa: B023

        stem = None if folder is None else folder / key(split, pixels, method.settings)
        found = None if stem is None else resume(stem)
        if found is None:
            found = _run(split, images, rows, method, machine_of(options.device), tell_run)
            if stem is not None:
                keep(stem, split, *found)
        done.append(found)
        tell_run("done", 1.0, {"auroc": round(float(np.mean([r.auroc for r, _ in done])), 4)})
    return done


def _rows(dataset: Dataset) -> dict[str, int]:
    """Where each sample's image lies among those that _decode() gives."""
    samples = [*dataset.normals, *(dataset.test_normals or []), *dataset.anomalies]
    return {sample.source: row for row, sample in enumerate(samples)}


def _copies(
    splits: Sequence[Split], images: Pixels, rows: Mapping[str, int]
) -> list[frozenset[str]]:
    """Per split, the test images whose pixels are those of an image that its training sees. They
    stay in the test, as in the papers, but pass for unseen ones."""
    digest = {
        source: hashlib.blake2b(images[row].tobytes()).digest() for source, row in rows.items()
    }
    found = []
    for split in splits:
        learnt = {digest[s.source] for s in [*split.train_normals, *split.train_anomalies]}
        found.append(frozenset(s.source for s in split.test if digest[s.source] in learnt))
    return found


def _run(
    split: Split,
    images: Pixels,
    rows: Mapping[str, int],
    method: Method,
    machine: dict[str, Any],
    tell: Progress,
) -> tuple[Run, RunPictures]:
    def index(samples: Sequence[Sample]) -> list[int]:
        return [rows[sample.source] for sample in samples]

    fitted = method.fit(
        images, index(split.train_normals), index(split.train_anomalies), split.seed, tell
    )
    test = index(split.test)
    scores = np.empty(len(test))
    maps: list[npt.NDArray[np.float32]] = []
    started = time.perf_counter()
    spared = fitted.saved_seconds()
    for start in range(0, len(test), method.batch_size):
        part = test[start : start + method.batch_size]
        judged, heat = fitted.judge(torch.from_numpy(images[part]))
        scores[start : start + len(part)] = judged
        maps += [] if heat is None else [heat]
        tell("scoring", 0.9 + 0.1 * (start + len(part)) / len(test), {})
    score_seconds = time.perf_counter() - started + fitted.saved_seconds() - spared
    run = Run(
        split.seed,
        split.seen_class,
        split.sha256,
        [sample.source for sample in split.test],
        [sample.defect for sample in split.test],
        scores.tolist(),
        fitted.train_seconds,
        score_seconds,
        machine,
    )
    heat_maps = np.concatenate(maps) if maps else None
    return run, RunPictures.choose(images, test, run.labels, scores, heat_maps)


def _summary(
    options: EvaluateOptions,
    dataset: Dataset,
    rejected: Sequence[Rejected],
    method: Method,
    runs: Sequence[Run],
    copies: Sequence[frozenset[str]],
) -> dict[str, Any]:
    def by_seed(value: Callable[[Run], float | None]) -> list[float | None]:
        """One figure per seed, None where no run of it has one: in the hard setting the mean over
        the seen classes."""
        found = [[value(run) for run in runs if run.seed == seed] for seed in options.seeds]
        known = [[v for v in values if v is not None] for values in found]
        return [float(np.mean(values)) if values else None for values in known]

    copy_of = {run.split_sha256: each for run, each in zip(runs, copies, strict=True)}
    machine, date = machine_of(options.device), time.strftime("%Y-%m-%d")
    seen = sorted({run.seen_class for run in runs if run.seen_class})
    return {
        "data": dataset.name,
        "protocol": options.protocol,
        "shots": options.shots,
        "seeds": list(options.seeds),
        "method": options.method,
        "recipe": options.recipe,
        "settings": json.loads(method.settings),
        "auroc": spread(by_seed(lambda run: run.auroc)),
        "ap": spread(by_seed(lambda run: run.ap)),
        "copies_in_test": [len(each) for each in copies],
        "auroc_without_copies": (
            spread(by_seed(lambda run: _without(run, copy_of[run.split_sha256])))
            if any(copies)
            else None
        ),
        "by_defect": {
            d: spread(by_seed(functools.partial(_of_defect, defect=d))) for d in dataset.defects
        },
        "by_seen_class": {
            c: spread([run.auroc for run in runs if run.seen_class == c]) for c in seen
        },
        "train_seconds": float(np.mean([run.train_seconds for run in runs])),
        "score_images_per_second": float(
            sum(len(run.scores) for run in runs) / sum(run.score_seconds for run in runs)
        ),
        "splits_sha256": [run.split_sha256 for run in runs],
        "normals": len(dataset.normals) + len(dataset.test_normals or []),
        "anomalies": len(dataset.anomalies),
        "rejected": [asdict(r) for r in rejected],
        "code_sha256": code_sha256(),
        "machine": machine,
        "date": date,
        "resumed": [
            {"seed": r.seed, "seen_class": r.seen_class, "machine": r.machine, "date": r.date}
            for r in runs
            if (r.machine, r.date) != (machine, date)
        ],
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation (of single values, with N - 1; None for one) of those that are
    known, and all values."""
    known = [v for v in values if v is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "per_seed": list(values),
    }


def _without(run: Run, copies: frozenset[str]) -> float | None:
    """AUROC of what is no copy; None where that is all normal or all anomalous."""
    kept = [i for i, source in enumerate(run.sources) if source not in copies]
    labels = [run.labels[i] for i in kept]
    return auroc(labels, [run.scores[i] for i in kept]) if len(set(labels)) > 1 else None


def _of_defect(run: Run, defect: str) -> float | None:
    """AUROC of one class against all test normals; None where a run does not test it."""
    chosen = [i for i, d in enumerate(run.defects) if d in ("", defect)]
    labels = [run.labels[i] for i in chosen]
    return auroc(labels, [run.scores[i] for i in chosen]) if any(labels) else None


def _title(options: EvaluateOptions, report: Mapping[str, Any]) -> str:
    found = report["auroc"]
    several = found["sd"] is not None
    over = f" +- {found['sd']:.3f} over {len(options.seeds)} seeds" if several else ", one seed"
    return (
        f"{options.method} on {report['data']}, {options.protocol}, M = {options.shots}: "
        f"AUROC {found['mean']:.3f}{over}"
    )
