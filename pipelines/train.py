"""Train a version: data in S3 > Ray Train workers (train_worker.py) > registry. The driver.

    read the index > workers fit together > rank 0 packs > version in S3 > gate > pointer

Failures: Ray Train starts the workers again, up to MAX_FAILURES times, when one dies. A fit takes
minutes and begins anew then; nothing is registered before it is whole. The packed version reaches
S3 through Ray Train's storage, below <models>/<model>/runs/<run>/.

Logical CPUs are admission, not speed: a worker asks for half of one, so that its decode tasks
(sources.py) and a Serve application fit beside it on two cores. With whole ones, two workers would
take both cores and wait for ever for data that no task may decode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from dpdl_core.config import DpdlConfig, override, recipe, to_json
from infra.errors import DataError, DpdlError, ServiceUnavailable
from infra.model_store import ModelStore, new_version_id
from infra.ray_runtime import connect
from infra.s3_client import ensure_buckets
from infra.settings import Settings
from pipelines.dataset_index import (
    DatasetIndex,
    Progress,
    check_name,
    check_snapshot,
    load_index,
    snapshot,
)
from pipelines.patience import patiently
from pipelines.promotion import code_version, consider
from pipelines.sources import DECODE_CPUS, row_groups, task_environment
from pipelines.storage import shared_filesystem
from pipelines.train_worker import ProgressBoard, TrainJob, train_loop

WORKER_CPUS = 0.5
MAX_FAILURES = 2
S3_PATIENCE_S = 900.0
"""How long a finished training waits for S3 to take it: its minutes are worth more."""
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    dataset: str
    model_name: str = "default"
    recipe: str = "edge"
    overrides: Mapping[str, str] = field(default_factory=dict)
    """DpdlConfig fields over the recipe's."""
    workers: int | None = None
    """None: one per GPU, else two where there are two cores."""
    seed: int = 0
    false_alarm_rate: float = 0.01
    """Share of normal images that may alert; thresholds are set for it."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers}: need at least 1")
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate={self.false_alarm_rate}: need it in (0, 1)")


@dataclass(frozen=True)
class TrainReport:
    version: str
    decision: str
    """promoted or held."""
    why: str
    auroc: float | None
    """Of the test split; None where it has not both classes."""
    ap: float | None
    seconds: float
    fit_seconds: float
    score_seconds: float
    data_wait_share: float
    """Of rank 0's fit, spent waiting for images."""
    workers: int
    images: dict[str, dict[str, int]]
    thresholds: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    """Last figures of each stage of the fit, such as epochs, steps and losses."""
    notes: list[str]


def train(
    settings: Settings, options: TrainOptions, progress: Progress | None = None
) -> TrainReport:
    """Train on options.dataset and register the version; promoted if the gate lets it pass.

    Raises DataError for data or options that cannot be
    trained on, DpdlError when the workers failed for good.
    """
    started = time.perf_counter()
    check_name(options.model_name)
    config = _config(options)
    index = load_index(settings, options.dataset)
    check_snapshot(settings, index)
    ensure_buckets(settings)
    if progress is not None:
        progress("start", 0.0, {"on": "Ray"})
    connect()
    job, workers = _job(settings, options, config, index)
    version = new_version_id("train")
    run = _Run(_trainer(settings, options.model_name, version, job, workers))
    stages = run.follow(job.board, progress)
    result = run.result()
    figures = dict(result.metrics or {})
    with result.checkpoint.as_directory() as folder:
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    manifest = {
        "kind": "train",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": None,
        "line": [],
        "data": snapshot(index),
        "false_alarm_rate": options.false_alarm_rate,
        "options": {**asdict(options), "overrides": dict(options.overrides)},
        "code": code_version(),
        "auroc": figures["metrics"]["auroc"],
        "fit_seconds": figures["fit_seconds"],
    }
    store = ModelStore(settings)
    name = options.model_name

    def waiting(error: ServiceUnavailable) -> None:
        if progress is not None:
            progress("waiting for S3", 0.0, {"because": str(error)})

    patiently(
        lambda: store.put_version(name, version, files, manifest),
        deadline_s=S3_PATIENCE_S,
        waiting=waiting,
    )
    verdict = patiently(
        lambda: consider(settings, store, name, version, progress=progress),
        deadline_s=S3_PATIENCE_S,
        waiting=waiting,
    )
    return TrainReport(
        version=version,
        decision="promoted" if verdict.promote else "held",
        why=verdict.why,
        auroc=figures["metrics"]["auroc"],
        ap=figures["metrics"]["ap"],
        seconds=time.perf_counter() - started,
        fit_seconds=figures["fit_seconds"],
        score_seconds=figures["score_seconds"],
        data_wait_share=figures["data_wait_share"],
        workers=workers,
        images=index.counts(),
        thresholds=figures["thresholds"],
        stages=stages,
        notes=figures["notes"],
    )


