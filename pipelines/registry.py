"""Model versions for people: list, show, promote, roll back, prune.

The store itself is infra/model_store.py; here versions are verified before a person can point at
them, and their manifests become something to read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from infra import decisions
from infra.errors import DataError, NotFound
from infra.model_store import ModelStore, Pointer, version_before, way_back
from infra.settings import Settings
from pipelines.promotion import load, move
from pipelines.run_record import list_runs, remove_run

UNDECIDED_FOR = timedelta(days=1)
"""A version that was stored so long ago and is not decided on was left by a process that died."""


@dataclass(frozen=True)
class VersionSummary:
    version: str
    kind: str
    """train or refresh; "" where the version is broken."""
    created_at: str
    parent: str | None
    current: bool
    decision: str
    """Of the gate: promoted, held, or "" where none is recorded."""
    why: str
    """Why it is broken; else the gate's words, or those of who moved the pointer to it last."""
    auroc: float | None
    """Of the test split, measured at training."""


class Registry:
    """One model's versions."""

    def __init__(self, settings: Settings, model_name: str = "default") -> None:
        self._settings, self.model_name = settings, model_name
        self._store = ModelStore(settings)

    def list(self) -> list[VersionSummary]:
        """Newest first. NotFound where there is none, which says of what models there are."""
        pointer = self._store.current(self.model_name)
        past = {d.candidate: d for d in decisions.recorded(self._settings, self.model_name)}
        said = {move.version: move.why for move in pointer.moves} if pointer else {}
        found = []
        for version, written in self._store.written(self.model_name).items():
            why = past[version].why if version in past else said.get(version, "")
            try:
                manifest = self._store.manifest(self.model_name, version)
            except DataError as error:  # one that is broken, or a newer dpdl's, hides no other
                manifest, why = {}, f"broken: {error}"
            found.append(
                VersionSummary(
                    version=version,
                    kind=manifest.get("kind", ""),
                    created_at=manifest.get("created_at", _moment(written)),
                    parent=manifest.get("parent"),
                    current=pointer is not None and pointer.version == version,
                    decision=past[version].decision if version in past else "",
                    why=why,
                    auroc=manifest.get("auroc"),
                )
            )
        if not found:
            known = ", ".join(self._store.list_models()) or "none, `dpdl train` makes one"
            raise NotFound(f"model {self.model_name!r} has no version; models there are: {known}")
        return sorted(found, key=lambda summary: summary.created_at, reverse=True)

    def show(self, version: str | None = None) -> dict[str, Any]:
        """All that is known of a version (default: the current one), its files verified.

        Keys: version, current, manifest, the version's JSON files by name, decision (the gate's, if
        there is one), moves (of the pointer to this version: at, by, why).
        """
        pointer = self._store.current(self.model_name)
        version = version or self._current(pointer).version
        files = self._store.fetch(self.model_name, version)
        shown: dict[str, Any] = {
            "version": version,
            "current": pointer is not None and pointer.version == version,
            "manifest": self._store.manifest(self.model_name, version),
            **{
                name.removesuffix(".json"): json.loads(data)
                for name, data in files.items()
                if name.endswith(".json")
            },
        }
        decision = decisions.find(self._settings, self.model_name, version)
        if decision is not None:
            shown["decision"] = asdict(decision)
        if pointer is not None:
            shown["moves"] = [asdict(move) for move in pointer.moves if move.version == version]
        return shown

    def promote(self, version: str, why: str) -> Pointer:
        """Point at `version`, whatever the gate said, after it has been verified and unpacked.

        Raises VersionBroken for one that must not run, PointerConflict if the pointer moves
        meanwhile.
        """
        pointer = self._store.current(self.model_name)
        if pointer is not None and pointer.version == version:
            return pointer
        return self._move(version, pointer, why)

    def rollback(self, why: str) -> Pointer:
        """Back to the version before the current one; again, to the one before that.

        Raises DataError where there is none, and as promote().
        """
        pointer = self._current(self._store.current(self.model_name))
        before = version_before(pointer.moves)
        if before is None:
            raise DataError(
                f"{pointer.version} of {self.model_name!r} has no version before it: "
                "promote one by name, `dpdl models list` shows them"
            )
        return self._move(before, pointer, why, back=True)

    def prune(self, keep: int) -> tuple[str, ...]:
        """Delete what nothing leads to any more; the names of versions and runs that went.

        Versions: all but the current one, those that rolling back goes through, and of the others
        the `keep` newest. What no decision stands of yet is left alone for UNDECIDED_FOR, and so is
        what a writer has begun. Runs: those whose version the gate has decided on; it has their
        record, and only unfinished ones can be resumed.
        """
        store, name = self._store, self.model_name
        led_to = _led_to(store.current(name))
        decided = {decision.candidate for decision in decisions.recorded(self._settings, name)}
        limit = _moment(datetime.now(UTC) - UNDECIDED_FOR)
        others: list[tuple[str, str]] = []
        for version, written in store.written(name).items():
            try:
                stored_at = str(store.manifest(name, version)["stored_at"])
            except (DataError, KeyError):  # broken: by the clock of S3
                stored_at = _moment(written)
            if version not in led_to and (version in decided or stored_at < limit):
                others.append((stored_at, version))
        gone = []
        for _, version in sorted(others, reverse=True)[keep:]:
            # Who promotes one meanwhile keeps it.
            if store.remove_version(name, version):
                gone.append(version)
        gone += store.remove_half_written(name, older_than=UNDECIDED_FOR)
        for run in list_runs(self._settings, name):
            if run in decided:
                remove_run(self._settings, name, run)
                gone.append(f"runs/{run}")
        return tuple(gone)

    def _move(self, version: str, seen: Pointer | None, why: str, *, back: bool = False) -> Pointer:
        load(self._store, self.model_name, version)
        return move(self._settings, self._store, self.model_name, version, seen, why, back=back)

    def _current(self, pointer: Pointer | None) -> Pointer:
        if pointer is None:
            raise DataError(
                f"model {self.model_name!r} has no current version: run `dpdl train` first"
            )
        return pointer


def _moment(when: datetime) -> str:
    """As manifests have it."""
    return when.isoformat(timespec="milliseconds")


def _led_to(pointer: Pointer | None) -> set[str]:
    """The current version and those that rolling back goes through."""
    return set(way_back(pointer.moves)) if pointer else set()
