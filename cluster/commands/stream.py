"""The stream: serve it, feed it, watch its alerts."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.commands.shared import Model, Report, err, out, write_report
from infra.errors import DpdlError, ServiceUnavailable

if TYPE_CHECKING:
    from cluster.feeds import CameraCount
    from infra.redis_client import ResultStore, StoredResult

app = typer.Typer()

LOOK_S = 15.0
"""How often `dpdl serve` looks whether its application is there, and says anew where Prometheus
finds the cluster's metrics."""
START_S, MACHINE_S = 180.0, 1800.0
"""Until all of it runs; the machine of a GPU that is waited for may have to be installed first."""
STREAM_ID = re.compile(r"\d{1,19}(-\d{1,19})?")  # Redis takes 64 bits
AWAY_S = 1.0
"""How often `dpdl alerts --follow` asks for a Redis that is away."""


@app.command()
def serve(
    model: Model = "default",
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="cuda waits for a GPU. Default: a GPU where there is one by now."),
    ] = None,
) -> None:
    """Deploy the stream application (consumer, scorer, console); Ctrl-C or SIGTERM ends it.

    Ends with exit code 1 when somebody else deletes or replaces the application.
    """
    import ray
    from ray.exceptions import RayError

    from infra import ray_runtime
    from infra.redis_connection import eviction_policy
    from infra.settings import load_settings
    from serving import app as stream_app

    settings = load_settings()
    targets = ray_runtime.scrape_targets_file(settings.state_dir)
    try:
        deployed = stream_app.deploy(
            settings,
            model_name=model,
            device=device or "",
            deadline_s=MACHINE_S if device == "cuda" else START_S,
            say=out.print,
        )
        out.print(
            f"{deployed.version} scores on {deployed.device}; alerts at {deployed.url}   "
            "(Ctrl-C ends)"
        )
        with suppress(DpdlError):  # the stream waits for a Redis that is away, and says so
            if policy := eviction_policy(settings):
                err.print(
                    f"Redis drops keys when it is full (maxmemory-policy {policy}): progress, "
                    "alerts and answers can go. Set it to noeviction: then it refuses, and the "
                    "stream waits",
                    markup=False,
                )
        with suppress(KeyboardInterrupt):  # SIGTERM too: cluster/cli.py
            while True:  # nodes come and go
                try:
                    stream_app.check_ours()
                    ray_runtime.write_scrape_targets(targets)
                except RayError as error:  # a head that is restarted
                    said = " ".join(str(error).split())[:300]
                    err.print(f"Ray does not say what runs, asking again: {said}", markup=False)
                except OSError as error:  # a full disk
                    err.print(f"Prometheus does not find this cluster: {error}", markup=False)
                time.sleep(LOOK_S)
        out.print("ending: what is in flight is published first")
    finally:
        if ray.is_initialized():
            stream_app.shutdown()
            ray.shutdown()


@app.command()
def stream(
    src: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a video file, an rtsp:// or http:// address; env:NAME or file:PATH "
            "for an address with a password."
        ),
    ] = None,
    camera: Annotated[str | None, typer.Option(help="Camera id.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="At most so many frames per second.")
    ] = None,
    cameras: Annotated[
        Path | None, typer.Option(help="Many cameras, from a YAML file (docs/cameras.md).")
    ] = None,
    report: Report = None,
) -> None:
    """Bring cameras' frames into the stream, until they end or Ctrl-C."""
    from cluster.feeds import CameraSpec, load_cameras, run_cameras
    from cluster.sources import parse_source
    from infra.kafka_client import ensure_topics
    from infra.messages import check_camera
    from infra.settings import load_settings

    settings = load_settings()
    if cameras is not None and (src or camera or fps):
        raise ValueError("--cameras FILE names sources, ids and rates itself: leave out the others")
    if cameras is not None:
        specs = load_cameras(cameras)
    elif src is None or camera is None:
        raise ValueError("wanted SRC --camera ID, or --cameras FILE")
    else:
        source = parse_source(src, on_command_line=True)
        specs = [CameraSpec(camera=check_camera(camera), source=source, fps=fps)]
    ensure_topics(settings)
    counts: list[CameraCount] = []
    with cameras_line(counts) as say:
        run_cameras(settings, specs, stop=threading.Event(), say=say, counts=counts)
    for one in counts:
        out.print(
            f"{one.camera}: {one.sent} sent, {one.dropped} dropped, {one.refused} refused, "
            f"lost {one.losses} times{f': {one.why}' if one.state == 'failed' else ''}",
            markup=False,
        )
    write_report(report, {"cameras": [asdict(one) for one in counts]})
    if any(one.state == "failed" for one in counts):
        raise typer.Exit(1)


