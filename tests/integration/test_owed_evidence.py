"""Evidence that S3 could not take, noted in a real Redis: all of it is paid, however much it is."""

import json

import numpy as np
import pytest

from infra.messages import FrameRecord
from infra.redis_connection import make_redis
from serving.archive import PAY_AT_ONCE, Archive, Debts

pytestmark = pytest.mark.integration

HEAT = np.eye(4, dtype=np.float32)


def frame(offset):
    return FrameRecord(
        topic="t",
        partition=0,
        offset=offset,
        camera="cam",
        captured_at_ns=1000 + offset,
        content_type="",
        image=b"x",
    )


def test_all_that_a_long_outage_left_is_paid(settings, monkeypatch):
    monkeypatch.setattr("serving.archive.BREATHER_S", 3600.0)  # the test pays, no thread
    debts, owed, bucket = Debts(settings), 1500, {}
    for offset in range(owed):
        debts.note(frame(offset), HEAT * offset)
    assert len(debts) == owed
    archive = Archive(
        lambda key, data, kind: bucket.update({key: data}), lambda *frame: b"x", debts
    )
    try:
        turns = 0
        while archive.pay():
            turns += 1
    finally:
        archive.close()
    assert len(debts) == 0
    assert turns == -(-owed // PAY_AT_ONCE)
    assert len(bucket) == 2 * owed


def test_what_is_beyond_the_bound_or_gone_from_kafka_is_counted_and_said_once(
    settings, monkeypatch, caplog
):
    monkeypatch.setattr("serving.archive.BREATHER_S", 3600.0)  # the test pays, no thread
    monkeypatch.setattr("serving.archive.MAX_DEBTS", 3)
    debts = Debts(settings)
    for offset in range(5):
        debts.note(frame(offset), HEAT)
    assert (len(debts), debts.lost()) == (3, 2)
    said = [each.message for each in caplog.records if each.levelname == "ERROR"]
    assert ["t/0/3 on" in message for message in said] == [True]
    archive = Archive(lambda *put: None, lambda *frame: None, debts)
    try:
        archive.pay()
    finally:
        archive.close()
    assert (len(debts), debts.lost()) == (0, 5)


def test_a_note_is_given_back_as_it_was(settings):
    debts = Debts(settings)
    assert debts.some(16) == []
    debts.note(frame(7), HEAT)
    (owed,) = debts.some(16)
    assert (owed.frame_id, owed.key) == ("t/0/7", frame(7).evidence_key)
    assert owed.captured_at_ns == frame(7).captured_at_ns
    assert np.array_equal(owed.heat, HEAT)


def test_a_note_of_before_keys_had_a_time_is_paid_where_its_alert_looks(settings):
    debts = Debts(settings)
    debts.note(frame(7), HEAT)
    redis = make_redis(settings)
    ((name, note),) = redis.hgetall(debts._key).items()
    old = {what: value for what, value in json.loads(note).items() if what != "key"}
    redis.hset(debts._key, name, json.dumps(old))
    (owed,) = debts.some(16)
    assert (owed.key, owed.captured_at_ns) == ("t/00000/00000000000000000007", None)


def test_what_two_consumers_give_up_is_lost_once(settings):
    ours, theirs = Debts(settings), Debts(settings)
    ours.note(frame(7), HEAT)
    for debts in (ours, theirs):
        debts.settle("t/0/7", paid=False)
    assert (len(ours), ours.lost()) == (0, 1)


def test_a_note_that_cannot_be_read_is_named_counted_and_stops_no_other(settings, caplog):
    debts = Debts(settings)
    redis, odd = make_redis(settings), {"t/0/1": "{", "t/0/2": "[]", "t/0/3": '{"shape": [9, 9]}'}
    debts.note(frame(7), HEAT)
    ((_, good),) = redis.hgetall(debts._key).items()
    odd["nothing"] = good
    redis.hset(debts._key, mapping=odd)
    assert [owed.frame_id for owed in debts.some(16)] == ["t/0/7"]
    assert (len(debts), debts.lost()) == (1, len(odd))
    said = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert all(any(f" {name} " in line for line in said) for name in odd)
