"""Evidence: what is kept, and that nothing waits for an S3 that is away."""

import threading
import time
import weakref
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from infra.errors import ServiceUnavailable
from infra.messages import evidence_key
from serving import archive
from serving.archive import Archive, Owed, heat_png, image_type, upsample_map


class Notes(dict):
    """Debts in a dict, with the interface of serving.archive.Debts."""

    def note(self, frame, heat):
        self[frame.frame_id] = frame.evidence_key, heat

    def some(self, count):
        return [Owed(frame_id, *noted) for frame_id, noted in list(self.items())[:count]]

    def settle(self, frame_id, *, paid):
        self.pop(frame_id, None)


def frame(offset, image=b"\xff\xd8\xffpixels"):
    key = evidence_key(f"t/0/{offset}", 1000 + offset)
    return SimpleNamespace(frame_id=f"t/0/{offset}", image=image, evidence_key=key)


HEAT = np.eye(4, dtype=np.float32)


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def make():
    made = []

    def make(put, reread=lambda frame_id, captured_at_ns: None, debts=None):
        made.append(Archive(put, reread, Notes() if debts is None else debts))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_the_overlay_is_hot_where_the_map_is_and_clear_where_it_is_cold():
    rgba = cv2.imdecode(np.frombuffer(heat_png(HEAT, 64), np.uint8), cv2.IMREAD_UNCHANGED)
    assert rgba.shape == (64, 64, 4)
    assert rgba[4, 4, 3] > 250
    assert rgba[4, 60, 3] < 5


