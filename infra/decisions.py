"""What the gate decided on each refresh and training, as small files beside the versions. Written
once."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from infra.errors import DataError, NotFound, PointerConflict
from infra.grafana_client import announce_held
from infra.s3_client import conditional_put, get, make_minio, s3_errors
from infra.settings import Settings
from infra.stored import from_json

log = logging.getLogger("dpdl.decisions")


@dataclass(frozen=True)
class Decision:
    candidate: str
    parent: str | None
    """None for a training: it descends from nothing."""
    decision: str
    """promoted, held, or none: there was nothing to learn, and no candidate."""
    why: str
    numbers: dict[str, Any]
    inputs: dict[str, str]
    """Incoming objects that the candidate was made of, key -> ETag: settled where it was promoted,
    and where it was held, settled together."""
    at: str = ""
    """UTC, ISO 8601; set when it is recorded."""


def record(settings: Settings, model: str, decision: Decision) -> None:
    """The first record of a candidate stands; a second one changes nothing.

    One that is held is annotated in Grafana, where one is configured.
    """
    decision = replace(decision, at=datetime.now(UTC).isoformat(timespec="milliseconds"))
    data = (json.dumps(asdict(decision), indent=1, sort_keys=True) + "\n").encode()
    key = _key(model, decision.candidate)
    try:
        with s3_errors(settings.s3):
            conditional_put(make_minio(settings), settings.s3.models_bucket, key, data)
    except PointerConflict:
        return
    if decision.decision == "held":  # a promotion is announced by who moves the pointer
        announce_held(settings, model, decision.candidate, decision.why, decision.at)


def find(settings: Settings, model: str, candidate: str) -> Decision | None:
    """The decision on one candidate, None where there is none yet. DataError: unreadable."""
    key = _key(model, candidate)
    try:
        with s3_errors(settings.s3):
            data, _ = get(make_minio(settings), settings.s3.models_bucket, key)
    except NotFound:
        return None
    return from_json(Decision, data, key)


def recorded(settings: Settings, model: str) -> list[Decision]:
    """All decisions, in the order of their candidates' ids. DataError where one is unreadable."""
    found = Recorded(settings, model)
    decisions = found.all()
    if found.unreadable:
        raise DataError(next(iter(found.unreadable.values())))
    return decisions


class Recorded:
    """Decisions, each read once: for who looks again and again. One that is unreadable is left out,
    and said once."""

    def __init__(self, settings: Settings, model: str) -> None:
        self._s3, self._prefix = settings.s3, f"{model}/decisions/"
        self._client = make_minio(settings)
        self._known: dict[str, Decision] = {}
        self.unreadable: dict[str, str] = {}
        """Key -> why, in one line that names it."""

    def all(self) -> list[Decision]:
        bucket = self._s3.models_bucket
        with s3_errors(self._s3):
            found = self._client.list_objects(bucket, prefix=self._prefix, recursive=True)
            for key in [str(item.object_name) for item in found]:
                if key not in self._known and key not in self.unreadable:
                    data, _ = get(self._client, bucket, key)
                    self._read(key, data)
        return [self._known[key] for key in sorted(self._known)]

    def _read(self, key: str, data: bytes) -> None:
        try:
            self._known[key] = from_json(Decision, data, key)
        except DataError as why:
            self.unreadable[key] = str(why)
            log.warning("left out: %s", why)


def _key(model: str, candidate: str) -> str:
    return f"{model}/decisions/{candidate}.json"
