"""That a loop of refreshes lives: a small object beside the versions, written with its looks.

It says when the next look is due, for who watches: a loop that has ended cannot say so itself. Who
wants no more refreshes by a loop removes the object.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

from infra.errors import NotFound
from infra.s3_client import get, make_minio, s3_errors
from infra.settings import Settings
from infra.stored import from_json


@dataclass(frozen=True)
class Look:
    due_s: float
    """When the next one is due (Unix seconds)."""


def record(settings: Settings, model: str, look: Look) -> None:
    data = json.dumps({"due_s": look.due_s}).encode()
    with s3_errors(settings.s3):
        make_minio(settings).put_object(
            settings.s3.models_bucket, _key(model), io.BytesIO(data), len(data)
        )


def last(settings: Settings, model: str) -> Look | None:
    """None where no loop has ever looked. DataError: unreadable."""
    key = _key(model)
    try:
        with s3_errors(settings.s3):
            data, _ = get(make_minio(settings), settings.s3.models_bucket, key)
    except NotFound:
        return None
    return from_json(Look, data, key)


def _key(model: str) -> str:
    return f"{model}/look.json"
