"""What the gate decided on each refresh, as small files beside the versions. Written once."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import PointerConflict
from infra.s3_client import conditional_put, get, make_minio, s3_errors
from infra.settings import Settings


@dataclass(frozen=True)
class Decision:
    candidate: str
    parent: str
    decision: str
    why: str
    numbers: dict[str, Any]
    inputs: dict[str, str]
    """Incoming objects that this settles: key -> ETag."""


def record(settings: Settings, model: str, decision: Decision) -> None:
    """The first record of a candidate stands; a second one changes nothing."""
    data = (json.dumps(asdict(decision), indent=1, sort_keys=True) + "\n").encode()
    key = f"{model}/decisions/{decision.candidate}.json"
    with s3_errors(settings.s3), suppress(PointerConflict):
        conditional_put(make_minio(settings), settings.s3.models_bucket, key, data)


def recorded(settings: Settings, model: str) -> list[Decision]:
    client, bucket = make_minio(settings), settings.s3.models_bucket
    with s3_errors(settings.s3):
        found = client.list_objects(bucket, prefix=f"{model}/decisions/", recursive=True)
        return [
            Decision(**json.loads(get(client, bucket, str(item.object_name))[0])) for item in found
        ]
