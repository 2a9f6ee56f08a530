"""What travels: a frame in Kafka, a result in Redis. Versioned, strict, and nothing else.

Knows no client and no network: it reads Kafka records by their attributes and writes plain
`dict[str, str]` for Redis.

Frame, schema 1: key = camera id (UTF-8), value = the encoded image, headers `dpdl-schema`,
`captured-at` (unix nanoseconds, decimal) and `content-type`. Headers may be missing: then the
camera is the key and the time is the record's timestamp, in our topics that of its arrival. What
breaks these rules raises `BadFrame(reason)`; the reasons are listed in `FrameRecord.from_kafka`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from infra.errors import BadFrame, DataError

FRAME_SCHEMA = 1
RESULT_SCHEMA = 1
MAX_CAMERA_CHARS = 128
MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Largest encoded image; the same bound as `dpdl_core.images.decode_image`."""

_MAX_NS = 2**63 - 1
_MAX_CONTENT_TYPE_CHARS = 100


class KafkaRecord(Protocol):
    """The part of kafka-python's ConsumerRecord that a frame is read from."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


def frame_id(topic: str, partition: int, offset: int) -> str:
    """The identity of a frame everywhere downstream: topic/partition/offset."""
    return f"{topic}/{partition}/{offset}"


def evidence_key(frame: str, captured_at_ns: int) -> str:
    """Where the evidence of a frame lies in the evidence bucket, from what it came with alone.

    Zero-padded, so that a listing is in offset order; deterministic, so that a replayed frame
    overwrites its own evidence with the same bytes, and Redis never needs a later update. The time
    too: a topic that was made anew counts its offsets from 0 again. Who looks for evidence takes
    the key that its result keeps: results of before there were times in it have none.
    """
    topic, partition, offset = frame.rsplit("/", 2)
    return f"{topic}/{int(partition):05d}/{int(offset):020d}-{captured_at_ns}"


def check_camera(camera: str) -> str:
    """The camera id itself if it is usable, else ValueError that says why."""
    if not camera or len(camera) > MAX_CAMERA_CHARS:
        raise ValueError(f"camera id has {len(camera)} characters, 1 to {MAX_CAMERA_CHARS} wanted")
    if not camera.isprintable() or camera != camera.strip():
        raise ValueError(f"camera id {camera!a} has control characters or blanks at its ends")
    return camera


def frame_headers(captured_at_ns: int, content_type: str) -> list[tuple[str, bytes]]:
    """Kafka headers of a frame, schema 1."""
    return [
        ("dpdl-schema", str(FRAME_SCHEMA).encode()),
        ("captured-at", str(captured_at_ns).encode()),
        ("content-type", content_type.encode("ascii")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRecord:
    """One frame as it came from Kafka; `image` is still encoded."""

    topic: str
    partition: int
    offset: int
    camera: str
    captured_at_ns: int
    content_type: str
    """As the sender says, "" if it does not. Decoding goes by the bytes, not by this."""
    image: bytes

    @property
    def frame_id(self) -> str:
        return frame_id(self.topic, self.partition, self.offset)

    @property
    def evidence_key(self) -> str:
        return evidence_key(self.frame_id, self.captured_at_ns)

    @classmethod
    def from_kafka(cls, record: KafkaRecord) -> Self:
        """Read a record, or raise BadFrame with one of these reasons:

        no-key, bad-key, empty, too-large, bad-schema, schema-too-new, bad-captured-at,
        bad-content-type.
        """
        headers = dict(record.headers or ())  # of repeated headers, Kafka's custom: the last
        _check_schema(headers)
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            camera=_camera(record.key),
            captured_at_ns=_captured_at_ns(headers, record.timestamp),
            content_type=_content_type(headers),
            image=_image(record.value),
        )


def _camera(key: bytes | None) -> str:
    if not key:
        raise BadFrame("no-key", "the record's key must be the camera id")
    try:
        return check_camera(bytes(key).decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadFrame("bad-key", str(error)) from None


def _image(value: bytes | None) -> bytes:
    if not value:
        raise BadFrame("empty", "the record has no value")
    if len(value) > MAX_FRAME_BYTES:
        raise BadFrame("too-large", f"{len(value)} bytes, at most {MAX_FRAME_BYTES} wanted")
    return bytes(value)


def _check_schema(headers: Mapping[str, bytes | None]) -> None:
    if "dpdl-schema" not in headers:
        return
    version = _decimal(headers["dpdl-schema"])
    if version is None or version < 1:
        raise BadFrame("bad-schema", f"dpdl-schema is {headers['dpdl-schema']!r:.60}")
    if version > FRAME_SCHEMA:
        raise BadFrame("schema-too-new", f"dpdl-schema is {version}, known up to {FRAME_SCHEMA}")


def _captured_at_ns(headers: Mapping[str, bytes | None], timestamp_ms: int) -> int:
    if "captured-at" not in headers:
        return max(timestamp_ms, 0) * 1_000_000  # Kafka says -1 where a record has no time
    captured = _decimal(headers["captured-at"])
    if captured is None or captured > _MAX_NS:
        raise BadFrame("bad-captured-at", f"captured-at is {headers['captured-at']!r:.60}")
    return captured


def _content_type(headers: Mapping[str, bytes | None]) -> str:
    raw = headers.get("content-type", b"")
    try:
        text = (raw or b"").decode("ascii")
    except UnicodeDecodeError:
        text = "\0"
    if raw is None or not text.isprintable() or len(text) > _MAX_CONTENT_TYPE_CHARS:
        raise BadFrame("bad-content-type", f"content-type is {raw!r:.60}")
    return text


def _decimal(raw: bytes | None) -> int | None:
    """ASCII digits as an int; None for anything else. int() alone takes " 1_0 " and "+1" too."""
    return int(raw) if raw is not None and raw.isdigit() and len(raw) <= 19 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameResult:
    """What one version said about one frame. Floats survive Redis bit for bit."""

    frame_id: str
    camera: str
    captured_at_ns: int
    scored_at_ns: int
    score: float
    threshold: float
    energy: float
    is_anomaly: bool
    """score > threshold. Whether it becomes an alert is decided with the camera's last frames."""
    model: str
    version: str
    evidence_key: str
    """Prefix in the evidence bucket; "" where none is kept."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score) and math.isfinite(self.energy)):
            raise ValueError(
                f"{self.frame_id}: score {self.score} and energy {self.energy} must be finite"
            )

    @property
    def offset(self) -> int:
        return int(self.frame_id.rsplit("/", 1)[1])

    def to_redis(self) -> dict[str, str]:
        """Fields of a stream entry, in a fixed order; repr() of a float is exact."""
        return {
            "schema": str(RESULT_SCHEMA),
            "frame": self.frame_id,
            "camera": self.camera,
            "captured_at": str(self.captured_at_ns),
            "scored_at": str(self.scored_at_ns),
            "score": repr(float(self.score)),
            "threshold": repr(float(self.threshold)),
            "energy": repr(float(self.energy)),
            "anomaly": "1" if self.is_anomaly else "0",
            "model": self.model,
            "version": self.version,
            "evidence": self.evidence_key,
        }

    @classmethod
    def from_redis(cls, fields: Mapping[str, str]) -> Self:
        """The inverse of to_redis. DataError for a newer schema or missing fields."""
        try:
            if int(fields["schema"]) > RESULT_SCHEMA:
                found = fields["schema"]
                raise DataError(f"result has schema {found}, not {RESULT_SCHEMA}: update dpdl")
            return cls(
                frame_id=fields["frame"],
                camera=fields["camera"],
                captured_at_ns=int(fields["captured_at"]),
                scored_at_ns=int(fields["scored_at"]),
                score=float(fields["score"]),
                threshold=float(fields["threshold"]),
                energy=float(fields["energy"]),
                is_anomaly=fields["anomaly"] == "1",
                model=fields["model"],
                version=fields["version"],
                evidence_key=fields["evidence"],
            )
        except (KeyError, ValueError) as error:
            raise DataError(f"result in Redis is unreadable: {error!r}") from error
