"""Records to pixels, or to a reason; the pixels are those of training and evaluation."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from dpdl_core.images import decode_image
from serving.batch import Plan, Polled
from serving.decode import Decoder

RNG = np.random.default_rng(0)
JPEG = cv2.imencode(".jpg", RNG.integers(0, 255, (90, 120, 3), np.uint8))[1].tobytes()
PNG = cv2.imencode(".png", RNG.integers(0, 255, (40, 30), np.uint8))[1].tobytes()


def record(offset, value, key=b"cam-1", headers=()):
    return SimpleNamespace(
        topic="t", partition=0, offset=offset, timestamp=5, key=key, value=value, headers=headers
    )


@pytest.fixture
def decoder():
    made = Decoder(2)
    yield made
    made.close()


def test_good_and_bad_keep_their_order(decoder):
    records = [
        record(0, JPEG),
        record(1, JPEG[:100]),
        record(2, PNG),
        record(3, JPEG, key=None),
        record(4, b""),
        record(5, b"hello"),
        record(6, JPEG, headers=[("captured-at", b"soon")]),
        record(7, JPEG),
    ]
    decoded = decoder(Polled(records, []), Plan(32))
    (batch,) = decoded.batches
    assert [frame.offset for frame in batch.frames] == [0, 2, 7]
    assert [each.offset for each in batch.records] == [0, 2, 7]
    for row, data in enumerate([JPEG, PNG, JPEG]):
        np.testing.assert_array_equal(batch.images[row], decode_image(data, 32))
    assert [(bad.record.offset, bad.reason) for bad in decoded.bad] == [
        (1, "truncated"),
        (3, "no-key"),
        (4, "empty"),
        (5, "not-an-image"),
        (6, "bad-captured-at"),
    ]


def test_a_batch_of_bad_records_has_no_pixels(decoder):
    decoded = decoder(Polled([record(0, b"hello")], []), Plan(32))
    assert decoded.batches == []
    assert len(decoded.bad) == 1


def test_each_model_gets_its_own_batch_at_its_own_size(decoder):
    keys = [b"cam-1", b"cam-2", b"cam-1", b"cam-3"]
    records = [record(offset, JPEG, key) for offset, key in enumerate(keys)]
    plan = Plan(32, {"cam-1": "other", "cam-3": "new"}, {"other": 16})
    batches = {batch.model: batch for batch in decoder(Polled(records, []), plan).batches}
    offsets = {model: [f.offset for f in batch.frames] for model, batch in batches.items()}
    assert offsets == {"other": [0, 2], "": [1], "new": [3]}
    sizes = {model: batch.images.shape for model, batch in batches.items()}
    assert sizes == {"other": (2, 16, 16, 3), "": (1, 32, 32, 3), "new": (1, 32, 32, 3)}


def test_a_codec_that_trips_does_not_stop_the_stream(decoder, monkeypatch):
    def trips(data, size):
        raise SystemError("codec")

    monkeypatch.setattr("serving.decode.decode_image", trips)
    decoded = decoder(Polled([record(0, JPEG)], []), Plan(32))
    assert [bad.reason for bad in decoded.bad] == ["undecodable"]


def test_each_record_is_a_sign_of_life(decoder):
    """Some images take seconds: a batch of them must not look like a loop that is stuck."""
    seen = []
    decoder(Polled([record(0, JPEG), record(1, b"hello")], []), Plan(32), lambda: seen.append(1))
    assert len(seen) == 2
