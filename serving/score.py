"""Scorer deployment: batches of images > scores, by the current version of the model they want.

One call is one batch, scored as a whole by one version: a change of version falls between two
batches. One thread drives the device; several consumers' batches queue up before it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from infra.cameras import SILENT_S, ThresholdOverride
from infra.cores import num_cores
from infra.errors import DpdlError
from infra.metrics import GAUGES_S, ReplicaMetrics, ScorerMetrics
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.settings import load_settings
from serving.batch import DEFAULT_MODEL, Scored, WrongSize
from serving.coalesce import Coalescer
from serving.models import Models
from serving.versions import InUse

log = logging.getLogger("dpdl.score")

LOOK_S = 1.0
"""How often the pointer and the threshold overrides are looked at."""
MAX_CPU_THREADS = 8
CPU_FRAMES = 32
"""For each thread of a CPU at a time: more gain nothing and take memory (docs/serving.md)."""
COALESCED_BATCHES = 4
"""Full batches of several consumers that one call of a GPU takes. A CPU gains
nothing from more than CPU_FRAMES, so there calls stay apart, and alerts are out earlier."""
MAX_CAMERAS = 20_000
MAX_FAILURES, FAILING_S = 5, 30.0
"""A scorer whose device failed so often in a row, and for so long, is replaced."""
STUCK_S = 300.0
"""And one that is at a single batch for so long: a card that has hung, say, never answers."""


def cpu_threads() -> int:
    """Of torch, in a scorer on the CPU: decoding needs a core too, and beyond a few there is no
    gain for small batches."""
    return max(1, min(MAX_CPU_THREADS, num_cores() - 1))


def score_batch(
    held: InUse,
    model_name: str,
    images: NDArray[np.uint8],
    cameras: Sequence[str],
    overrides: Mapping[str, float],
    device: str,
) -> Scored | WrongSize:
    """(B,S,S,3) uint8 RGB -> one answer by one version; heat maps only of anomalies.

    Threshold of a camera: a person's override for this model, else the version's own for it, else
    its default.
    """
    if images.shape[1:] != (held.image_size, held.image_size, 3):
        return WrongSize(held.image_size)
    num, step = len(images), len(images)
    if device == "cpu":
        step = CPU_FRAMES * torch.get_num_threads()
    score, energy = np.empty(num, np.float32), np.empty(num, np.float32)
    threshold = np.array([overrides.get(c, held.threshold(c)) for c in cameras], np.float32)
    heat: dict[int, NDArray[np.float32]] = {}
    for at in range(0, num, step):
        rows = slice(at, at + step)
        # torch.tensor copies: what comes from Ray's object store is read-only.
        scores = held.loaded.model.score(torch.tensor(images[rows], device=device))
        score[rows] = scores.score.float().cpu().numpy()
        energy[rows] = scores.energy.float().cpu().numpy()
        held.drift.add(cameras[rows], energy[rows], scores.winners.cpu().numpy())
        hot = np.flatnonzero(score[rows] > threshold[rows])
        maps = scores.maps[torch.as_tensor(hot, device=scores.maps.device)].float().cpu().numpy()
        heat |= {at + int(row): each for row, each in zip(hot, maps, strict=True)}
    return Scored(
        model=model_name,
        version=held.version,
        image_size=held.image_size,
        score=score,
        energy=energy,
        threshold=threshold,
        maps=heat,
    )


class Overrides:
    """Persons' thresholds by camera, read again every LOOK_S; a new camera's at first sight."""

    def __init__(self, results: ResultStore, default_model: str) -> None:
        self._results, self._default_model = results, default_model
        self._known: dict[str, ThresholdOverride | None] = {}

    def of(self, cameras: Sequence[str], model: str) -> dict[str, float]:
        """Of these cameras, those that have one for the model that scores them now.

        ServiceUnavailable: a new one, Redis away.
        """
        known = self._known
        new = [camera for camera in cameras if camera not in known]
        if new:
            known.update(self._read(new))
        found = {camera: known[camera] for camera in cameras}
        return {
            camera: one.threshold
            for camera, one in found.items()
            if one and (one.model or self._default_model) == model
        }

    def refresh(self) -> None:
        # Camera ids come from outside: beyond a bound all are forgotten and read again as they
        # come. One assignment, since batches read meanwhile.
        names = list(self._known)
        self._known = self._read(names) if len(names) <= MAX_CAMERAS else {}

    def _read(self, cameras: Sequence[str]) -> dict[str, ThresholdOverride | None]:
        found = self._results.thresholds(cameras)
        return {camera: found.get(camera) for camera in cameras}


class DeviceHealth:
    """Whether the device still scores. Its failures are torch's RuntimeErrors, as after a lost
    card; those of what was asked (sizes, thresholds, stores) say nothing of it."""

    def __init__(self) -> None:
        self._failures, self._since_s, self._why = 0, 0.0, ""
        self._began_s: float | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._began_s = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._since_s = self._since_s if self._failures else time.monotonic()
            self._failures += 1
            self._why = " ".join(str(error).split())[:300]
            raise
        finally:
            self._began_s = None
        self._failures = 0

    def check(self) -> None:
        """RuntimeError when all calls have failed for a while, or one has no end."""
        began_s = self._began_s  # the calls are another thread's
        busy_s = time.monotonic() - began_s if began_s is not None else 0.0
        if busy_s > STUCK_S:
            raise RuntimeError(f"the device has been at one batch for {busy_s:.0f} s")
        failing_s = time.monotonic() - self._since_s
        if self._failures >= MAX_FAILURES and failing_s > FAILING_S:
            raise RuntimeError(
                f"the device has failed {self._failures} times in a row, for {failing_s:.0f} s: "
                f"{self._why}"
            )


class Scorer:
    """The deployment's class; ready means: a version is loaded, verified and warm.

    Args:
        model_name: the default model; others are loaded when cameras are bound to them.
        device: "cpu", "cuda" or "" for a GPU where there is one.
    """

    def __init__(self, model_name: str, device: str = "") -> None:
        settings = load_settings()
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = self._device == "cpu"
        if on_cpu:
            torch.set_num_threads(cpu_threads())
        max_batch = settings.stream.max_batch
        coalesced = 0 if on_cpu else COALESCED_BATCHES * max_batch
        self._overrides = Overrides(ResultStore(settings), model_name)
        self._models = Models(
            ModelStore(settings),
            model_name,
            device=self._device,
            trial_batch=1 if on_cpu else coalesced,
            max_models=settings.stream.max_models,
        )
        self._models.default.start()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._calls = Coalescer(self._score, max_frames=coalesced)
        self._metrics = ScorerMetrics()
        self._replica = ReplicaMetrics("scorer", serve.get_replica_context().rank.rank)
        self._device_health = DeviceHealth()
        self._closing = threading.Event()
        self._watches = self._follow_all(
            [
                ("versions", self._models.refresh, LOOK_S),
                ("thresholds", self._overrides.refresh, LOOK_S),
                ("metrics", self._measure, GAUGES_S),
            ]
        )

    async def score(
        self, images: NDArray[np.uint8], cameras: Sequence[str], model: str = DEFAULT_MODEL
    ) -> Scored | WrongSize:
        """One batch, (B,S,S,3) uint8 RGB, that wants this model; see score_batch and Models."""
        if not self._models.known(model):
            # The device goes on with other models' frames meanwhile.
            await asyncio.get_running_loop().run_in_executor(self._loader, self._models.need, model)
        return await asyncio.wrap_future(self._calls.submit(images, cameras, model))

    async def info(self) -> dict[str, Any]:
        """Of the default model: model, version, image_size, since, threshold, refused. Of all:
        models (name -> version) and trouble (name -> why the default one scores instead). Of the
        replica: device, pid."""
        default = self._models.default
        held = default.in_use
        return {
            "model": default.name,
            "version": held.version,
            "image_size": held.image_size,
            "device": self._device,
            "pid": os.getpid(),
            "since_s": held.since_s,
            "threshold": float(held.loaded.thresholds["default"]),
            "refused": dict(default.refused),
            "models": {each.name: each.in_use.version for each in self._models.in_use()},
            "trouble": dict(self._models.trouble),
        }

    def check_health(self) -> None:
        """RuntimeError (the replica is replaced): a thread of it has died, or the device fails."""
        for watch in self._watches:
            if not watch.is_alive():
                raise RuntimeError(f"the thread {watch.name} has died")
        if not self._calls.is_alive():
            raise RuntimeError("the thread before the device has died")
        self._device_health.check()

    def __del__(self) -> None:
        if closing := getattr(self, "_closing", None):
            closing.set()
            self._calls.close()

    def _score(
        self, images: NDArray[np.uint8], cameras: Sequence[str], model: str
    ) -> Scored | WrongSize:
        name, held = self._models.of(model)  # read once per batch
        overrides = self._overrides.of(cameras, name)
        with self._device_health.watched(), torch.inference_mode():
            return score_batch(held, name, images, cameras, overrides, self._device)

    def _follow_all(
        self, looks: Sequence[tuple[str, Callable[[], None], float]]
    ) -> list[threading.Thread]:
        """A thread for each: while S3 is away, thresholds are still followed and metrics shown."""
        threads = [
            threading.Thread(target=self._follow, args=look, name=f"watch {look[0]}", daemon=True)
            for look in looks
        ]
        for thread in threads:
            thread.start()
        return threads

    def _follow(self, what: str, look: Callable[[], None], every_s: float) -> None:
        failing = ""
        while not self._closing.wait(every_s):
            try:
                look()
                failing = ""
            except DpdlError as error:  # S3 or Redis away: what is in use goes on
                if str(error) != failing:
                    log.warning("cannot look for %s: %s", what, error)
                failing = str(error)
            except Exception:
                # Nothing that a stored version or a camera's name holds may end this thread.
                log.exception("looking for %s", what)

    def _measure(self) -> None:
        self._replica.alive()
        for each in self._models.in_use():
            self._metrics.versions(each.name, each.in_use.version, each.refused_now)
            self._metrics.drift(each.name, each.in_use.drift.psi(SILENT_S))
        self._metrics.replaced(list(self._models.trouble))
