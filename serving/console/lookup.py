"""Pages of what the stream left in Redis, by camera and time. Knows no HTTP."""

from __future__ import annotations

import time

from infra.redis_client import ResultStore, StoredResult

SEARCH_S = 2.0
"""So long a request looks through all alerts for those of one camera; the page says where to go on.
In a noisy plant a quiet one's lie far back. Grafana waits 10 s."""
SCAN_PAGE = 2_000
MAX_TIMELINE = 20_000
TIMELINE_PAGE = 2_000

Page = tuple[list[StoredResult], str | None, str | None]
"""Found, newest first; where it goes on; the newest id looked at."""


def of(stored: StoredResult, camera: str) -> bool:
    return not camera or stored.result.camera == camera


def alerts_back(
    results: ResultStore,
    count: int,
    before: str,
    camera: str,
    from_ms: int | None,
    to_ms: int | None,
) -> Page:
    """A page of alerts back in time; with a camera it may hold fewer than count, or none yet."""
    found: list[StoredResult] = []
    newest = None
    size = SCAN_PAGE if camera else count
    until_s = time.monotonic() + SEARCH_S
    while len(found) < count and (newest is None or time.monotonic() < until_s):
        page = results.latest_alerts(size, before or None, from_ms=from_ms, to_ms=to_ms)
        newest = newest or (page[0].id if page else None)
        for each in page:
            before = each.id
            if of(each, camera):
                found.append(each)
                if len(found) == count:
                    break
        if len(page) < size and len(found) < count:
            return found, None, newest
    return found, before, newest


def last_hours(results: ResultStore, camera: str, hours: float) -> tuple[list[StoredResult], bool]:
    """Results of a camera, newest first, and whether all of that time is among them."""
    from_ms = max(0, int((time.time() - 3600 * hours) * 1000))
    rows: list[StoredResult] = []
    state = results.camera(camera)
    while len(rows) < MAX_TIMELINE:
        before = rows[-1].id if rows else None
        page = results.scores(camera, TIMELINE_PAGE, before, from_ms=from_ms)
        rows += page
        if len(page) < TIMELINE_PAGE:
            # Nothing of that time was trimmed if what lies before it is still there, or all is.
            reaches_back = bool(rows and results.scores(camera, 1, rows[-1].id))
            return rows, reaches_back or len(rows) >= (state.frames if state else 0)
    return rows, False
