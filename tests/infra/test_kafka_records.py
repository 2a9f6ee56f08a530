"""Records that kafka-python alone would choke on."""

from __future__ import annotations

import pytest
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

import infra.kafka_client  # what is tested: it mends kafka-python


class RawName(str):
    """A header's name as a sender in C can write it."""

    __slots__ = ()

    def encode(self, *_: str) -> bytes:
        return b"\xff\xfename"


def read(names: list[str]) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=False,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=10_000,
    )
    for offset, name in enumerate(names):
        assert builder.append(offset, 5, b"camera", b"frame %d" % offset, [(name, b"value")])
    batch = DefaultRecordBatch(bytes(builder.build()))
    assert batch.validate_crc()
    return [(record.key, record.value, record.headers) for record in batch]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_header_name_that_is_not_utf8_does_not_end_the_stream(at: int) -> None:
    names = ["captured-at", "\u00e4", "content-type"]
    names[at] = RawName("x")
    found = read(names)
    assert infra.kafka_client
    assert [value for _, value, _ in found] == [b"frame 0", b"frame 1", b"frame 2"]
    assert {key for key, _, _ in found} == {b"camera"}
    names[at] = "\ufffd\ufffdname"
    assert [headers for _, _, headers in found] == [[(name, b"value")] for name in names]
