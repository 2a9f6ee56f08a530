"""Train a version: data in S3 > Ray Train workers (train_worker.py) > registry. The driver.

    run.json in S3 > workers fit together > rank 0 packs > version in S3 > gate > pointer

Failures. A worker that dies is started again by Ray Train, up to MAX_FAILURES times, and the run
goes on from its last checkpoint, one per epoch of tuning, in S3 below <models>/<model>/runs/<run>/.
A driver that dies takes the workers along; `resume` goes on in the same way and ends in the version
that carries the run's name, however often it is called. A training that is left by an exception or
Ctrl-C ends its workers.

Logical CPUs are admission, not speed: a worker asks for half of one, so that a Serve application
fits beside two on two cores; decode tasks (sources.py) ask for none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpdl_core.config import DpdlConfig, override, recipe, to_json
from infra.answers import is_answer
from infra.errors import DataError, ServiceUnavailable
from infra.model_store import ModelStore, new_version_id
from infra.ray_runtime import TRAINING_GPU_SHARE, connect
from infra.s3_client import ensure_buckets
from infra.settings import Settings
from pipelines.dataset_index import (
    DatasetIndex,
    Progress,
    check_name,
    check_snapshot,
    index_of_run,
    list_objects,
    load_index,
)
from pipelines.datasets import import_dataset
from pipelines.patience import patiently
from pipelines.people import data_of_training
from pipelines.promotion import code_version, consider_training
from pipelines.ray_network import MeetOnRaysNetwork
from pipelines.ray_run import Introduce, RayRun, cluster_free, cluster_total
from pipelines.run_record import EPOCHS, RUN, RunRecord, epochs_from_lines, load_run, save_run
from pipelines.sources import row_groups, task_environment
from pipelines.storage import shared_filesystem
from pipelines.train_keeper import files_of
from pipelines.train_worker import FIGURES, ProgressBoard, TrainJob, train_loop

WORKER_CPUS = 0.5
MAX_FAILURES = 2
S3_PATIENCE_S = 900.0
"""How long a finished training waits for S3 to take it: its minutes are worth more."""

T = TypeVar("T")
Workers = int | tuple[int, int] | None
"""So many; at least and at most so many, as the cluster has room; or as seems best."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    dataset: str
    """An imported data set; `elpv` is imported where it is not there yet."""
    model_name: str = "default"
    recipe: str = "edge"
    overrides: Mapping[str, str] = field(default_factory=dict)
    """DpdlConfig fields over the recipe's."""
    workers: Workers = None
    """None: one per GPU, else two where there are two cores."""
    device: str = ""
    """cuda: a GPU for each worker, waited for where the cluster has not so many yet; cpu: none;
    with "", GPUs where the cluster has as many as workers."""
    seed: int = 0
    false_alarm_rate: float = 0.01
    """Share of normal images that may alert; thresholds are set for it."""

    def __post_init__(self) -> None:
        low, high = _bounds(self.workers)
        if not 1 <= low <= high:
            raise ValueError(f"workers={self.workers}: need at least 1, and no less than the least")
        if self.device not in ("", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: wanted cpu or cuda")
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate={self.false_alarm_rate}: need it in (0, 1)")


@dataclass(frozen=True)
class TrainReport:
    version: str
    """Also the run's name."""
    decision: str
    """promoted or held."""
    why: str
    auroc: float | None
    """Of the test split; None where it has not both classes."""
    ap: float | None
    epochs: int
    """Of tuning; 0 for a recipe that keeps the trunk as it is."""
    steps: int
    seconds: float
    """Of this call."""
    fit_seconds: float
    """Since the workers were last started."""
    score_seconds: float
    data_wait_share: float
    """Share of the steps' time that rank 0 waited for images; of its whole fit without tuning."""
    workers: int
    """At the end."""
    starts: int
    """How often the workers were started in this call: once, and again after each failure or change
    of their number."""
    resumed: bool
    curve: list[dict[str, Any]]
    """Figures of every epoch, as epochs.jsonl has them."""
    renewals: list[dict[str, Any]]
    """Of the prototypes, in the run."""
    images: dict[str, dict[str, int]]
    """Of the data set, by split; confirmed defects count to "train"."""
    answers: dict[str, int]
    """Of those that people gave, used here: confirmed defects and vouched normals."""
    thresholds: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    """Last figures of each stage of the fit."""
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
    ensure_buckets(settings)
    index = _index(settings, options.dataset, progress)
    check_snapshot(settings, index)
    record = RunRecord(
        run=new_version_id("train"),
        model=options.model_name,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        options={**asdict(options), "overrides": dict(options.overrides)},
        config=json.loads(to_json(config)),
        data=data_of_training(settings, index),
        code=code_version(),
    )
    save_run(settings, record)
    return _carry_out(settings, record, options, index, started, progress)


def resume(
    settings: Settings, model_name: str, run: str, progress: Progress | None = None
) -> TrainReport:
    """Go on with a run whose driver died, from its last checkpoint, to the version of its name.

    Raises DataError where there is no such run or its data set has changed since.
    """
    started = time.perf_counter()
    check_name(model_name)
    record = load_run(settings, model_name, run)
    options = _options(record)
    index = index_of_run(settings, record.data)
    return _carry_out(settings, record, options, index, started, progress, resumed=True)


def parse_workers(text: str) -> Workers:
    """`2`, or `1:4` for between one and four. Raises ValueError for anything else."""
    try:
        low, colon, high = text.partition(":")
        return (int(low), int(high)) if colon else int(low)
    except ValueError:
        raise ValueError(f"workers={text}: wanted a number, or LEAST:MOST as in 1:4") from None


def _carry_out(
    settings: Settings,
    record: RunRecord,
    options: TrainOptions,
    index: DatasetIndex,
    started: float,
    progress: Progress | None,
    resumed: bool = False,
) -> TrainReport:
    if progress is not None:
        progress("start", 0.0, {"run": record.run})
    connect()
    job, workers, each = _job(settings, options, record, index)
    trainer = _trainer(settings, record, job, workers, each)
    if progress is not None:
        low, high = _bounds(workers)
        device = "cuda" if "GPU" in each else "cpu"
        figures = {"workers": low if low == high else f"{low}:{high}", "device": device}
        progress("workers", 0.0, figures)
        for kind, share in each.items():
            if (free := cluster_free(kind)) < low * share:
                because = (
                    f"{free:g} {kind}s of the Ray cluster are free, {low * share:g} are needed"
                )
                progress("waiting for workers", 0.0, {"because": because})
    takes = " and ".join(f"{share:g} of a {kind}" for kind, share in each.items())
    with RayRun(trainer, job.board) as run:
        told = run.follow(progress, f"each takes {takes}, and `ray status` says who has them")
    files = files_of(run.result().checkpoint)
    figures = json.loads(files.pop(FIGURES))
    epochs = epochs_from_lines(files[EPOCHS])
    files[RUN] = record.to_json()
    manifest = {
        "kind": "train",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": None,
        "line": [],
        "data": record.data | figures["data"],
        "false_alarm_rate": options.false_alarm_rate,
        "options": record.options,
        "code": record.code,
        "auroc": figures["metrics"]["auroc"],
        "thresholds": figures["thresholds"],
        "fit_seconds": figures["fit_seconds"],
        "machines": figures["machines"],
    }
    store, name = ModelStore(settings), record.model
    _when_s3_answers(lambda: store.put_version(name, record.run, files, manifest), progress)
    shared = _when_s3_answers(lambda: _shared_again(store, name, figures["thresholds"]), progress)
    verdict = _when_s3_answers(
        lambda: consider_training(settings, store, name, record.run, progress), progress
    )
    return TrainReport(
        version=record.run,
        decision="promoted" if verdict.promote else "held",
        why=verdict.why,
        auroc=figures["metrics"]["auroc"],
        ap=figures["metrics"]["ap"],
        epochs=len(epochs),
        steps=epochs[-1]["steps"] if epochs else 0,
        seconds=time.perf_counter() - started,
        fit_seconds=figures["fit_seconds"],
        score_seconds=figures["score_seconds"],
        data_wait_share=figures["data_wait_share"],
        workers=figures["workers"],
        starts=sum("workers" in told_figures for _, _, told_figures in told),
        resumed=resumed,
        curve=epochs,
        renewals=[epoch["renewal"] for epoch in epochs if "renewal" in epoch],
        images=index.counts(),
        answers={
            "defects": len(record.data["confirmed"]),
            "normals": sum(map(is_answer, figures["data"]["incoming"])),
        },
        thresholds=figures["thresholds"],
        stages=_last_of_each(told),
        notes=figures["notes"] + shared,
    )


def _shared_again(store: ModelStore, name: str, thresholds: Mapping[str, Any]) -> list[str]:
    """A note on cameras that have thresholds of their own now and none by a training."""
    pointer = store.current(name)
    if pointer is None:
        return []
    own = store.manifest(name, pointer.version).get("thresholds", {}).get("cameras", {})
    lost = sorted(set(own) - set(thresholds["cameras"]))
    if not lost:
        return []
    return [
        f"{', '.join(lost)}: a threshold of their own in {pointer.version}, and here that of all, "
        "as the import has too few held-out normals of theirs; the next refresh sets it again"
    ]


def _last_of_each(told: list[tuple[str, float, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for stage, _, figures in told:
        stages[stage] = stages.get(stage, {}) | figures
    return stages


def _when_s3_answers(call: Callable[[], T], progress: Progress | None) -> T:
    def waiting(error: ServiceUnavailable) -> None:
        if progress is not None:
            progress("waiting for S3", 0.0, {"because": str(error)})

    return patiently(call, deadline_s=S3_PATIENCE_S, waiting=waiting)


# What to run ----------------------------------------------------------------------------------


def _config(options: TrainOptions) -> DpdlConfig:
    try:
        return override(recipe(options.recipe), dict(options.overrides))
    except (ValueError, KeyError) as error:
        raise DataError(str(error)) from None


def _options(record: RunRecord) -> TrainOptions:
    values = dict(record.options)
    workers = values["workers"]
    values["workers"] = tuple(workers) if isinstance(workers, list) else workers
    try:
        return TrainOptions(**values)
    except TypeError as error:
        raise DataError(f"run {record.run} was started by another version ({error})") from None


def _index(settings: Settings, name: str, progress: Progress | None) -> DatasetIndex:
    """The data set's index. ELPV comes from its package, where it was not imported yet."""
    check_name(name)
    if name == "elpv" and not list_objects(settings, f"{name}/dataset.json"):
        if progress is not None:
            progress("import", 0.0, {"because": "elpv is not in S3 yet, its package is imported"})
        import_dataset(settings, name, name, progress=progress)
    return load_index(settings, name)


def _bounds(workers: Workers) -> tuple[int, int]:
    if workers is None:
        return 1, 1
    return workers if isinstance(workers, tuple) else (workers, workers)


def _job(
    settings: Settings, options: TrainOptions, record: RunRecord, index: DatasetIndex
) -> tuple[TrainJob, int | tuple[int, int], dict[str, float]]:
    """The job, how many workers have it, and what each takes of the cluster."""
    normals = row_groups(settings, index.keys("train", 0))
    cpus, gpus = cluster_total("CPU"), int(cluster_total("GPU"))
    low, high, each = share_out(options, len(normals), cpus, gpus)
    job = TrainJob(
        environment=task_environment(settings),
        config=json.dumps(record.config),
        seed=options.seed,
        false_alarm_rate=options.false_alarm_rate,
        data=record.data,
        normals=normals,
        defects=row_groups(settings, index.keys("train", 1)),
        calibration=row_groups(settings, index.keys("calibration")),
        test=row_groups(settings, index.keys("test")),
        # One per core that is left when every worker has its own.
        decode_tasks=max(1, int(cpus / high) - 1),
        board=_board(),
    )
    return job, low if low == high else (low, high), each


def share_out(
    options: TrainOptions, row_groups: int, cpus: float, gpus: int
) -> tuple[int, int, dict[str, float]]:
    """Least and most workers, and what each takes, of a Ray cluster with these CPUs and GPUs.

    DataError where the CPUs will not do, but for device=cuda: what is not there is waited for
    then, as an autoscaler brings machines only for what somebody waits for.
    """
    wanted = {"cpu": 0, "cuda": max(1, gpus), "": gpus}[options.device]
    chosen = options.workers or wanted or max(1, min(2, int(cpus)))
    # A worker with no data would have no part in the fit.
    low, high = (min(bound, row_groups) for bound in _bounds(chosen))
    on_gpus = options.device == "cuda" or low <= wanted
    if options.device != "cuda" and low * WORKER_CPUS > cpus:
        raise DataError(
            f"workers={low} need {low * WORKER_CPUS:g} CPUs, the Ray cluster has {cpus:g}: "
            "lower --workers, or --device cuda to wait for machines with GPUs"
        )
    return low, high, {"CPU": WORKER_CPUS} | ({"GPU": TRAINING_GPU_SHARE} if on_gpus else {})


def _board() -> Any:
    """On the driver's own node: a node that is lost must not take the progress with it."""
    here = ray.get_runtime_context().get_node_id()
    place: Any = NodeAffinitySchedulingStrategy(here, soft=False)  # untyped in Ray
    return ray.remote(num_cpus=0, scheduling_strategy=place)(ProgressBoard).remote()


def _trainer(
    settings: Settings,
    record: RunRecord,
    job: TrainJob,
    workers: int | tuple[int, int],
    each: dict[str, float],
) -> TorchTrainer:
    # Ray's annotations are those of its first version.
    elastic: Any = workers
    callbacks: list[Any] = [Introduce(job.board), MeetOnRaysNetwork()]
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=elastic,
            use_gpu="GPU" in each,
            resources_per_worker=each,
            # Each on a machine of its own where there are several: decoding wants their cores.
            placement_strategy="SPREAD",
        ),
        # A run of the same name in the same place goes on from its last checkpoint.
        run_config=ray.train.RunConfig(
            name=record.run,
            storage_filesystem=shared_filesystem(settings),
            storage_path=f"{settings.s3.models_bucket}/{record.model}/runs",
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=callbacks,
        ),
    )
