"""Refresh again and again: by the clock, or when normals arrive in S3.

What a look at S3 shows (the pointer, and the objects in incoming/ with their ETags) is the
watermark: as long as it is the same, there is nothing to do. A notification only says when to look
again, so nothing is missed where one is lost, late, or not to be had. Knows nothing of models.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from infra.errors import DpdlError
from infra.model_store import ModelStore
from infra.s3_events import listen
from infra.settings import Settings
from pipelines.dataset_index import Progress, incoming
from pipelines.refresh import RefreshOptions, RefreshReport, refresh_once

POLL_S = 15.0
"""Between looks where the store tells nothing; one look is three small requests."""
SAFETY_POLL_S = 300.0
"""Between looks where it tells: for notifications that were lost."""
QUIET_S = 2.0
"""Uploads come in bursts: a refresh waits until nothing more has come for so long."""
LONGEST_WAIT_S = 60.0
"""And no longer than this: under a steady inflow it goes with what is there."""
ALIVE_S = 3.0
"""MinIO gives a sign of life every half second."""
RETRY_S = (1.0, 300.0)
"""First and longest pause before the store is asked to tell again."""
_SLICE_S = 0.2

Report = Callable[[RefreshReport | DpdlError], None]


def refresh_every(
    settings: Settings,
    options: RefreshOptions,
    interval_s: float,
    report: Report,
    stop: threading.Event,
    progress: Progress | None = None,
) -> None:
    """Refresh every interval_s until `stop`; finding too few costs a few small requests.

    What may pass (a service away, a lost race for the pointer) is reported and tried again; any
    other error ends the loop.
    """
    while True:
        _attempt(lambda: report(refresh_once(settings, options, progress)), report)
        if stop.wait(interval_s):
            return


def refresh_on_arrival(
    settings: Settings,
    options: RefreshOptions,
    report: Report,
    stop: threading.Event,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    poll_s: float = POLL_S,
) -> None:
    """Refresh now, and again whenever the watermark has moved, until `stop`. Errors as above.

    Listens to MinIO's bucket notifications where they come in time, and looks every poll_s where
    the store has none or holds them back. `say` is told which of the two, when it changes.
    """
    ears = _Ears(settings, say)
    ears.start()
    done: _Watermark | None = None
    try:
        while not stop.is_set():

            def look() -> None:
                nonlocal done
                found = _settled(settings, options.model_name, stop)
                if found != done and not stop.is_set():
                    made = refresh_once(settings, options, progress)
                    promoted = made.to_version if made.decision == "promoted" else found[0]
                    done = (promoted, found[1])
                    report(made)

            ears.heard.clear()
            if _attempt(look, report):
                ears.wait(stop, poll_s)
            else:
                stop.wait(poll_s)
    finally:
        ears.end()


_Watermark = tuple[str | None, frozenset[tuple[str, str]]]


def _watermark(settings: Settings, model: str) -> _Watermark:
    store = ModelStore(settings)
    pointer = store.current(model)
    if pointer is None:
        return None, frozenset()
    dataset = store.manifest(model, pointer.version)["data"]["dataset"]
    return pointer.version, frozenset((o.key, o.etag) for o in incoming(settings, dataset))


def _settled(settings: Settings, model: str, stop: threading.Event) -> _Watermark:
    """The watermark, once it has stood still for QUIET_S or LONGEST_WAIT_S is over; right away if
    there is nothing."""
    until = time.monotonic() + LONGEST_WAIT_S
    found = _watermark(settings, model)
    while found[1] and time.monotonic() < until and not stop.wait(QUIET_S):
        before, found = found, _watermark(settings, model)
        if found == before:
            break
    return found


def _attempt(act: Callable[[], None], report: Report) -> bool:
    try:
        act()
        return True
    except DpdlError as error:
        if not error.retryable:
            raise
        report(error)
        return False


class _Ears(threading.Thread):
    """Listens for new objects, and tries again when the store breaks off or falls silent."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        super().__init__(name="s3-events", daemon=True)
        self._settings, self._say = settings, say
        self._end = threading.Event()
        self._last_sign = self._prompt_until = -math.inf
        self.heard = threading.Event()

    @property
    def prompt(self) -> bool:
        """Whether what arrives now would be told at once."""
        return time.monotonic() < self._prompt_until

    def run(self) -> None:
        pause = RETRY_S[0]
        while not self._end.is_set():
            try:
                supported = listen(
                    self._settings,
                    self._settings.s3.data_bucket,
                    suffix=".parquet",
                    stop=self._end,
                    alive=self._alive,
                    created=self._created,
                )
                if not supported:
                    self._say(f"looking for new normals every {POLL_S:.0f} s")
                    return
            except DpdlError as error:
                if not error.retryable:  # such as a key that may not listen
                    self._say(f"looking for new normals every {POLL_S:.0f} s: {error}")
                    return
                self._say(f"no notifications, looking every {POLL_S:.0f} s: {error}")
            pause = RETRY_S[0] if self.prompt else min(2 * pause, RETRY_S[1])
            self._last_sign = -math.inf
            self._end.wait(pause)

    def _alive(self) -> None:
        before, self._last_sign = self._last_sign, time.monotonic()
        if before == -math.inf:
            self.heard.set()  # what came before this moment was not told
        elif self._last_sign - before < ALIVE_S:  # not a heap that was held back
            if not self.prompt:
                self._say("told of new normals by the notifications of this S3")
            self._prompt_until = self._last_sign + ALIVE_S

    def _created(self, key: str) -> None:
        if "/incoming/" in key:
            self.heard.set()

    def wait(self, stop: threading.Event, poll_s: float) -> None:
        """Until something was heard, `stop`, or it is time to look."""
        started = time.monotonic()
        while not self.heard.is_set():
            waited = time.monotonic() - started
            if waited > (SAFETY_POLL_S if self.prompt else poll_s) or stop.wait(_SLICE_S):
                return

    def end(self) -> None:
        self._end.set()
        self.join(2.0)  # a server that hangs holds it for longer; it is a daemon
