"""Cameras: encoded images into Kafka, at a camera's pace, byte for byte as they came.

Delivery: every frame is acknowledged by all in-sync replicas before stream() returns; at most
IN_FLIGHT frames wait for that, so memory is bounded whatever the broker does, and a slow broker
slows the sender. A frame that is too large, or of a time that the topic does not take, is told of
and left out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka.errors import InvalidRecordError, InvalidTimestampError

from dpdl_core.images import SUFFIXES
from infra.errors import DataError
from infra.kafka_client import (
    MAX_RECORD_BYTES,
    SIZE_ERRORS,
    close_producer,
    kafka_errors,
    make_producer,
)
from infra.messages import MAX_FRAME_BYTES, check_camera, frame_headers, frame_id
from infra.settings import Settings

IN_FLIGHT = 64
ACK_TIMEOUT_S = 60.0
CLOSE_S = 5.0
_REFUSALS = (*SIZE_ERRORS, InvalidTimestampError, InvalidRecordError)
"""Of one frame, which no retry changes. Several of a wrong time in a batch are invalid records."""


@dataclass(frozen=True, slots=True)
class OutgoingFrame:
    camera: str
    image: bytes
    source: str
    """Where it came from; stays here, never travels."""
    captured_at_ns: int | None = None
    """None: when it is sent."""


@dataclass(frozen=True, slots=True)
class SentFrame:
    frame_id: str
    camera: str
    source: str


def too_large(frame: OutgoingFrame) -> str | None:
    """Why no topic of ours takes it, in a line; None where it has the size of a frame."""
    if len(frame.image) <= MAX_FRAME_BYTES:
        return None
    return (
        f"{frame.source}: {len(frame.image)} bytes, a frame has at most {MAX_FRAME_BYTES}: "
        "lower the camera's resolution or JPEG quality"
    )


def refuse(frame: OutgoingFrame, why: str) -> None:
    """on_refused where every frame is wanted: ends the stream. Raises DataError."""
    raise DataError(f"{frame.camera}: {why}")


def stream(
    settings: Settings,
    frames: Iterable[OutgoingFrame],
    *,
    frames_per_second: float | None,
    stop: threading.Event,
    on_sent: Callable[[SentFrame], None],
    on_refused: Callable[[OutgoingFrame, str], None] = refuse,
    on_lost: Callable[[int], None] = lambda _: None,
) -> None:
    """Send frames until they end or `stop` is set, at a steady rate or, with None, as they come.

    on_sent is called in order, once a frame is acknowledged; on_refused(frame, why) for one that
    is too large, for us or for the topic, or whose time the topic refuses, and the stream goes on;
    on_lost(number) at the end, of frames taken that Kafka did not acknowledge. Errors: those of
    make_producer.
    """
    producer = make_producer(settings)
    waiting: deque[tuple[OutgoingFrame, Any]] = deque()
    in_hand = 0

    def settle(down_to: int) -> None:
        while waiting and (len(waiting) > down_to or waiting[0][1].is_done):
            frame, future = waiting[0]
            try:
                sent = future.get(timeout=ACK_TIMEOUT_S)
            except _REFUSALS as error:
                waiting.popleft()
                on_refused(frame, _refused_by(settings.kafka.topic, frame, error))
                continue
            waiting.popleft()
            on_sent(_sent(frame, sent))

    try:
        with kafka_errors(settings.kafka):
            due = time.monotonic()
            for frame in frames:
                if stop.wait(max(0.0, due - time.monotonic())):
                    break
                # After a pause the pace goes on from now: late frames do not come in a rush.
                if frames_per_second is not None:
                    due = max(due, time.monotonic()) + 1 / frames_per_second
                why = too_large(frame)
                if why is not None:
                    on_refused(frame, why)
                    continue
                in_hand = 1
                future = producer.send(
                    settings.kafka.topic,
                    key=frame.camera.encode(),
                    value=frame.image,
                    headers=frame_headers(
                        frame.captured_at_ns or time.time_ns(), content_type(frame.image)
                    ),
                )
                waiting.append((frame, future))
                in_hand = 0
                settle(IN_FLIGHT)
            settle(0)
    finally:
        close_producer(producer, CLOSE_S)
        for frame, future in waiting:
            if future.succeeded():  # late, such as while it closed
                on_sent(_sent(frame, future.value))
            else:
                in_hand += 1
        on_lost(in_hand)


def folder_frames(folder: Path, camera: str, *, recursive: bool = True) -> Iterator[OutgoingFrame]:
    """The images below a folder, sorted by name, as one camera's frames.

    DataError where there are none and, without `recursive`, where some lie in folders below it.
    """
    check_camera(camera)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: no images found; wanted files ending in {_suffixes()}")
    deeper = [path.relative_to(folder).as_posix() for path in paths if path.parent != folder]
    if deeper and not recursive:
        raise DataError(
            f"{folder}: {len(deeper)} images lie in folders below it, such as {deeper[0]}: "
            "name one folder, or take all of them with --recursive"
        )
    for path in paths:
        yield OutgoingFrame(camera, path.read_bytes(), str(path.relative_to(folder)))


def _sent(frame: OutgoingFrame, at: Any) -> SentFrame:
    """at: kafka-python's RecordMetadata."""
    return SentFrame(frame_id(at.topic, at.partition, at.offset), frame.camera, frame.source)


def _refused_by(topic: str, frame: OutgoingFrame, error: Exception) -> str:
    if not isinstance(error, SIZE_ERRORS):
        return (
            f"{frame.source}: the topic {topic} refuses it ({error}): if for its time, set this "
            "machine's clock, or give the topic message.timestamp.type=LogAppendTime"
        )
    return (
        f"{frame.source}: {len(frame.image)} bytes are more than the topic {topic} takes: raise "
        f"its max.message.bytes (`dpdl up` would make it {MAX_RECORD_BYTES}), or lower the "
        "camera's resolution or JPEG quality"
    )


def content_type(image: bytes) -> str:
    """By the first bytes; for people and tools, since decoding goes by the bytes itself."""
    for magic, name in _MAGIC:
        if image.startswith(magic):
            return name
    return "application/octet-stream"


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))


_MAGIC = [(b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png")]
