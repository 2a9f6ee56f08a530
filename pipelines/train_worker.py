"""What each Ray Train worker does: its shard of the normals, one fit together, scores, the files.

Runs on the cluster; train.py is the driver. The normals are dealt to the ranks by row group, rank r
reads groups r, r + W, r + 2W, ...: no row is read twice and a rank's shard is the same in every
run. The few known defects are on every rank. Rank 0 packs the version as the last checkpoint.

Started again, the workers go on from the run's latest checkpoint: after the last whole epoch of
tuning, or at the end where the version was packed. A recipe without tuning has no epochs: its
minute of work begins anew and gives the same version.
Letters: W workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from dpdl_core import artifact
from dpdl_core.config import from_json
from dpdl_core.fit import fit
from dpdl_core.metrics import auroc, average_precision
from infra.cores import num_cores
from infra.errors import DpdlError
from pipelines.ray_network import node_address
from pipelines.run_record import CURVES, EPOCHS, draw, epochs_to_lines
from pipelines.scoring import Observed, calibrate, drift_reference, observe, yield_cores
from pipelines.sources import (
    Keep,
    RowGroup,
    StreamedImages,
    read_here,
    read_with_ray,
    stack,
    task_settings,
)
from pipelines.train_keeper import WorkerKeeper, gather, latest, report

FIGURES = "figures.json"
"""In the last checkpoint, beside the version's files: what the driver reports."""

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker is told. Travels by pickle: plain values, no secret."""

    environment: dict[str, str]
    config: str
    """DpdlConfig as JSON."""
    seed: int
    false_alarm_rate: float
    data: dict[str, Any]
    """As the run's record has it."""
    normals: Sequence[RowGroup]
    defects: Sequence[RowGroup]
    calibration: Sequence[RowGroup]
    test: Sequence[RowGroup]
    decode_tasks: int
    """At once, per worker."""
    board: Any
    """Handle of the ProgressBoard."""


FAILED = "failed"
"""A stage on the board: the workers met an error that trying again will not mend."""


class ProgressBoard:
    """A Ray actor where rank 0 writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, float, Figures]] = []
        self._controller: Any = None

    def put(self, stage: str, fraction: float, figures: Figures) -> None:
        self._entries.append((stage, fraction, figures))

    def take(self) -> list[tuple[str, float, Figures]]:
        entries, self._entries = self._entries, []
        return entries

    def set_controller(self, handle: list[Any]) -> None:
        """The actor that runs the training, in a list so that Ray passes it as it is."""
        self._controller = handle[0]

    def controller(self) -> Any:
        return self._controller


def train_loop(config: dict[str, TrainJob]) -> None:
    """Ray Train's entry. What would fail again is told to the driver, which ends the run; all
    other errors are Ray Train's to answer: it starts the workers again."""
    job = config["job"]
    try:
        _train(job)
    except (ValueError, DpdlError) as error:
        if not getattr(error, "retryable", False):
            ray.get(job.board.put.remote(FAILED, 0.0, {"error": str(error)}))
        raise


def _train(job: TrainJob) -> None:
    """Fit, score, and on rank 0 report the packed version."""
    worker = _Worker(job)
    if FIGURES in worker.before:
        return  # the version is packed: a worker died after that
    started = time.perf_counter()
    model, waited = worker.fit()
    fitted = time.perf_counter()
    calibration, normals = worker.score(model, worker.job.calibration, "calibrate")
    test, _ = worker.score(model, worker.job.test, "test")
    set_aside = worker.keeper.digests(worker.keeper.left_out)
    if worker.rank != 0:
        ray.train.report({})
        return
    thresholds, notes = calibrate(
        np.array([row[0] for row in calibration]),
        [row[2] for row in calibration],
        worker.job.false_alarm_rate,
    )
    metrics = {
        **_quality(test),
        "test_images": len(test),
        "drift": drift_reference(model, normals, [row[2] for row in calibration]),
    }
    epochs = worker.keeper.epochs
    seconds = sum(epoch["seconds"] for epoch in epochs)
    stalled = sum(epoch["seconds"] * epoch["data_wait_share"] for epoch in epochs)
    figures: Figures = {
        "fit_seconds": fitted - started,
        "score_seconds": time.perf_counter() - fitted,
        "data_wait_share": stalled / seconds if epochs else waited / (fitted - started),
        "workers": worker.world,
        "machines": worker.machines,
        "metrics": metrics,
        "thresholds": thresholds,
        "notes": notes,
        "data": {**worker.keeper.joined(), "set_aside": set_aside},
    }
    files = artifact.pack(model, thresholds=thresholds, metrics=metrics) | {
        EPOCHS: epochs_to_lines(epochs),
        CURVES: draw(
            epochs,
            [row[0] for row in calibration],
            [row[:2] for row in test],
            thresholds["default"],
        ),
        FIGURES: json.dumps(figures).encode(),
    }
    report({}, files)


