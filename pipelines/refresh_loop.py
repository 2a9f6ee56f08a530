"""Refresh again and again: by the clock, or when normals arrive in S3.

What a look at S3 shows (the pointer, and the objects in incoming/ and anomalies/ with their ETags)
is the watermark: as long as it is the same, there is nothing to do. A notification only says when
to look again, so nothing is missed where one is lost, late, or not to be had. Knows nothing of
models.

Guarantee: nothing but `stop` and an error of settings ends a loop. What a person must put right (a
data set imported anew, a refused key) is reported, and looked at again after growing pauses.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from infra import looks
from infra.answers import ANOMALIES, INCOMING
from infra.errors import DpdlError, SettingsError
from infra.looks import Look
from infra.model_store import ModelStore
from infra.s3_events import listen
from infra.settings import Settings
from pipelines.dataset_index import Progress, incoming, list_objects
from pipelines.refresh import RefreshOptions, RefreshReport, refresh_once

log = logging.getLogger("dpdl.refresh")

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
LONGEST_PAUSE_S = 900.0
"""Between two looks that end in the same error, which a person has to put right."""
RETRY_S = (1.0, 300.0)
"""First and longest pause before the store is asked to tell again."""
ALIVE_EVERY_S = 60.0
"""How often the watch is told at most that the loop lives."""
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

    Errors are reported, and the next look comes after interval_s or the longer pause. Raises
    SettingsError.
    """
    attempts, alive = _Attempts(report), _Alive(settings, options.model_name)

    def look() -> None:
        report(refresh_once(settings, options, progress))
        alive.say(interval_s)

    while True:
        attempts.make(look)
        if stop.wait(attempts.pause_s(interval_s)):
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
    ears, attempts = _Ears(settings, say), _Attempts(report)
    alive = _Alive(settings, options.model_name)
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
                alive.say(max(SAFETY_POLL_S, poll_s))

            ears.heard.clear()
            if attempts.make(look):
                ears.wait(stop, poll_s)
            else:
                stop.wait(attempts.pause_s(poll_s))
    finally:
        ears.end()


_Watermark = tuple[str | None, frozenset[tuple[str, str]]]


def _watermark(settings: Settings, model: str) -> _Watermark:
    store = ModelStore(settings)
    pointer = store.current(model)
    if pointer is None:
        return None, frozenset()
    dataset = store.manifest(model, pointer.version)["data"]["dataset"]
    found = incoming(settings, dataset) + list_objects(settings, f"{dataset}/{ANOMALIES}/")
    return pointer.version, frozenset((o.key, o.etag) for o in found)


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


class _Alive:
    """Tells the watch that the loop lives, with looks that worked."""

    def __init__(self, settings: Settings, model: str) -> None:
        self._settings, self._model, self._said_s = settings, model, -math.inf

    def say(self, next_in_s: float) -> None:
        if time.monotonic() - self._said_s > ALIVE_EVERY_S:
            looks.record(self._settings, self._model, Look(time.time() + next_in_s))
            self._said_s = time.monotonic()


class _Attempts:
    """Makes attempts and reports how they fail; knows how often one failure came in a row."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._failure, self._repeats = "", 0

    def make(self, act: Callable[[], None]) -> bool:
        """Whether it succeeded. Raises SettingsError."""
        try:
            act()
        except SettingsError:
            raise
        except DpdlError as error:
            self._failed("" if error.retryable else str(error))
            self._report(error)
            return False
        except Exception as error:  # such as memory that did not suffice
            log.exception("a refresh failed")
            known = DpdlError(f"{type(error).__name__}: {error}")
            self._failed(str(known))
            self._report(known)
            return False
        self._failed("")
        return True

    def pause_s(self, usual_s: float) -> float:
        """Before the next attempt; doubled each time that the same failure came again."""
        return min(usual_s * 2.0**self._repeats, max(usual_s, LONGEST_PAUSE_S))

    def _failed(self, why: str) -> None:
        self._repeats = min(self._repeats + 1, 20) if why and why == self._failure else 0
        self._failure = why


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
        if f"/{INCOMING}/" in key or f"/{ANOMALIES}/" in key:
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