def _config(options: TrainOptions) -> DpdlConfig:
    try:
        return override(recipe(options.recipe), dict(options.overrides))
    except (ValueError, KeyError) as error:
        raise DataError(str(error)) from None


def _job(
    settings: Settings, options: TrainOptions, config: DpdlConfig, index: DatasetIndex
) -> tuple[TrainJob, int]:
    normals = row_groups(settings, index.keys("train", 0))
    cpus, gpus = _cluster("CPU"), int(_cluster("GPU"))
    workers = options.workers or gpus or min(2, int(cpus))
    workers = min(workers, len(normals))  # a worker with no data would have no part in the fit
    if workers * (WORKER_CPUS + DECODE_CPUS) > cpus:
        raise DataError(
            f"workers={workers} and their decoding need {workers * (WORKER_CPUS + DECODE_CPUS):g} "
            f"CPUs, the Ray cluster has {cpus:g}: lower --workers"
        )
    spare = cpus / workers - WORKER_CPUS
    job = TrainJob(
        environment=task_environment(settings),
        config=to_json(config),
        seed=options.seed,
        false_alarm_rate=options.false_alarm_rate,
        normals=normals,
        defects=row_groups(settings, index.keys("train", 1)),
        calibration=row_groups(settings, index.keys("calibration")),
        test=row_groups(settings, index.keys("test")),
        # Half of what is spare at most, so that one worker's tasks never crowd out another's.
        decode_tasks=max(1, int(spare / DECODE_CPUS / 2)),
        board=ray.remote(num_cpus=0)(ProgressBoard).remote(),
    )
    return job, workers


def _cluster(resource: str) -> float:
    """How much of a resource the Ray cluster has, used or not."""
    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return float(found.get(resource, 0.0))


def _trainer(settings: Settings, model: str, run: str, job: TrainJob, workers: int) -> TorchTrainer:
    use_gpu = workers <= int(_cluster("GPU"))
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": WORKER_CPUS} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=run,
            storage_filesystem=shared_filesystem(settings),
            storage_path=f"{settings.s3.models_bucket}/{model}/runs",
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )


def cause(error: BaseException) -> str:
    """The worker's own last line, out of Ray's wrapping.

    When one worker fails, the others fail too, for want of it: theirs is not the cause.
    """
    failures = getattr(error, "worker_failures", None) or {0: error}
    last = [_last_line(failure) for _, failure in sorted(failures.items())]
    return next((line for line in last if "gloo" not in line and "NCCL" not in line), last[0])


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Run(threading.Thread):
    """trainer.fit() in a thread of its own, begun at once.

    In the main thread Ray Train would put its own Ctrl-C handler in place and leave it there: it
    ends the process with exit code 0, also long after the training. Here Ctrl-C interrupts
    whoever follows, and Ray ends the workers with the process, or at ray.shutdown().
    """

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="train", daemon=True)
        self._trainer = trainer
        self._result: Any = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._trainer.fit()
        except Exception as error:
            self._error = error

    def follow(self, board: Any, progress: Progress | None) -> dict[str, dict[str, Any]]:
        """Pass the workers' progress on until the run ends; the last figures of each stage."""
        stages: dict[str, dict[str, Any]] = {}
        alive = True
        while alive:
            self.join(POLL_S)
            alive = self.is_alive()
            for stage, fraction, figures in ray.get(board.take.remote()):
                stages[stage] = stages.get(stage, {}) | figures
                if progress is not None:
                    progress(stage, fraction, figures)
        return stages

    def result(self) -> Any:
        """Ray Train's result. DpdlError, in one line, where the workers failed for good."""
        if isinstance(self._error, ray.train.TrainingFailedError):
            raise DpdlError(f"training failed: {cause(self._error)}") from self._error
        if self._error is not None:
            raise self._error
        return self._result
