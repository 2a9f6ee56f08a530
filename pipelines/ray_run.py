"""One Ray Train run, followed, and stopped when nobody follows it any more.

Knows Ray and the workers' progress board; nothing of data sets or versions. Used by train.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from infra.errors import DpdlError
from pipelines.dataset_index import Progress
from pipelines.train_worker import FAILED

POLL_S = 0.5
STOP_S = 20.0
START_S = 60.0


class Introduce(ControllerCallback):  # type: ignore[misc]
    """Lets the driver know the actor that runs the training, which it must be able to end.

    Ray Train takes callbacks of its own making only; this is the one hook that is called in that
    actor before any worker is started.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        handle = ray.get_runtime_context().current_actor
        self._board.set_controller.remote([handle])


class RayRun(threading.Thread):
    """trainer.fit() in a thread of its own. A context manager: leaving it ends the run.

    In the main thread Ray Train would put its own Ctrl-C handler in place and leave it there: it
    ends the process with exit code 0, also long after the training. Here Ctrl-C interrupts whoever
    follows, and on the way out the workers are ended: Ray would let them go on.
    """

    def __init__(self, trainer: TorchTrainer, board: Any) -> None:
        super().__init__(name="train", daemon=True)
        self._trainer, self._board = trainer, board
        self._result: Any = None
        self._error: Exception | None = None

    def __enter__(self) -> RayRun:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_alive():
            self._stop_workers()

    def run(self) -> None:
        try:
            self._result = self._trainer.fit()
        except Exception as error:
            self._error = error

    def follow(
        self, progress: Progress | None, hint: str
    ) -> list[tuple[str, float, dict[str, Any]]]:
        """Pass the workers' progress on until the run ends; all of it, in order.

        `hint` goes with the news that no worker has begun for START_S.

        Raises DpdlError when a worker says that it met an error which would come again.
        """
        seen: list[tuple[str, float, dict[str, Any]]] = []
        tell = progress or (lambda stage, fraction, figures: None)
        alive, silent_until = True, time.monotonic() + START_S
        while alive:
            self.join(POLL_S)
            alive = self.is_alive()
            for entry in ray.get(self._board.take.remote()):
                if entry[0] == FAILED:
                    raise DpdlError(f"training failed: {entry[2]['error']}")
                seen.append(entry)
                tell(*entry)
            if not seen and time.monotonic() > silent_until:
                silent_until = float("inf")
                because = f"none has begun for {START_S:.0f} s: {hint}"
                tell("waiting for workers", 0.0, {"because": because})
        return seen

    def result(self) -> Any:
        """Ray Train's result. DpdlError, in one line, where the workers failed for good."""
        if isinstance(self._error, ray.train.TrainingFailedError):
            raise DpdlError(f"training failed: {cause(self._error)}") from self._error
        if self._error is not None:
            raise self._error
        return self._result

    def _stop_workers(self) -> None:
        deadline = time.monotonic() + STOP_S
        controller = ray.get(self._board.controller.remote(), timeout=STOP_S)
        while controller is None and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
            controller = ray.get(self._board.controller.remote(), timeout=STOP_S)
        if controller is None:
            return
        # It ends its workers and then itself, which shows as an error of the actor.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(controller.abort.remote(), timeout=STOP_S)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(controller)
        self.join(max(1.0, deadline - time.monotonic()))


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


def cluster_total(resource: str) -> float:
    """How much of a resource the Ray cluster has, used or not."""
    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return float(found.get(resource, 0.0))


def cluster_free(resource: str) -> float:
    """How much of it nobody holds at the moment."""
    found = ray.available_resources()  # type: ignore[no-untyped-call]
    return float(found.get(resource, 0.0))
