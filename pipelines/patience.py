"""Wait for a service that is away, where minutes of work would be lost by giving up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import ServiceUnavailable

T = TypeVar("T")

FIRST_WAIT_S = 1.0
LAST_WAIT_S = 30.0


def patiently(
    call: Callable[[], T],
    *,
    deadline_s: float,
    waiting: Callable[[ServiceUnavailable], None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """call() again with growing pauses while it raises ServiceUnavailable.

    `waiting` is told of each failure. The last one is raised once deadline_s would be passed.
    Only for calls that may be repeated without harm.
    """
    until = time.monotonic() + deadline_s
    pause = FIRST_WAIT_S
    while True:
        try:
            return call()
        except ServiceUnavailable as error:
            if time.monotonic() + pause > until:
                raise
            waiting(error)
        sleep(pause)
        pause = min(2 * pause, LAST_WAIT_S)