class _Worker:
    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job = job
        yield_cores()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.machines: list[str] = gather(node_address())
        """Where each rank runs, as Ray calls its nodes."""
        self.device = ray.train.torch.get_device()
        # Workers that share a machine share its cores: more threads than cores only thrash.
        torch.set_num_threads(max(1, num_cores() // context.get_local_world_size()))
        self.config = from_json(job.config)
        self.before = latest()
        """Files of the checkpoint to go on from."""
        self.keeper = WorkerKeeper(
            task_settings(job.environment), job.data, self._shard, self.before
        )

    def fit(self) -> tuple[Any, float]:
        """The model and the seconds this rank waited for data."""
        size = self.config.image_size
        self.progress("machines", 0.0, {"at": " ".join(self.machines)})
        self.progress("read", 0.0, {"workers": self.world, "epochs_done": len(self.keeper.epochs)})
        normals = self.keeper.normals(self.job.normals)
        groups = self.job.defects
        defects = StreamedImages(
            read_here(task_settings(self.job.environment), groups, size),
            size,
            expected=sum(group.rows for group in groups),
        )
        self.progress("read", 1.0, {"normals_on_this_worker": normals.num_images})
        model = fit(
            self.config,
            normals,
            stack(defects),
            seed=self.job.seed,
            device=self.device,
            progress=self.progress,
            keeper=self.keeper,
        )
        return model, self.keeper.waited_s

    def score(
        self, model: Any, groups: Sequence[RowGroup], stage: str
    ) -> tuple[list[tuple[float, int, str]], list[Observed]]:
        """(score, label, camera) of all rows of all ranks, the same on each; and all that was
        seen of them, in the same order."""
        self.progress(stage, 0.0, {})
        source = self._shard(groups)
        seen = observe(model, source)
        rows = [(float(s), r.label, r.camera) for s, r in zip(seen.score, source.rows, strict=True)]
        everyone = gather((rows, seen))
        self.progress(stage, 1.0, {"images": sum(len(rows) for rows, _ in everyone)})
        return [row for rows, _ in everyone for row in rows], [seen for _, seen in everyone]

    def progress(self, stage: str, fraction: float, figures: Figures) -> None:
        if self.rank == 0:
            self.job.board.put.remote(stage, fraction, figures)

    def _shard(self, groups: Sequence[RowGroup], keep: Keep | None = None) -> StreamedImages:
        mine = groups[self.rank :: self.world]
        size, tasks = self.config.image_size, self.job.decode_tasks
        return StreamedImages(
            read_with_ray(self.job.environment, mine, size, tasks=tasks, keep=keep),
            size,
            expected=sum(group.rows for group in mine),
        )


def _quality(rows: Sequence[tuple[float, int, str]]) -> Figures:
    """AUROC and AP of the test split; None where it has not both classes."""
    labels, scores = [row[1] for row in rows], [row[0] for row in rows]
    if len(set(labels)) < 2:
        return {"auroc": None, "ap": None}
    return {"auroc": auroc(labels, scores), "ap": average_precision(labels, scores)}
