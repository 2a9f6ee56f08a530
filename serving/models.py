"""The models of one scorer: the default one, and those that persons bound cameras to.

Knows the model store through versions.py, no Ray. A bound model is loaded when its first frame
comes, and its pointer is followed from then on. A plant does not go blind for a binding: while a
bound model does not exist, has no usable version, cannot be fetched or finds no room, the default
one scores in its place, `trouble` says why, and it is tried again at every look. What is in use
stays in use through any such failure.
"""

from __future__ import annotations

import logging
import threading
import time

from infra.errors import DpdlError
from serving.batch import DEFAULT_MODEL
from serving.versions import InUse, Store, Versions

log = logging.getLogger("dpdl.score")

IDLE_S = 60.0
"""A model that nobody asked for so long makes room for another; its trouble is forgotten."""


class Models:
    """`need` and `refresh` load, from any thread, one at a time; `of` never waits.

    Args:
        max_models: held at a time, the default one included; bounds the device's memory.
        trial_batch: see Versions.
    """

    def __init__(
        self, store: Store, default: str, *, device: str, trial_batch: int, max_models: int
    ) -> None:
        self._store, self._device = store, device
        self._trial_batch, self._max_models = trial_batch, max_models
        self.default = self._versions(default)
        self._bound: dict[str, Versions] = {}
        self._failed: dict[str, Versions] = {}
        self._asked_s: dict[str, float] = {}
        self._loading = threading.Lock()
        self.trouble: dict[str, str] = {}
        """Model -> why the default one scores in its place."""

    def of(self, name: str) -> tuple[str, InUse]:
        """What scores frames that want this model, and its name. Read once per batch."""
        self._asked_s[name] = time.monotonic()
        versions = self._bound.get(name, self.default)
        return versions.name, versions.in_use

    def known(self, name: str) -> bool:
        """Whether `need` has nothing to do: in use, or known to be in trouble."""
        ours = (DEFAULT_MODEL, self.default.name)
        return name in ours or name in self._bound or name in self.trouble

    def need(self, name: str) -> None:
        """Loads a model at its first frame. Raises nothing: what fails is `trouble`."""
        with self._loading:
            if not self.known(name):
                self._asked_s[name] = time.monotonic()
                self._load(name)

    def refresh(self) -> None:
        """Looks once at every pointer, and tries again what is in trouble.

        ServiceUnavailable when the store is away: everything in use goes on. What is wrong with
        one model (VersionBroken: a pointer that cannot be read) is raised after all were looked at.
        """
        broken: list[DpdlError] = []
        self._look(self.default, broken)
        with self._loading:
            for versions in list(self._bound.values()):
                self._look(versions, broken)
            for name in list(self.trouble):
                if self._idle_s(name) > IDLE_S:
                    del self.trouble[name]
                    self._failed.pop(name, None)
                else:
                    self._load(name)
        if broken:
            raise broken[0]

    def in_use(self) -> list[Versions]:
        """The default one first."""
        return [self.default, *self._bound.values()]

    def _look(self, versions: Versions, broken: list[DpdlError]) -> None:
        try:
            versions.refresh()
        except DpdlError as error:
            if error.retryable:
                raise
            broken.append(error)

    def _load(self, name: str) -> None:
        # The same object at every try: it remembers what it refused.
        versions = self._failed.pop(name, None) or self._versions(name)
        try:
            if not self._has_room():
                raise DpdlError(
                    f"{self._max_models} models are in use already: raise stream.max_models"
                )
            versions.start()
        except (DpdlError, ValueError) as error:  # ValueError: no name that a model can have
            self._failed[name] = versions
            if self.trouble.get(name) != str(error):
                log.warning("%s scores for model %s: %s", self.default.name, name, error)
            self.trouble[name] = str(error)
            return
        self._bound[name] = versions
        self.trouble.pop(name, None)

    def _has_room(self) -> bool:
        if len(self._bound) + 1 < self._max_models:
            return True
        longest = max(self._bound, key=self._idle_s, default=None)
        if longest is None or self._idle_s(longest) < IDLE_S:
            return False
        log.info("model %s makes room: nobody asked for it lately", longest)
        del self._bound[longest]
        return True

    def _idle_s(self, name: str) -> float:
        return time.monotonic() - self._asked_s.get(name, 0.0)

    def _versions(self, name: str) -> Versions:
        return Versions(self._store, name, device=self._device, trial_batch=self._trial_batch)
