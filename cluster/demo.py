"""`dpdl demo`: the main job on one machine, with real parts and real images.

    services > data in S3 > training > stream application > cameras > renewal under way > report

Everything lives in <state>/demo, apart from what `dpdl up` keeps; it begins empty each time. The
labels never enter the stream: they are joined with the results at the end.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from cluster.accounting import Account, take_account, wait_until_scored
from cluster.camera import OutgoingFrame, SentFrame, stream
from cluster.demo_view import StreamView
from cluster.stack import open_stack, own_state_folder
from dpdl_core.metrics import auroc, average_precision
from dpdl_core.protocol import load_dataset, split
from infra.errors import DpdlError
from infra.kafka_client import end_offsets, ensure_topics
from infra.redis_client import ResultStore
from infra.settings import Settings, load_settings
from pipelines.datasets import NewImage, import_dataset, iter_images, labels, put_incoming
from pipelines.refresh import RefreshOptions, RefreshReport, refresh_once
from pipelines.train import TrainOptions, TrainReport, train
from serving import app as stream_app

MODEL = "demo"
LATER_SHARE = 0.15
"""Of the training normals, kept from training: they arrive as new normals during the stream."""
REFRESH_AT = 0.05
"""Share of the frames after which the new normals arrive."""
AFTER_REFRESH = 0.2
"""Share of the frames, the last ones, that the cameras keep until the refresh is decided, so that a
new version is seen at work however long two cores take over it."""
STALL_S = 60.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    data: str = "elpv"
    """"elpv" or a folder."""
    frames: int | None = None
    """None: every held-out image once."""
    cameras: int = 4
    fps: float = 5.0
    """Of each camera."""
    shots: int = 10
    seed: int = 0
    stay: bool = True
    """Stay up after the report, with the console, until Ctrl-C."""


@dataclass
class _Renewal:
    """What the refresh beside the stream came to."""

    report: RefreshReport | None = None
    error: BaseException | None = None
    decided: threading.Event = field(default_factory=threading.Event)


def run_demo(options: DemoOptions, write: Callable[[dict[str, Any]], None]) -> None:
    """Run it all; `write` gets the report. Errors: DpdlError, in one line, also for a report of
    frames that were lost or scored twice."""
    console = Console()
    began = time.monotonic()
    with own_state_folder("demo") as settings, open_stack(settings, say=_dim(console)):
        settings = load_settings()  # now with the services' addresses and keys
        try:
            later = _import(settings, options, console)
            trained = _train(settings, options, console)
            deployed = stream_app.deploy(settings, model_name=MODEL, say=_dim(console))
            report = _stream_and_renew(settings, options, later, console)
            report |= {
                "train_seconds": round(trained.seconds, 2),
                "wall_seconds": round(time.monotonic() - began, 2),
            }
            _show(console, report)
            write(report)
            if options.stay:
                console.print(f"\n{_in_a_line(settings, report)}", highlight=False)
                console.print(
                    f"Look, and say where it was wrong: [bold]{deployed.url}[/]  (Ctrl-C ends)"
                )
                console.print(
                    f"Other commands see this run with DPDL_STATE_DIR={settings.state_dir}",
                    style="dim",
                    markup=False,
                )
                with suppress(KeyboardInterrupt):
                    threading.Event().wait()
            _check_account(report)
        finally:
            _end_ray()


def _import(settings: Settings, options: DemoOptions, console: Console) -> list[NewImage]:
    """Put the data set into S3; returns the normals that are kept for later."""
    chosen = split(
        load_dataset(options.data), setting="general", shots=options.shots, seed=options.seed
    )
    normals = list(chosen.train_normals)
    later = random.Random(options.seed).sample(normals, round(LATER_SHARE * len(normals)))
    with console.status("importing images into S3"):
        report = import_dataset(
            settings,
            options.data,
            "demo",
            shots=options.shots,
            seed=options.seed,
            leave_out={sample.source for sample in later},
        )
    if report.licence:
        console.print(f"Images: {report.licence}", style="dim")
    counts = report.counts
    console.print(
        f"In S3: {counts['train']['normal']} normal images and {counts['train']['anomaly']} "
        f"defects for training, {counts['calibration']['normal']} for the threshold, "
        f"{sum(counts['test'].values())} held out for the stream"
        + (f"; {len(report.skipped)} unreadable, left out" if report.skipped else "")
    )
    return [NewImage(sample.read(), source=sample.source) for sample in later]


def _train(settings: Settings, options: DemoOptions, console: Console) -> TrainReport:
    with console.status("training: starting workers") as status:

        def progress(stage: str, fraction: float, figures: dict[str, Any]) -> None:
            shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
            status.update(f"training: {stage} {fraction:.0%}  {shown}")

        report = train(
            settings,
            TrainOptions(dataset="demo", model_name=MODEL, seed=options.seed),
            progress,
        )
    if report.decision != "promoted":
        raise DpdlError(f"the trained version {report.version} was held: {report.why}")
    offline = "" if report.auroc is None else f", AUROC {report.auroc:.3f} on the held-out images"
    console.print(
        f"Trained {report.version} on {report.workers} workers in {report.seconds:.0f} s{offline}"
    )
    return report


def _stream_and_renew(
    settings: Settings, options: DemoOptions, later: list[NewImage], console: Console
) -> dict[str, Any]:
    """Stream as cameras; in the meantime new normals arrive and the model is renewed."""
    ensure_topics(settings)
    start = end_offsets(settings, settings.kafka.topic)
    frames = _frames(settings, options)
    known = labels(settings, "demo", "test")
    sent: list[SentFrame] = []
    stop, renew_now = threading.Event(), threading.Event()
    renewal = _Renewal()
    arrive = round(REFRESH_AT * len(frames))
    pause = len(frames) - round(AFTER_REFRESH * len(frames))
    paused = 0.0
    began = time.monotonic()
    with StreamView(settings, console, start, len(frames)) as view:

        def on_sent(frame: SentFrame) -> None:
            sent.append(frame)
            view.sent = len(sent)

        def renew() -> None:
            renew_now.wait()
            if stop.is_set():
                return
            try:
                put_incoming(settings, "demo", later)
                view.note = f"{len(later)} new normals in S3, refresh is running"
                renewal.report = _refresh(settings, options.seed)
                view.note = f"refresh {renewal.report.decision}: {renewal.report.to_version}"
            except BaseException as error:
                renewal.error = error
                view.note = f"refresh failed: {error}"
            finally:
                renewal.decided.set()

        def paced() -> Iterator[OutgoingFrame]:
            nonlocal paused
            yield from frames[:arrive]
            renew_now.set()
            yield from frames[arrive:pause]
            paused = -time.monotonic()
            renewal.decided.wait()
            paused += time.monotonic()
            yield from frames[pause:]

        renewer = threading.Thread(target=renew, name="refresh", daemon=True)
        renewer.start()
        try:
            stream(
                settings,
                paced(),
                frames_per_second=options.fps * options.cameras,
                stop=stop,
                on_sent=on_sent,
            )
            wait_until_scored(
                settings, end_offsets(settings, settings.kafka.topic), stall_s=STALL_S
            )
            took = time.monotonic() - began - paused
        finally:
            stop.set()
            renew_now.set()
    if renewal.error is not None:
        raise renewal.error
    assert renewal.report is not None, "the refresh thread ends with a report or an error"
    return _report(take_account(settings, start), sent, known, renewal.report, took)


def _refresh(settings: Settings, seed: int) -> RefreshReport:
    """In a process of its own: in this one it would keep the interpreter from the cameras."""
    import ray

    @ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator,unused-ignore]
    def refresh() -> RefreshReport:
        options = RefreshOptions(model_name=MODEL, seed=seed, min_new=1)
        return refresh_once(load_settings(), options)

    task = refresh.options(runtime_env={"env_vars": settings.worker_env()})
    report: RefreshReport = ray.get(task.remote())
    return report


def _frames(settings: Settings, options: DemoOptions) -> list[OutgoingFrame]:
    """Held-out images in a mixed order, dealt to the cameras in turn, again if too few."""
    images = list(iter_images(settings, "demo", "test"))
    random.Random(options.seed).shuffle(images)
    number = options.frames or len(images)
    return [
        OutgoingFrame(f"camera-{i % options.cameras + 1}", image, source)
        for i in range(number)
        for source, image in [images[i % len(images)]]
    ]


def _report(
    account: Account,
    sent: list[SentFrame],
    known: dict[str, tuple[int, str]],
    refresh: RefreshReport,
    seconds: float,
) -> dict[str, Any]:
    scored = [
        (account.results[s.frame_id], known[s.source][0])
        for s in sent
        if s.frame_id in account.results
    ]
    truth = np.array([label for _, label in scored])
    scores = np.array([result.score for result, _ in scored])
    raised = np.array([result.is_anomaly for result, _ in scored])
    hits = int((raised & (truth == 1)).sum())
    latency = [(r.scored_at_ns - r.captured_at_ns) / 1e6 for r in account.results.values()]
    both = 0 < truth.sum() < len(truth)
    return {
        "frames_sent": account.sent,
        "frames_scored": len(account.results),
        "frames_lost": account.lost,
        "frames_duplicated": account.duplicated,
        "dead_letters": len(account.dead),
        "auroc": auroc(truth, scores) if both else None,
        "ap": average_precision(truth, scores) if both else None,
        "alerts": int(raised.sum()),
        "precision": hits / int(raised.sum()) if raised.any() else None,
        "recall": hits / int(truth.sum()) if truth.any() else None,
        "latency_ms": {
            "p50": round(float(np.percentile(latency, 50)), 1),
            "p99": round(float(np.percentile(latency, 99)), 1),
        },
        "frames_per_second": round(len(account.results) / seconds, 2),
        "versions": sorted({result.version for result in account.results.values()}),
        "refresh": {
            "decision": refresh.decision,
            "from": refresh.from_version,
            "to": refresh.to_version,
            "why": refresh.why,
        },
    }


def _check_account(report: dict[str, Any]) -> None:
    lost, twice = report["frames_lost"], report["frames_duplicated"]
    if lost or twice:
        raise DpdlError(
            f"of {report['frames_sent']} frames {lost} were lost and {twice} scored twice: that is "
            "not to happen, keep the report and the log"
        )


def _show(console: Console, report: dict[str, Any]) -> None:
    console.rule("what happened")
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
        console.print(
            f"{name.replace('_', ' '):>20}  {_short(value)}", highlight=False, markup=False
        )


def _in_a_line(settings: Settings, report: dict[str, Any]) -> str:
    cameras = ResultStore(settings).cameras()
    worst = max(cameras, key=lambda camera: camera.alerts / max(1, camera.frames))
    return (
        f"{report['frames_scored']} frames of {len(cameras)} cameras scored, "
        f"{report['frames_lost']} lost, {report['alerts']} alerts; the worst camera is "
        f"{worst.camera}: {worst.alerts / max(1, worst.frames):.0%} of its frames raised one."
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _dim(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, style="dim", markup=False)


def _end_ray() -> None:
    """The stream application drains, then the Ray that this process started ends."""
    import ray

    if ray.is_initialized():
        stream_app.shutdown()
        ray.shutdown()
