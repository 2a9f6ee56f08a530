"""New objects as the store tells of them: MinIO's ListenBucketNotification, no part of plain S3.

MinIO answers with a stream that never ends: a space every half second, and one line of JSON for
each event. Its last open-source builds (2025 and 2026) hold both back until some kilobytes have
gathered: the flush is lost in a wrapper that has none (trackingResponseWriter). So who waits for
signs of life knows whether events come in time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from minio.error import S3Error

from infra.s3_client import make_minio, s3_errors
from infra.settings import Settings

SILENCE_S = 5.0
"""A store that says nothing for so long hangs, or holds back what it has to tell."""
_UNKNOWN_CODES = {"NotImplemented", "MethodNotAllowed", "InvalidArgument", "InvalidRequest"}


def listen(
    settings: Settings,
    bucket: str,
    *,
    suffix: str,
    stop: threading.Event,
    alive: Callable[[], None],
    created: Callable[[str], None],
    silence_s: float = SILENCE_S,
) -> bool:
    """Call created(key) for each object written under a name with this suffix, until `stop`.

    alive() is called at every sign of life: what is written after the first one is told. Returns
    False at once where the store has no notifications, True at `stop` or when the store ends the
    answer in good order (it shuts down).
    Errors: ServiceUnavailable when the connection breaks or stays silent, AuthFailed, NotFound
    without a bucket.
    """
    with s3_errors(settings.s3):
        response = _open(settings, bucket, suffix, silence_s)
        if response is None:
            return False
        try:
            rest = b""
            for chunk in response.stream():
                alive()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in filter(bytes.strip, lines):
                    for record in json.loads(line).get("Records") or []:
                        created(record["s3"]["object"]["key"])
                if stop.is_set():
                    break
            return True
        finally:
            response.close()
            response.release_conn()


def _open(settings: Settings, bucket: str, suffix: str, silence_s: float) -> Any:
    try:
        client = make_minio(settings, read_timeout_s=silence_s, tries=1)
        events = client.listen_bucket_notification(
            bucket, suffix=suffix, events=("s3:ObjectCreated:*",)
        )
        # Its own iterator sits in readline() until a whole event has come: nothing can stop it.
        response = events._func()
    except ValueError:  # Amazon S3
        return None
    except S3Error as error:
        if error.code in _UNKNOWN_CODES:
            return None
        raise
    if "event-stream" in response.headers.get("content-type", ""):
        return response
    # A store that knows nothing of it lists the bucket instead.
    response.close()
    response.release_conn()
    return None
