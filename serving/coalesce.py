"""One thread before the device: the calls of several consumers, put together where that is faster.

Knows no Ray and no model. Nothing waits for company: what queued up while the device was busy goes
in one call, so latency only falls. A call holds frames for one model, of one size; the rest keeps
its order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from serving.batch import Scored, WrongSize

Answer = Scored | WrongSize
Run = Callable[[NDArray[np.uint8], Sequence[str], str], Answer]
"""(B,S,S,3) images, their B cameras and the model that is wanted -> one answer by one version."""


@dataclass(slots=True)
class _Call:
    images: NDArray[np.uint8]
    cameras: Sequence[str]
    model: str
    answer: Future[Answer] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[object, ...]:
        return self.model, self.images.shape[1:]


class Coalescer:
    """Runs calls one at a time, in its own thread.

    Args:
        max_frames: calls are put together up to so many frames; 0: never.
    """

    def __init__(self, run: Run, *, max_frames: int) -> None:
        self._run, self._max_frames = run, max_frames
        self._waiting: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(
        self, images: NDArray[np.uint8], cameras: Sequence[str], model: str
    ) -> Future[Answer]:
        """(B,S,S,3) uint8 RGB. The answer is of these frames alone."""
        call = _Call(images, cameras, model)
        with self._changed:
            self._waiting.append(call)
            self._changed.notify()
        return call.answer

    def close(self) -> None:
        """What waits is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while calls := self._next():
            try:
                answer = self._run(*_together(calls))
                parts = _apart(answer, [len(call.cameras) for call in calls])
            except Exception as error:
                for call in calls:
                    call.answer.set_exception(error)
            else:
                for call, part in zip(calls, parts, strict=True):
                    call.answer.set_result(part)

    def _next(self) -> list[_Call]:
        """The oldest call and those that fit with it; empty: closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                if chosen := self._chosen():
                    return chosen

    def _chosen(self) -> list[_Call]:
        chosen: list[_Call] = []
        left: deque[_Call] = deque()
        frames = 0
        for call in self._waiting:
            size = len(call.cameras)
            alike = not chosen or call.kind == chosen[0].kind
            if not alike or (chosen and frames + size > self._max_frames):
                left.append(call)
            elif call.answer.set_running_or_notify_cancel():  # else its caller has given up
                chosen.append(call)
                frames += size
        self._waiting = left
        return chosen


def _together(calls: list[_Call]) -> tuple[NDArray[np.uint8], list[str], str]:
    images = calls[0].images
    if len(calls) > 1:
        images = np.concatenate([call.images for call in calls])
    return images, [camera for call in calls for camera in call.cameras], calls[0].model


def _apart(answer: Answer, sizes: list[int]) -> list[Answer]:
    """A joint answer's rows, given back to the calls that they came from."""
    if isinstance(answer, WrongSize):
        return [answer for _ in sizes]
    parts: list[Answer] = []
    at = 0
    for size in sizes:
        rows = slice(at, at + size)
        parts.append(
            replace(
                answer,
                score=answer.score[rows],
                energy=answer.energy[rows],
                threshold=answer.threshold[rows],
                maps={row - at: heat for row, heat in answer.maps.items() if at <= row < at + size},
            )
        )
        at += size
    return parts
