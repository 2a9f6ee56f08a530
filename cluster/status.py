"""`dpdl status`: services, lag, versions, cameras. Each part that cannot be asked says so itself.

What the stream is asked over HTTP (the console's API) is what no store knows: refused versions and
what it is retrying just now.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.stack import show_services
from infra.errors import AuthFailed, DpdlError, ServiceUnavailable
from infra.kafka_client import (
    behind,
    bounds_of,
    kafka_errors,
    make_consumer,
    partitions_of,
    topic_id,
)
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.settings import Settings

ASK_S = 8.0
"""The console waits 5 s for a replica that hangs (serving/console/api.py), then says so."""
SHOWN_CAMERAS = 50


def show_status(settings: Settings, model: str, console: Console) -> dict[str, Any]:
    """Print everything; returns it as JSON takes it. `healthy` is about the services alone."""
    services = show_services(settings, console)
    parts: dict[str, Any] = {
        "services": [asdict(one) for one in services],
        "healthy": all(one.healthy for one in services),
    }
    for name, ask, show in (
        ("stream", lambda: _stream(settings), _show_stream),
        ("lag", lambda: _lag(settings), _show_lag),
        ("versions", lambda: _versions(settings, model), _show_versions),
        ("cameras", lambda: _cameras(settings), _show_cameras),
    ):
        console.print()
        parts[name] = _part(name, ask, show, console)
    return parts


def _part(
    name: str, ask: Callable[[], Any], show: Callable[[Any, Console], None], console: Console
) -> Any:
    try:
        found = ask()
    except DpdlError as error:
        console.print(f"{name}: {error}", style="red", markup=False, highlight=False)
        return {"error": str(error)}
    show(found, console)
    return found


def _stream(settings: Settings) -> dict[str, Any]:
    """What the running application says of itself; {} where none runs.

    Errors: AuthFailed; ServiceUnavailable where something is there and gives no answer.
    """
    request = urllib.request.Request(f"{settings.serve.url}api/v1/status")
    if settings.serve.token is not None:
        request.add_header("Authorization", f"Bearer {settings.serve.token.get_secret_value()}")
    # Past http_proxy, which holds for loopback too: the token is for nobody in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ASK_S) as answer:
            found = json.loads(answer.read(2**20))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise AuthFailed(
                f"running at {settings.serve.url}, and refuses our serve.token ({error.code}): set "
                "DPDL_SERVE_TOKEN_FILE to what the stream was started with"
            ) from None
        said = " ".join(error.read(200).decode("utf-8", "replace").split())
        raise ServiceUnavailable(
            f"running at {settings.serve.url}, answers {error.code}: {said or error.reason}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            return {}
        raise ServiceUnavailable(
            f"no answer from {settings.serve.url} in {ASK_S:.0f} s ({reason}): see the log of "
            "`dpdl serve`, and serve.http_host and http_port"
        ) from None
    return found if isinstance(found, dict) else {}


def _show_stream(found: dict[str, Any], console: Console) -> None:
    if not found:
        console.print("stream: not running; `dpdl serve` starts it", style="yellow")
        return
    console.print("stream: running")
    for part, said in sorted(found.items()):
        for name, value in sorted(said.items()) if isinstance(said, dict) else ():
            if name in ("trouble", "refused") and value:
                console.print(f"  {part} {name}: {value}", style="yellow", markup=False)


def _lag(settings: Settings) -> list[dict[str, int | None]]:
    """end and lag: None for a partition that has no leader."""
    kafka, store = settings.kafka, ResultStore(settings)
    try:
        with closing(make_consumer(settings)) as consumer, kafka_errors(kafka):
            this, places = topic_id(consumer, kafka.topic), partitions_of(consumer, kafka.topic)
            # Before Kafka's end: what is published between the two is not beyond it then.
            numbers = [place.partition for place in places]
            stored = store.next_offsets(kafka.group, kafka.topic, this, numbers)
            bounds = bounds_of(consumer, places)
        found: list[dict[str, int | None]] = []
        for partition, next_offset in stored.items():
            if partition not in bounds:
                found.append(
                    {"partition": partition, "next": next_offset, "end": None, "lag": None}
                )
                continue
            begin, end = bounds[partition]
            lag = behind(begin, end, next_offset)
            found.append({"partition": partition, "next": end - lag, "end": end, "lag": lag})
        return found
    finally:
        store.close()


def _show_lag(found: list[dict[str, int | None]], console: Console) -> None:
    total = sum(one["lag"] or 0 for one in found)
    lags = [(one["partition"], "no leader" if one["lag"] is None else one["lag"]) for one in found]
    each = ", ".join(f"{partition}: {lag}" for partition, lag in lags)
    console.print(f"lag: {total} frames ({each})", highlight=False)


def _versions(settings: Settings, model: str) -> dict[str, Any]:
    pointer = ModelStore(settings).current(model)
    if pointer is None:
        return {"model": model, "current": None}
    return {
        "model": model,
        "current": pointer.version,
        "since": pointer.promoted_at,
        "by": pointer.by,
        "why": pointer.why,
    }


def _show_versions(found: dict[str, Any], console: Console) -> None:
    if found["current"] is None:
        console.print(f"model {found['model']}: no version yet; `dpdl train` makes one")
        return
    console.print(
        f"model {found['model']}: {found['current']} since {found['since']} by {found['by']}: "
        f"{found['why']}",
        markup=False,
        highlight=False,
    )


def _cameras(settings: Settings) -> list[dict[str, Any]]:
    store = ResultStore(settings)
    try:
        known = store.cameras()
    finally:
        store.close()
    now = time.time()
    found = [
        {
            "camera": one.camera,
            "seen_s_ago": _ago(one.last_scored_at_ns, now),
            "silent": one.is_silent(now),
            "frames": one.frames,
            "frames_per_s": one.frames_per_s,
            "alerts": one.alerts,
            "alert_share": one.alert_share,
            "version": one.version,
        }
        for one in known
    ]
    # Only the first are shown: who needs a person comes first, then as the store has them.
    return sorted(found, key=lambda one: not one["silent"])


def _ago(at_ns: int | None, now: float) -> float | None:
    return None if at_ns is None else round(now - at_ns / 1e9, 1)


def _show_cameras(found: list[dict[str, Any]], console: Console) -> None:
    if not found:
        console.print("cameras: none seen yet; `dpdl stream` brings one in")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("camera", "last frame", "frames/s", "frames", "alerts", "version"):
        table.add_column(column, justify="left" if column in ("camera", "version") else "right")
    for one in found[:SHOWN_CAMERAS]:
        ago, rate = one["seen_s_ago"], one["frames_per_s"]
        seen = "never" if ago is None else f"{ago:.0f} s ago"
        table.add_row(
            escape(one["camera"]),
            f"[red]{seen}, silent[/]" if one["silent"] else seen,
            "" if rate is None else f"{rate:.1f}",
            str(one["frames"]),
            str(one["alerts"]),
            escape(one["version"] or ""),
        )
    console.print(table)
    if len(found) > SHOWN_CAMERAS:
        console.print(f"and {len(found) - SHOWN_CAMERAS} more: `dpdl camera list`")
