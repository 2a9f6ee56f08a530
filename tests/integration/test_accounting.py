"""The account of frames must find what is planted: a loss, a duplicate, a dead letter."""

import threading

import pytest

from cluster.accounting import take_account, wait_until_scored
from cluster.camera import OutgoingFrame, stream
from infra.dead_letters import DeadLetters
from infra.errors import ServiceUnavailable
from infra.kafka_client import end_offsets, ensure_topics
from infra.messages import FrameResult
from infra.redis_client import ResultStore

pytestmark = pytest.mark.integration


def send(settings, count):
    sent = []
    frames = [OutgoingFrame(f"cam-{i % 2}", b"image %d" % i, str(i)) for i in range(count)]
    stream(settings, frames, frames_per_second=1e4, stop=threading.Event(), on_sent=sent.append)
    return sent


def result(frame):
    return FrameResult(
        frame_id=frame.frame_id,
        camera=frame.camera,
        captured_at_ns=1,
        scored_at_ns=2,
        score=1.0,
        threshold=2.0,
        energy=0.5,
        is_anomaly=False,
        model="m",
        version="v",
        evidence_key="",
    )


def publish(settings, frames):
    """What the stream would write: each partition's frames in one span."""
    store = ResultStore(settings)
    by_partition = {}
    for frame in frames:
        topic, partition, _ = frame.frame_id.rsplit("/", 2)
        by_partition.setdefault((topic, int(partition)), []).append(frame)
    for (topic, partition), some in by_partition.items():
        first = store.next_offset(settings.kafka.group, topic, partition) or 0
        last = int(some[-1].frame_id.rsplit("/", 1)[1])
        results = [result(frame) for frame in some]
        store.publish(settings.kafka.group, topic, partition, first, last + 1, results)
    store.close()


def test_frames_sent_are_acknowledged_in_order_under_their_ids(settings):
    ensure_topics(settings)
    sent = send(settings, 100)
    assert [frame.source for frame in sent] == [str(i) for i in range(100)]
    assert len({frame.frame_id for frame in sent}) == 100
    for camera in ("cam-0", "cam-1"):
        offsets = [int(f.frame_id.rsplit("/", 1)[1]) for f in sent if f.camera == camera]
        assert offsets == sorted(offsets)


def test_nothing_lost_nothing_twice(settings):
    ensure_topics(settings)
    publish(settings, send(settings, 20))
    start = end_offsets(settings, settings.kafka.topic)
    publish(settings, send(settings, 12))
    account = take_account(settings, start)
    assert (account.sent, len(account.results), account.lost, account.duplicated) == (12, 12, 0, 0)


def test_a_planted_loss_and_a_dead_letter_are_told_apart(settings):
    ensure_topics(settings)
    start = end_offsets(settings, settings.kafka.topic)
    frames = send(settings, 10)
    publish(settings, frames[2:])
    topic, partition, offset = frames[0].frame_id.rsplit("/", 2)

    class Record:
        key, value, headers = b"cam-0", b"image 0", []

    record = Record()
    record.topic, record.partition, record.offset = topic, int(partition), int(offset)
    letters = DeadLetters(settings)
    letters.put([(record, "truncated")])
    letters.close(5)
    account = take_account(settings, start)
    assert account.dead == {frames[0].frame_id: "truncated"}
    assert account.lost == 1


def test_a_planted_duplicate_is_counted(settings):
    ensure_topics(settings)
    start = end_offsets(settings, settings.kafka.topic)
    frames = send(settings, 4)
    publish(settings, frames)
    store = ResultStore(settings)
    # Under another group the fence lets the same frame pass once more.
    topic, partition, offset = frames[0].frame_id.rsplit("/", 2)
    store.publish(
        "intruder", topic, int(partition), int(offset), int(offset) + 1, [result(frames[0])]
    )
    store.close()
    account = take_account(settings, start)
    assert (account.duplicated, account.lost) == (1, 0)


def test_waiting_for_a_stream_that_stands_still_ends_with_a_reason(settings):
    ensure_topics(settings)
    send(settings, 3)
    with pytest.raises(ServiceUnavailable, match="3 frames are not scored"):
        wait_until_scored(settings, end_offsets(settings, settings.kafka.topic), stall_s=0.5)
