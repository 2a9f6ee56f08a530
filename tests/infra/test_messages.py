"""Frames and results: what is accepted, what is refused with which reason."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import BadFrame, DataError
from infra.messages import (
    MAX_FRAME_BYTES,
    FrameRecord,
    FrameResult,
    check_camera,
    evidence_key,
    frame_headers,
)

Record = namedtuple("Record", "topic partition offset timestamp key value headers")
REASONS = {
    "no-key",
    "bad-key",
    "empty",
    "too-large",
    "bad-schema",
    "schema-too-new",
    "bad-captured-at",
    "bad-content-type",
}


def record(**changed: Any) -> Record:
    good = {
        "topic": "frames",
        "partition": 2,
        "offset": 41,
        "timestamp": 1_700_000_000_123,
        "key": b"cam-1",
        "value": b"\xff\xd8\xff",
        "headers": frame_headers(1_700_000_000_456_789_012, "image/jpeg"),
    }
    return Record(**{**good, **changed})


def test_a_frame_is_read_whole() -> None:
    frame = FrameRecord.from_kafka(record())
    assert frame.frame_id == "frames/2/41"
    assert frame.camera == "cam-1"
    assert frame.captured_at_ns == 1_700_000_000_456_789_012
    assert frame.content_type == "image/jpeg"
    assert frame.image == b"\xff\xd8\xff"


@pytest.mark.parametrize("headers", [[], None, [("other", b"x")]])
def test_a_record_without_headers_takes_kafkas_time(headers: Any) -> None:
    frame = FrameRecord.from_kafka(record(headers=headers))
    assert frame.captured_at_ns == 1_700_000_000_123_000_000
    assert frame.content_type == ""


def test_a_record_without_any_time_is_accepted() -> None:
    assert FrameRecord.from_kafka(record(headers=[], timestamp=-1)).captured_at_ns == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"key": None}, "no-key"),
        ({"key": b""}, "no-key"),
        ({"key": b"\xff\xfe"}, "bad-key"),
        ({"key": b"a\nb"}, "bad-key"),
        ({"key": b" cam"}, "bad-key"),
        ({"key": "\u202ecam".encode()}, "bad-key"),
        ({"key": b"x" * 129}, "bad-key"),
        ({"value": None}, "empty"),
        ({"value": b""}, "empty"),
        ({"value": bytes(MAX_FRAME_BYTES + 1)}, "too-large"),
        ({"headers": [("dpdl-schema", b"2")]}, "schema-too-new"),
        ({"headers": [("dpdl-schema", b"0")]}, "bad-schema"),
        ({"headers": [("dpdl-schema", b"one")]}, "bad-schema"),
        ({"headers": [("dpdl-schema", None)]}, "bad-schema"),
        ({"headers": [("captured-at", b"yesterday")]}, "bad-captured-at"),
        ({"headers": [("captured-at", b"-5")]}, "bad-captured-at"),
        ({"headers": [("captured-at", b" 5")]}, "bad-captured-at"),
        ({"headers": [("captured-at", b"9" * 19)]}, "bad-captured-at"),
        ({"headers": [("captured-at", b"9" * 5000)]}, "bad-captured-at"),
        ({"headers": [("content-type", b"\xff")]}, "bad-content-type"),
        ({"headers": [("content-type", b"a\r\nb")]}, "bad-content-type"),
        ({"headers": [("content-type", b"x" * 101)]}, "bad-content-type"),
    ],
)
def test_a_bad_record_says_why(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadFrame) as raised:
        FrameRecord.from_kafka(record(**changed))
    assert raised.value.reason == reason
    assert len(str(raised.value)) < 250


def test_the_largest_frame_is_accepted() -> None:
    image = bytes(MAX_FRAME_BYTES)
    assert FrameRecord.from_kafka(record(value=image)).image is image


names = st.sampled_from(["dpdl-schema", "captured-at", "content-type", "other"])
hostile = st.one_of(st.none(), st.binary(max_size=40), st.integers().map(lambda n: b"%d" % n))


@given(
    key=st.one_of(st.none(), st.binary(max_size=200), st.text(max_size=200).map(str.encode)),
    value=st.one_of(st.none(), st.binary(max_size=8)),
    headers=st.lists(st.tuples(st.one_of(names, st.text(max_size=5)), hostile), max_size=6),
    timestamp=st.integers(-(2**63), 2**63 - 1),
)
def test_anything_is_a_frame_or_has_a_reason(
    key: bytes | None, value: bytes | None, headers: Any, timestamp: int
) -> None:
    frame, reason = None, ""
    try:
        frame = FrameRecord.from_kafka(
            record(key=key, value=value, headers=headers, timestamp=timestamp)
        )
    except BadFrame as bad:
        reason = bad.reason
    if frame is None:
        assert reason in REASONS
    else:
        assert check_camera(frame.camera).encode() == key
        assert frame.image == value != b""
        assert frame.captured_at_ns >= 0
        assert frame.content_type.isprintable()


@given(captured=st.integers(0, 2**63 - 1))
def test_headers_round_trip(captured: int) -> None:
    frame = FrameRecord.from_kafka(record(headers=frame_headers(captured, "image/png")))
    assert (frame.captured_at_ns, frame.content_type) == (captured, "image/png")


def test_evidence_lies_in_offset_order() -> None:
    keys = [evidence_key(f"frames/3/{offset}", 17) for offset in (9, 10, 2**40)]
    assert keys == sorted(keys)
    assert keys[0] == "frames/00003/00000000000000000009-17"


def test_evidence_of_a_topic_made_anew_overwrites_none_of_the_old_one() -> None:
    old, new = (record(headers=frame_headers(at, "image/png")) for at in (1, 2))
    keys = {FrameRecord.from_kafka(each).evidence_key for each in (old, new)}
    assert len(keys) == 2


RESULT = FrameResult(
    frame_id="frames/2/41",
    camera="cam-1",
    captured_at_ns=1_700_000_000_456_789_012,
    scored_at_ns=1_700_000_000_500_000_000,
    score=0.1 + 0.2,
    threshold=1 / 3,
    energy=-12.5,
    is_anomaly=False,
    model="default",
    version="v-1",
    evidence_key="",
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(score=finite, threshold=finite, energy=finite, camera=st.text(max_size=20))
def test_a_result_round_trips_bit_for_bit(
    score: float, threshold: float, energy: float, camera: str
) -> None:
    result = replace(
        RESULT,
        score=score,
        threshold=threshold,
        energy=energy,
        camera=camera,
        is_anomaly=score > threshold,
    )
    fields = result.to_redis()
    assert all(isinstance(value, str) for value in fields.values())
    assert FrameResult.from_redis(fields) == result


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_is_no_number_never_gets_in(wrong: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        replace(RESULT, score=wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {**RESULT.to_redis(), "schema": "2"},
        {**RESULT.to_redis(), "score": "high"},
        {},
    ],
)
def test_a_foreign_result_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(DataError):
        FrameResult.from_redis(fields)