@pytest.mark.parametrize("shape", [(8, 8), (14, 11), (1, 1), (256, 256), (300, 20)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_maps_are_upsampled_as_torch_does(shape, dtype):
    heat = (10 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    want = interpolate(torch.from_numpy(heat).float()[None, None], (256, 256), mode="bilinear")
    assert np.allclose(upsample_map(heat, 256), want[0, 0].numpy(), atol=1e-4)


def test_a_flat_map_is_clear():
    rgba = cv2.imdecode(
        np.frombuffer(heat_png(np.ones((3, 3), np.float32)), np.uint8), cv2.IMREAD_UNCHANGED
    )
    assert rgba[..., 3].max() == 0


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"<svg onload=alert(1)>", "application/octet-stream"),
        (b"<html>", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_the_type_is_what_the_bytes_are(data, kind):
    assert image_type(data) == kind


def test_frame_and_overlay_lie_under_the_frames_key(make):
    bucket = {}
    kept = make(lambda key, data, kind: bucket.update({key: (data, kind)}))
    assert kept.keep([frame(7)], [HEAT]) == [frame(7).evidence_key]
    data, kind = bucket[f"{frame(7).evidence_key}/frame"]
    assert (data, kind) == (frame(7).image, "image/jpeg")
    assert bucket[f"{frame(7).evidence_key}/heat.png"][1] == "image/png"


def test_what_s3_does_not_take_is_owed_and_paid_from_kafka(make):
    away, bucket, debts = [True], {}, Notes()

    def put(key, data, kind):
        if away[0]:
            raise ServiceUnavailable("S3 is away")
        bucket[key] = data

    kept = make(put, reread=lambda *frame: repr(frame).encode(), debts=debts)
    keys = [frame(1).evidence_key, frame(2).evidence_key]
    assert kept.keep([frame(1), frame(2)], [HEAT, HEAT]) == keys
    assert set(debts) == {"t/0/1", "t/0/2"}
    assert kept.pay() == 0  # S3 is given a rest
    away[0], kept._rest_until = False, 0.0
    assert kept.pay() == 2
    assert not debts
    assert bucket[f"{keys[0]}/frame"] == b"('t/0/1', 1001)"  # that one, not another of its id


def test_every_outage_of_s3_is_told_with_its_end(make, caplog):
    """Not only the first one in the life of a process."""
    away, debts = [False], Notes()

    def put(key, data, kind):
        if away[0]:
            raise ServiceUnavailable("S3 reads and does not write")

    kept = make(put, reread=lambda *asked: b"x", debts=debts)
    told = lambda: [each.message[:14] for each in caplog.records if each.levelname == "WARNING"]  # noqa: E731
    for offset in (1, 3):
        away[0] = True
        kept.keep([frame(offset)], [HEAT])
        away[0], kept._rest_until = False, kept._rest_until - archive.BREATHER_S
        kept.keep([frame(offset + 1)], [HEAT])
    assert told() == 2 * ["S3 does not ta", "S3 takes evide"]
    away[0] = True
    kept.keep([frame(5)], [HEAT])
    away[0], kept._rest_until = False, kept._rest_until - archive.BREATHER_S
    assert kept.pay() == 3
    assert told()[4:] == ["S3 does not ta", "S3 takes evide"]


def test_a_slow_s3_that_takes_what_is_owed_is_left_alone_all_the_same(make):
    """Else each batch would wait for it again."""
    debts = Notes({"t/0/1": ("t/00000/1", HEAT)})
    kept = make(lambda *put: kept._rest(), reread=lambda *asked: b"x", debts=debts)
    kept.pay()
    assert kept._rest_until > time.monotonic()


def test_a_frame_that_kafka_no_longer_has_is_given_up(make):
    debts = Notes({"t/0/1": ("t/00000/1", HEAT)})
    kept = make(lambda *args: None, reread=lambda frame_id, captured_at_ns: None, debts=debts)
    assert kept.pay() == 1
    assert not debts


def test_results_do_not_wait_for_an_s3_that_hangs(make, monkeypatch):
    monkeypatch.setattr(archive, "PATIENCE_S", 0.1)
    debts = Notes()
    kept = make(lambda *args: time.sleep(1.0), debts=debts)
    began = time.monotonic()
    kept.keep([frame(1)], [HEAT])
    kept.keep([frame(2)], [HEAT])  # does not even try
    assert time.monotonic() - began < 0.8
    assert set(debts) == {"t/0/1", "t/0/2"}


class Watched(bytearray):
    """An image that tells whether somebody still holds it; bytes take no weak references."""


def test_an_s3_that_hangs_holds_no_more_than_one_batch_of_images(make, monkeypatch):
    monkeypatch.setattr(archive, "PATIENCE_S", 0.05)
    answer, made, debts, puts = threading.Event(), [], Notes(), []

    def put(key, data, kind):
        puts.append(key)
        answer.wait(30)

    kept = make(put, debts=debts)
    for batch in range(20):
        images = [Watched(bytes(100)) for _ in range(8)]
        made += map(weakref.ref, images)
        kept._rest_until = 0.0
        kept.keep([frame(8 * batch + i, image) for i, image in enumerate(images)], [HEAT] * 8)
        del images
    assert len(debts) == 160
    assert sum(ref() is not None for ref in made) <= 8
    answer.set()
    until(lambda: all(t.done() for t in kept._running))
    kept._rest_until = 0.0
    kept.keep([frame(200)], [HEAT])
    until(lambda: "t/0/200" not in debts)  # it is used again once it answers
    assert len(puts) == 2 * (8 + 1)  # what is owed of later batches was not written too


def test_for_a_slow_s3_one_batch_waits_and_all_of_it_is_written_once(make, monkeypatch, caplog):
    monkeypatch.setattr(archive, "PATIENCE_S", 0.3)
    bucket, debts, takes, waited_s = [], Notes(), threading.Event(), []

    def put(key, data, kind):
        takes.wait(10)
        bucket.append(key)

    kept = make(put, reread=lambda *asked: pytest.fail("it is written from memory"), debts=debts)
    for offset in range(3):
        takes.clear()
        began_s = time.monotonic()
        kept.keep([frame(offset)], [HEAT])
        waited_s.append(time.monotonic() - began_s)
        assert set(debts) == {f"t/0/{offset}"}  # a crash would lose none
        assert kept.pay() == 0
        time.sleep(0.4)
        takes.set()
        until(lambda: not debts)
    assert waited_s[0] >= 0.3 > max(waited_s[1:])
    assert len(bucket) == len(set(bucket)) == 2 * 3
    monkeypatch.setattr(archive, "PATIENCE_S", 10.0)
    kept.keep([frame(3)], [HEAT])
    until(lambda: not debts)
    kept.keep([frame(4)], [HEAT])  # waited for again
    assert not debts
    told = [each.message[:14] for each in caplog.records if each.levelname == "WARNING"]
    assert told == ["S3 is slow: al", "S3 is quick ag"]


def test_a_slow_s3_that_fails_in_the_end_is_away(make, monkeypatch):
    monkeypatch.setattr(archive, "PATIENCE_S", 0.05)

    def put(key, data, kind):
        time.sleep(0.2)
        raise ServiceUnavailable("S3 has not answered")

    debts = Notes()
    kept = make(put, debts=debts)
    kept.keep([frame(1)], [HEAT])
    until(lambda: kept._rest_until > time.monotonic())
    assert set(debts) == {"t/0/1"}


def test_the_end_of_the_archive_is_that_of_its_kafka_client():
    ended = threading.Event()
    kept = Archive(lambda *_: None, lambda frame_id: None, Notes(), at_end=ended.set)
    kept.close()
    assert ended.wait(5.0)
