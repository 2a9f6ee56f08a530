"""The model version in use: fetched, verified, tried, and only then put in place of the old one.

Knows the model store and dpdl_core, no Ray. A version is refused when the store finds it altered
or incomplete (hash), when dpdl_core does not take it (shapes, NaN weights, a newer format), or
when it does not give finite scores on a trial batch. Then the old one goes on, and the refusal
is kept for people to see. A refused version is not tried again until the pointer moves to it anew;
one that failed for what may pass, such as a device out of memory or a key that S3 refused, is tried
again after a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dpdl_core.artifact import METRICS, ArtifactError, LoadedVersion, unpack
from dpdl_core.drift import Drift
from infra.errors import DataError, DpdlError, VersionBroken

log = logging.getLogger("dpdl.score")

FIRST_RETRY_S, LAST_RETRY_S = 10.0, 600.0
"""Until a version is tried again whose fetch or trial failed for no fault that is known to be its
own; each wait is twice the one before."""


class Pointer(Protocol):
    @property
    def version(self) -> str: ...
    @property
    def previous(self) -> str | None: ...


class Store(Protocol):
    """The part of infra.model_store.ModelStore that is read here."""

    def current(self, name: str) -> Pointer | None: ...
    def fetch(self, name: str, version: str) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True)
class InUse:
    """One verified version on its device. Immutable: a batch holds one from start to end."""

    version: str
    loaded: LoadedVersion
    since_s: float
    """time.time() when it was put in use."""
    drift: Drift
    """Of the frames that it scored here."""

    @property
    def image_size(self) -> int:
        return int(self.loaded.model.config.image_size)

    def threshold(self, camera: str) -> float:
        """As calibrated for this camera, else the version's default."""
        thresholds: Mapping[str, Any] = self.loaded.thresholds
        return float(thresholds.get("cameras", {}).get(camera, thresholds["default"]))


class Versions:
    """Follows one model's pointer. `refresh` from one thread; `in_use` from any.

    Args:
        trial_batch: images in the trial that a version must pass before it is used; it also
            warms the device up at that size.
    """

    def __init__(self, store: Store, name: str, *, device: str, trial_batch: int) -> None:
        self._store, self.name = store, name
        self._device, self._trial_batch = device, trial_batch
        self._in_use: InUse | None = None
        self.refused: dict[str, str] = {}
        """Version -> why it is not used. Bounded: the last ten."""
        self.refused_now: str | None = None
        """The version that the pointer names, where that is refused."""
        self._pointed: str | None = None
        self._waits: dict[str, tuple[float, float]] = {}
        """Refused version -> when to try it again (time.monotonic()), and after how long."""

    @property
    def in_use(self) -> InUse:
        assert self._in_use is not None, "start() comes first"
        return self._in_use

    def start(self) -> None:
        """Loads the current version, or the one before it when that is broken.

        A second start tries no version again that was refused for good. DataError when there is
        none or neither can be used; ServiceUnavailable passes through.
        """
        pointer = self._pointer()
        if pointer is None:
            raise DataError(
                f"model {self.name!r} has no current version: train one (dpdl train) or promote "
                "one (dpdl models promote)"
            )
        for version in (pointer.version, pointer.previous):
            if version and self._due(version) and self._try(version):
                self.refused_now = None if version == pointer.version else pointer.version
                return
        raise DataError(
            f"model {self.name!r}: no usable version: "
            + "; ".join(f"{version}: {why}" for version, why in self.refused.items())
        )

    def refresh(self) -> bool:
        """Looks at the pointer once; True when another version is in use afterwards.

        The change is one assignment: a batch that runs keeps the version it began with.
        """
        pointer = self._pointer()
        if pointer is None or pointer.version == self.in_use.version:
            self.refused_now = None
            return False
        changed = self._due(pointer.version) and self._try(pointer.version)
        self.refused_now = None if changed else pointer.version
        return changed

    def _pointer(self) -> Pointer | None:
        """A version that it moves to is tried, whatever became of it before."""
        pointer = self._store.current(self.name)
        if pointer is not None and pointer.version != self._pointed:
            self._pointed = pointer.version
            self._forget(pointer.version)
        return pointer

    def _due(self, version: str) -> bool:
        at_s, _ = self._waits.get(version, (float("inf"), 0.0))
        return version not in self.refused or time.monotonic() >= at_s

    def _forget(self, version: str) -> None:
        self.refused.pop(version, None)
        self._waits.pop(version, None)

    def _try(self, version: str) -> bool:
        began = time.perf_counter()
        try:
            held = verified(
                self._store,
                self.name,
                version,
                device=self._device,
                trial_batch=self._trial_batch,
            )
        except (ArtifactError, DpdlError, KeyError, RuntimeError) as why:
            if isinstance(why, DpdlError) and why.retryable:
                raise
            self._refuse(version, why)
            kept = f"{self._in_use.version} goes on" if self._in_use else "none is in use yet"
            log.error("version %s refused: %s; %s", version, self.refused[version], kept)
            return False
        self._in_use = held
        self._forget(version)
        log.info("version %s in use after %.1f s", version, time.perf_counter() - began)
        return True

    def _refuse(self, version: str, why: Exception) -> None:
        said = " ".join(str(why).split())[:500] or type(why).__name__
        if not isinstance(why, (ArtifactError, VersionBroken, KeyError)):
            # torch's RuntimeError, of the device as well as of shapes; a key that S3 refuses.
            _, waited_s = self._waits.get(version, (0.0, FIRST_RETRY_S / 2))
            wait_s = min(2 * waited_s, LAST_RETRY_S)
            self._waits[version] = (time.monotonic() + wait_s, wait_s)
            said += f" (tried again after {wait_s:.0f} s)"
        self.refused[version] = said
        while len(self.refused) > 10:
            self._forget(next(iter(self.refused)))


def verified(store: Store, name: str, version: str, *, device: str, trial_batch: int) -> InUse:
    """A version on its device, after its trial.

    Errors: ArtifactError, KeyError, RuntimeError (it cannot be used), the store's DpdlError.
    """
    loaded = unpack(store.fetch(name, version), device=device)
    _trial(loaded, device, trial_batch)
    return InUse(version, loaded, time.time(), Drift(loaded.metrics.get("drift")))


def _trial(loaded: LoadedVersion, device: str, trial_batch: int) -> None:
    size = int(loaded.model.config.image_size)
    float(loaded.thresholds["default"])
    grey = torch.full((trial_batch, size, size, 3), 127, dtype=torch.uint8)
    scores = loaded.model.score(grey.to(device))
    try:
        winners = scores.winners.cpu().numpy()
        drift = Drift(loaded.metrics.get("drift"))
        drift.add([""] * trial_batch, scores.energy.cpu().numpy(), winners)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{METRICS}: its drift reference does not fit: {error}") from error
    if not (torch.isfinite(scores.score).all() and torch.isfinite(scores.energy).all()):
        raise ArtifactError("its scores on a grey image are not finite")