@contextmanager
def cameras_line(counts: Sequence[CameraCount]) -> Iterator[Callable[[str], None]]:
    """A line that says how the cameras are, where someone looks; events as lines of their own."""
    if not err.is_terminal:
        yield lambda line: err.print(line, markup=False)
        return
    done = threading.Event()
    with err.status("connecting") as live:

        def show() -> None:
            while not done.wait(0.5):
                lost = sum(one.state == "lost" for one in counts)
                sent, dropped = sum(c.sent for c in counts), sum(c.dropped for c in counts)
                live.update(
                    f"{len(counts)} cameras, {lost} lost, {sent} frames sent, {dropped} dropped"
                    "   (Ctrl-C ends)"
                )

        threading.Thread(target=show, daemon=True).start()
        try:
            yield lambda line: err.print(line, markup=False)
        finally:
            done.set()


@app.command()
def alerts(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    count: Annotated[
        int | None, typer.Option(min=0, max=500, help="How many of the past. Default: 20.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="All since the alert of this id, once each.")
    ] = None,
) -> None:
    """Print alerts, oldest first, one JSON object a line; each has its id.

    Who hands them on begins again with --follow --after and the last id handed on. Where alerts
    since then may be gone from Redis, a line on stderr says of which time.
    """
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    if after is not None and count is not None:
        raise ValueError("--after ID prints all since then: leave out --count")
    if after is not None and not STREAM_ID.fullmatch(after):
        raise ValueError(
            f"--after {after}: wanted the id of an alert, as printed (1764331200000-0)"
        )
    settings = load_settings()
    store, kept = ResultStore(settings), settings.stream.alerts_kept
    if after is None:
        wanted = 20 if count is None else count
        newest = store.latest_alerts(max(1, wanted))
        past: Iterable[StoredResult] = newest[:wanted][::-1]
        after = newest[0].id if newest else "0"
    else:
        past = () if follow else _alerts_since(store, after, kept)
    for stored in itertools.chain(past, _alerts_coming(store, after, kept) if follow else ()):
        print(json.dumps({"id": stored.id, **asdict(stored.result)}), flush=True)


def _alerts_since(store: ResultStore, last: str, kept: int) -> Iterator[StoredResult]:
    while found := store.alerts(last):
        _say_trimmed(store, last, found[0], kept)
        yield from found
        last = found[-1].id


def _alerts_coming(store: ResultStore, last: str, kept: int) -> Iterator[StoredResult]:
    """Alerts as they come, without end: a Redis that is away is waited for, and said once."""
    away = False
    while True:
        try:
            found = store.alerts(last, block_s=3.0)
            if found:
                _say_trimmed(store, last, found[0], kept)
            away = False
        except ServiceUnavailable as error:
            if not away:
                err.print(f"waiting: {error}", markup=False, highlight=False, soft_wrap=True)
            away, found = True, []
            time.sleep(AWAY_S)
        for stored in found:
            last = stored.id
            yield stored


def _say_trimmed(store: ResultStore, last: str, following: StoredResult, kept: int) -> None:
    """Where the alert `last` is not kept any more, nor need be those between it and the next one.

    How many there were nobody knows: Redis numbers its entries by time.
    """
    oldest = store.alerts("0", 1)
    asked_for_all = _parts(last) == (0, 0)
    if oldest and not asked_for_all and _parts(oldest[0].id) >= _parts(following.id):
        since, until = (
            f"{datetime.fromtimestamp(_parts(each)[0] / 1000):%Y-%m-%d %H:%M:%S}"
            for each in (last, following.id)
        )
        err.print(
            f"alerts may be missing between {last} ({since}) and {following.id} ({until}): Redis "
            f"keeps the last {kept} (stream.alerts_kept), and {last} is no longer among them",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _parts(id: str) -> tuple[int, int]:
    """Unix milliseconds, and a number within them."""
    ms, _, number = id.partition("-")
    return int(ms), int(number or 0)
