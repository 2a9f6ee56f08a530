"""What the console does besides showing: answers, frames out of Kafka, versions. Knows no HTTP."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from dpdl_core.artifact import ArtifactError, unpack
from infra.answers import Answer, Answers, Kind
from infra.decisions import Recorded
from infra.errors import DataError, NotFound, PointerConflict, ServiceUnavailable, VersionBroken
from infra.grafana_client import announce_move
from infra.messages import FrameResult
from infra.model_store import ModelStore, Pointer, version_before
from infra.settings import Settings
from serving.archive import FRAME, EvidenceBucket, Reread
from serving.console import schema, views

log = logging.getLogger("dpdl.console")

MANIFESTS_KEPT = 1_000
"""A version never changes, so its manifest is read once while it is among the last used."""
_USED = (
    "kind", "created_at", "stored_at", "parent", "auroc", "false_alarm_rate", "new_normals",
)  # fmt: skip
KAFKA_TURN_S = 20.0
"""Longest wait for the one Kafka reader; each frame takes it at most serving.archive.REREAD_MS."""


class Desk:
    """Thread-safe. Errors are infra's: NotFound, DataError, PointerConflict, ServiceUnavailable."""

    def __init__(self, settings: Settings, model_name: str) -> None:
        self._settings, self._model = settings, model_name
        self._store = ModelStore(settings)
        self._decisions: dict[str, Recorded] = {}
        self._answers = Answers(settings)
        self._evidence = EvidenceBucket(settings, hurried=True)
        self._reread = Reread(settings)
        self._kafka_turn = threading.Lock()
        self._answer_turn = threading.Lock()
        self._decisions_turn = threading.Lock()
        self._manifest = lru_cache(MANIFESTS_KEPT)(self._read_manifest)
        self.answers_of = self._answers.of
        self.classes = self._answers.classes

    # --- frames and answers --------------------------------------------------------------

    def image(
        self, frame_id: str, captured_at_ns: int | None = None, evidence_key: str = ""
    ) -> bytes:
        """A frame as it came: out of its evidence, if it has any, else out of Kafka again.

        Only the result says whether it has, and when it was captured: a topic made anew gives its
        frames the ids of the old one's, whose evidence is still there. NotFound: expired.
        """
        kept = self._evidence.get(f"{evidence_key}/{FRAME}") if evidence_key else None
        if kept is not None:
            return kept
        if not self._kafka_turn.acquire(timeout=KAFKA_TURN_S):
            raise ServiceUnavailable("too many frames are being read from Kafka: try again")
        try:
            image = self._reread(frame_id, captured_at_ns)
        finally:
            self._kafka_turn.release()
        if image is None:
            raise NotFound(f"{frame_id} is no longer in Kafka, nor among the evidence")
        return image

    def answer(
        self,
        result: FrameResult,
        kind: Kind,
        *,
        defect: str,
        by: str,
        bound: str | None,
        expected: float | None = None,
    ) -> Answer:
        """bound: the model that a person bound the camera to, None for the default one; expected:
        when the answer that was seen was given, in unix ms, 0 for none; None where any will do.

        DataError where the version that scored the frame names no data set to put it in, or is of
        another model than is to score the camera: it would learn normals of a view not its own; and
        where another answer stands than `expected`, unless it says the same.
        """
        dataset, image = "", b""
        if kind != "unsure":
            wanted = bound or self._model
            if result.model != wanted:
                raise DataError(
                    f"model {wanted} is to score camera {result.camera}, but {result.model} scored "
                    f"this frame, and would learn from the answer: answer frames that {wanted} "
                    f"has scored, or bind the camera to {result.model}"
                )
            dataset = self._dataset(result.model, result.version)
            if not dataset:
                raise DataError(
                    f"{result.model} {result.version} names no data set in its manifest: this "
                    "answer has nowhere to go"
                )
            image = self.image(result.frame_id, result.captured_at_ns, result.evidence_key)
        with self._answer_turn:
            there = self._answers.of([result]).get(result.frame_id)
            if there is None or (there.kind, there.defect) != (kind, defect):
                _check_expected(there, expected)
            given = self._answers.give(
                result, kind, defect=defect, by=by, dataset=dataset, image=image
            )
        log.info("%s: %s %s by %a", result.frame_id, kind, defect, by)
        return given

    def undo(self, result: FrameResult, expected: float | None = None) -> Answer:
        """expected: as for answer()."""
        with self._answer_turn:
            if there := self._answers.of([result]).get(result.frame_id):
                _check_expected(there, expected)
            taken_back = self._answers.undo(result)
        if taken_back is None:
            raise NotFound(f"{result.frame_id} has no answer to take back")
        log.info("%s: %s by %a taken back", result.frame_id, taken_back.kind, taken_back.by)
        return taken_back

    # --- versions ------------------------------------------------------------------------

    def models(self, bindings: Mapping[str, str]) -> schema.ModelList:
        """Models in the store and those that cameras are bound to; bindings: camera -> model."""
        bound = Counter(bindings.values())
        names = {self._model, *bound, *self._store.list_models()}
        pointers = {name: self._pointer(name) for name in names}
        return schema.ModelList(
            models=[
                schema.Model(
                    model=name,
                    current=pointer.version if pointer else None,
                    default=name == self._model,
                    bound_cameras=bound[name],
                )
                for name, pointer in sorted(
                    pointers.items(), key=lambda found: (found[0] != self._model, found[0])
                )
            ]
        )

    def versions(self, model: str | None, count: int, skip: int) -> schema.VersionPage:
        """Of the default model with None."""
        model = model or self._model
        pointer = self._store.current(model)
        with self._decisions_turn:
            if model not in self._decisions:
                self._decisions[model] = Recorded(self._settings, model)
            decided = {each.candidate: each for each in self._decisions[model].all()}
        known = self._store.written(model)
        # S3's clock says seconds; ids sort by milliseconds.
        newest = sorted(known, key=lambda name: (known[name], name), reverse=True)
        return schema.VersionPage(
            model=model,
            current=pointer.version if pointer else None,
            rollback_to=_back(pointer),
            versions=[
                views.version(
                    name, self._shown(model, name, known[name]), pointer, decided.get(name)
                )
                for name in newest[skip : skip + count]
            ],
            known=len(known),
            promotions=[
                schema.Promotion(version=m.version, at=m.at, by=m.by, why=m.why)
                for m in reversed(pointer.moves if pointer else ())
            ],
        )

    def promote(
        self,
        model: str | None,
        version: str,
        *,
        expected: str | None,
        by: str,
        why: str,
        back: bool = False,
    ) -> Pointer:
        """Verify a version and point at it. PointerConflict where `expected` is not current.

        back: a rollback; DataError where `version` is not what it goes back to.
        """
        model = model or self._model
        pointer = self._store.current(model)
        current = pointer.version if pointer else None
        if current != expected:
            raise PointerConflict(
                f"{current} is current now, not {expected}: look again before you promote"
            )
        if pointer is not None and current == version:
            return pointer
        if back and version != _back(pointer):
            raise DataError(f"a rollback goes back to {_back(pointer)}, not to {version}")
        try:
            unpack(self._store.fetch(model, version))
        except ArtifactError as error:
            raise VersionBroken(f"{model} {version}: {error}") from None
        moved = self._store.move_pointer(model, version, pointer, by=by, why=why, back=back)
        announce_move(self._settings, model, moved)
        return moved

    def _pointer(self, model: str) -> Pointer | None:
        """One that cannot be read does not hide the other models."""
        try:
            return self._store.current(model)
        except VersionBroken:
            return None

    def _shown(self, model: str, version: str, written: datetime) -> dict[str, Any]:
        """One manifest that is altered, too new or just removed does not hide the others."""
        try:
            return self._manifest(model, version)
        except (VersionBroken, NotFound) as error:
            at = written.isoformat(timespec="milliseconds")  # by the clock of S3
            return {"kind": "broken", "stored_at": at, "broken": str(error)}

    def _dataset(self, model: str, version: str) -> str:
        """What a version learnt from; of one that was pruned meanwhile, the current one."""
        try:
            manifest = self._manifest(model, version)
        except NotFound:
            pointer = self._store.current(model)
            if pointer is None:
                raise
            manifest = self._manifest(model, pointer.version)
        return str(manifest["data"]["dataset"])

    def _read_manifest(self, model: str, version: str) -> dict[str, Any]:
        """What the console uses of it: a manifest also lists every object that it learned from."""
        manifest = self._store.manifest(model, version)
        thresholds = manifest.get("thresholds") or {}
        return {name: manifest[name] for name in _USED if name in manifest} | {
            "data": {"dataset": manifest.get("data", {}).get("dataset", "")},
            "thresholds": {"default": thresholds.get("default")},
        }


def _check_expected(there: Answer | None, expected: float | None) -> None:
    """DataError where another answer stands than the one that was seen."""
    if expected is None or expected == (there.at_ns / 1e6 if there else 0):
        return
    now = f"{there.by} says {there.kind} {there.defect}".strip() if there else "there is none"
    raise DataError(f"the answer has changed since you looked, {now}: look again")


def _back(pointer: Pointer | None) -> str | None:
    return version_before(pointer.moves) if pointer else None
