"""Kafka clients on a real broker: sizes, seeking, credentials, deadlines, a broker that dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource
from kafka.errors import (
    NoOffsetForPartitionError,
    NotEnoughReplicasError,
    OffsetOutOfRangeError,
)
from pydantic import SecretStr

from infra import kafka_client
from infra.dead_letters import DeadLetters
from infra.embedded import Stack
from infra.errors import (
    AuthFailed,
    BadFrame,
    DataError,
    NotFound,
    ServiceUnavailable,
    SettingsError,
)
from infra.kafka_client import (
    BOOTSTRAP_TIMEOUT_S,
    MAX_RECORD_BYTES,
    behind,
    end_offsets,
    ensure_topics,
    kafka_errors,
    make_admin,
    make_consumer,
    make_producer,
)
from infra.messages import MAX_FRAME_BYTES, FrameRecord, frame_headers
from infra.settings import Settings

pytestmark = pytest.mark.integration
MAKERS: list[Callable[[Settings], Any]] = [make_producer, make_consumer, make_admin]


def changed(settings: Settings, **fields: Any) -> Settings:
    return settings.model_copy(update={"kafka": settings.kafka.model_copy(update=fields)})


def send(producer: KafkaProducer, settings: Settings, value: bytes, key: bytes = b"cam-1") -> int:
    headers = frame_headers(5, "image/jpeg")
    sent = producer.send(settings.kafka.topic, value=value, key=key, headers=headers)
    return int(sent.get(timeout=60).offset)


def read(consumer: KafkaConsumer, number: int, within_s: float = 30) -> list[Any]:
    records: list[Any] = []
    deadline = time.monotonic() + within_s
    while len(records) < number and time.monotonic() < deadline:
        for polled in consumer.poll(timeout_ms=500).values():
            records += polled
    return records


def at(settings: Settings, partition: int, offset: int, topic: str = "") -> KafkaConsumer:
    consumer = make_consumer(settings)
    place = TopicPartition(topic or settings.kafka.topic, partition)
    consumer.assign([place])
    consumer.seek(place, offset)
    return consumer


@pytest.mark.parametrize(
    ("stored", "lag"), [(None, 6), (0, 6), (3, 6), (7, 3), (10, 0), (11, 6), (500, 6)]
)
def test_what_waits_in_a_partition_that_holds_offsets_4_to_9(stored: int | None, lag: int) -> None:
    """What is stored beyond its end is of another topic: then all that it holds waits."""
    assert behind(4, 10, stored) == lag


def test_topics_are_made_once_as_the_settings_say(settings: Settings) -> None:
    wanted = changed(settings, partitions=3, retention_hours=0.5, retention_mb=1024)
    ensure_topics(wanted)
    ensure_topics(changed(settings, partitions=5))  # what is there stays as it is
    assert end_offsets(settings, settings.kafka.topic) == {0: 0, 1: 0, 2: 0}
    assert end_offsets(settings, settings.kafka.dead_topic) == {0: 0}
    admin = make_admin(settings)
    found = admin.describe_configs([ConfigResource("topic", settings.kafka.topic)])
    admin.close()
    text = str(found)
    for value in ("1800000", str(2**30), str(MAX_RECORD_BYTES)):
        assert value in text


def test_dead_letters_have_a_retention_of_their_own(settings: Settings) -> None:
    """Friday's frames are gone on Monday; what was wrong with some of them is not."""
    ensure_topics(settings)
    admin = make_admin(settings)
    names = (settings.kafka.topic, settings.kafka.dead_topic)
    found = admin.describe_configs([ConfigResource("topic", name) for name in names])["topic"]
    admin.close()
    kept = [int(found[name]["retention.ms"]["value"]) / 86_400_000 for name in names]
    assert kept == [1, 30]


def test_a_senders_clock_does_not_decide_how_long_its_frames_are_kept(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Two days back or two hours ahead: the record's time is that of its arrival."""
    ensure_topics(changed(settings, partitions=1))
    producer, now_ms = make_producer(settings), int(time.time() * 1000)
    for offset_h in (-48, 2):
        at_ms = now_ms + offset_h * 3_600_000
        producer.send(settings.kafka.topic, b"x", timestamp_ms=at_ms).get(30)
    arrived = [record.timestamp for record in read(at(settings, 0, 0), 2)]
    assert arrived == [pytest.approx(now_ms, abs=60_000)] * 2

    by_hand = changed(settings, topic=settings.kafka.topic + "-by-hand")
    admin = make_admin(settings)
    admin.create_topics({by_hand.kafka.topic: {"num_partitions": 1, "replication_factor": 1}})
    admin.wait_for_topics([by_hand.kafka.topic])
    admin.close()
    ensure_topics(by_hand)
    warned = [each.message for each in caplog.records if each.name == "dpdl.kafka"]
    assert [by_hand.kafka.topic in message for message in warned] == [True]
    with pytest.raises(DataError, match="clock"), kafka_errors(settings.kafka):
        producer.send(by_hand.kafka.topic, b"x", timestamp_ms=now_ms + 7_200_000).get(30)
    producer.close()


def test_what_a_broker_refuses_is_not_told_as_no_answer(settings: Settings) -> None:
    wanted = pytest.raises(ServiceUnavailable, match=r"refused.*NotEnoughReplicas")
    with wanted, kafka_errors(settings.kafka):
        raise NotEnoughReplicasError()


def test_a_missing_topic_is_told(settings: Settings) -> None:
    with pytest.raises(NotFound, match=f"no topic {settings.kafka.topic}"):
        end_offsets(settings, settings.kafka.topic)


def test_a_frame_arrives_and_is_read_from_a_given_offset(settings: Settings) -> None:
    ensure_topics(changed(settings, partitions=1))
    producer = make_producer(settings)
    assert [send(producer, settings, b"image %d" % n) for n in range(5)] == list(range(5))
    consumer = at(settings, 0, 3)
    frames = [FrameRecord.from_kafka(record) for record in read(consumer, 2)]
    assert [frame.image for frame in frames] == [b"image 3", b"image 4"]
    assert frames[0].frame_id == f"{settings.kafka.topic}/0/3"
    assert (frames[0].camera, frames[0].captured_at_ns) == ("cam-1", 5)
    assert end_offsets(settings, settings.kafka.topic) == {0: 5}
    consumer.close()
    producer.close()


def test_a_camera_keeps_to_one_partition_in_order(settings: Settings) -> None:
    ensure_topics(settings)
    producer = make_producer(settings)
    for n in range(40):
        send(producer, settings, b"%d" % n, key=b"cam-%d" % (n % 4))
    producer.close()
    consumer = make_consumer(settings)
    places = [TopicPartition(settings.kafka.topic, p) for p in range(settings.kafka.partitions)]
    consumer.assign(places)
    for place in places:
        consumer.seek(place, 0)
    by_camera: dict[bytes, list[Any]] = {}
    for record in read(consumer, 40):
        by_camera.setdefault(record.key, []).append(record)
    consumer.close()
    assert len(by_camera) == 4
    for records in by_camera.values():
        assert len({record.partition for record in records}) == 1
        numbers = [int(record.value) for record in records]
        assert numbers == sorted(numbers)
        assert len(numbers) == 10


def test_no_frame_is_skipped_in_silence(settings: Settings) -> None:
    """A forgotten seek and a position that retention removed are errors, not a new position."""
    ensure_topics(changed(settings, partitions=1))
    producer = make_producer(settings)
    for n in range(3):
        send(producer, settings, b"%d" % n)
    producer.close()
    place = TopicPartition(settings.kafka.topic, 0)

    forgetful = make_consumer(settings)
    forgetful.assign([place])
    with pytest.raises(NoOffsetForPartitionError):
        read(forgetful, 1)
    forgetful.close()

    admin = make_admin(settings)
    admin.delete_records({place: 2})
    admin.close()
    late = at(settings, 0, 0)
    assert late.beginning_offsets([place]) == {place: 2}
    with pytest.raises(OffsetOutOfRangeError):
        read(late, 1)
    late.seek(place, 2)
    assert [record.offset for record in read(late, 1)] == [2]
    late.close()


def test_an_oversized_frame_arrives_and_becomes_a_dead_letter(settings: Settings) -> None:
    ensure_topics(changed(settings, partitions=1))
    producer = make_producer(settings)
    large = bytes(MAX_FRAME_BYTES)
    assert send(producer, settings, large) == 0
    assert send(producer, settings, large + b"x") == 1
    consumer = at(settings, 0, 0)
    good, bad = read(consumer, 2)
    assert len(FrameRecord.from_kafka(good).image) == MAX_FRAME_BYTES
    with pytest.raises(BadFrame) as raised:
        FrameRecord.from_kafka(bad)
    dead_topic = settings.kafka.dead_topic
    letters = DeadLetters(settings)
    letters.put([(bad, raised.value.reason)])
    letters.close(5)
    [dead] = read(at(settings, 0, 0, dead_topic), 1)
    assert (dead.key, len(dead.value)) == (b"cam-1", MAX_FRAME_BYTES + 1)
    headers = dict(dead.headers)
    assert headers["dead-reason"] == b"too-large"
    assert headers["dead-frame"] == f"{settings.kafka.topic}/0/1".encode()
    assert headers["dead-size"] == str(MAX_FRAME_BYTES + 1).encode()
    assert headers["captured-at"] == b"5"
    consumer.close()
    producer.close()


def test_a_record_with_no_key_and_no_value_is_kept_too(settings: Settings) -> None:
    ensure_topics(changed(settings, partitions=1))
    producer = make_producer(settings)
    producer.send(settings.kafka.topic, value=None, key=b"cam", headers=[("h", b"")]).get(30)
    [record] = read(at(settings, 0, 0), 1)
    letters = DeadLetters(settings)
    letters.put([(record, "empty"), (record._replace(key=None), "no-key")])
    letters.close(5)
    dead = read(at(settings, 0, 0, settings.kafka.dead_topic), 2)
    assert [dict(each.headers)["dead-reason"] for each in dead] == [b"empty", b"no-key"]
    producer.close()


def test_a_record_beyond_kafkas_limit_is_a_data_error(settings: Settings) -> None:
    ensure_topics(settings)
    producer = make_producer(settings)
    with pytest.raises(DataError, match="too large"), kafka_errors(settings.kafka):
        producer.send(settings.kafka.topic, bytes(MAX_RECORD_BYTES + 2 * 2**20)).get(30)
    producer.close()


def test_a_record_that_the_topic_refuses_fails_alone(settings: Settings) -> None:
    """Between others in one batch and by itself; those after it are written once and in order."""
    topic = settings.kafka.topic
    admin = make_admin(settings)
    small = {"num_partitions": 1, "replication_factor": 1, "configs": {"max.message.bytes": "9000"}}
    admin.create_topics({topic: small})
    admin.wait_for_topics([topic])
    admin.close()
    producer = make_producer(settings)
    values = [bytes(20_000) if n % 10 == 7 else b"%d" % n for n in range(60)]
    futures = [producer.send(topic, value, key=b"cam-1") for value in values]
    for value, future in zip(values, futures, strict=True):
        if len(value) > 9000:
            with pytest.raises(DataError, match="too large"), kafka_errors(settings.kafka):
                future.get(30)
        else:
            future.get(30)
    with pytest.raises(DataError, match="too large"), kafka_errors(settings.kafka):
        producer.send(topic, bytes(20_000), key=b"cam-1").get(30)
    producer.send(topic, b"last", key=b"cam-1").get(30)
    producer.close()
    wanted = [value for value in values if len(value) < 9000] + [b"last"]
    assert end_offsets(settings, topic) == {0: len(wanted)}
    consumer = at(settings, 0, 0)
    assert [record.value for record in read(consumer, len(wanted))] == wanted
    consumer.close()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "fields", [{"sasl_password": SecretStr("wrong-secret")}, {"sasl_username": "nobody"}]
)
def test_wrong_credentials_are_one_line_and_leave_no_thread(
    settings: Settings, make: Callable[[Settings], Any], fields: dict[str, Any]
) -> None:
    before = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(AuthFailed, match=r"kafka\.sasl_password") as raised:
        make(changed(settings, **fields))
    assert time.monotonic() - started < BOOTSTRAP_TIMEOUT_S
    assert "\n" not in str(raised.value)
    assert "wrong-secret" not in str(raised.value)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    "fields",
    [
        {"bootstrap": "127.0.0.1:1"},
        {"bootstrap": "nowhere.invalid:9092"},
        {"security_protocol": "PLAINTEXT"},
        {"security_protocol": "SASL_SSL"},
    ],
)
def test_no_kafka_there_is_an_error_in_time_and_leaves_no_thread(
    settings: Settings, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_client, "BOOTSTRAP_TIMEOUT_S", 3.0)
    before = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"dpdl status.*security_protocol") as raised:
        make_consumer(changed(settings, **fields))
    assert time.monotonic() - started < 3.0 + 3
    assert "\n" not in str(raised.value)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"bootstrap": ""}, "DPDL_KAFKA_BOOTSTRAP"),
        ({"security_protocol": "SASL_SSL", "tls_ca": "/nowhere/ca.pem"}, "no such file"),
    ],
)
def test_what_is_missing_is_named(settings: Settings, fields: dict[str, Any], found: str) -> None:
    values = {**settings.kafka.model_dump(), **fields}
    incomplete = settings.model_copy(update={"kafka": type(settings.kafka)(**values)})
    with pytest.raises(SettingsError, match=found):
        make_consumer(incomplete)


def test_no_password_is_logged_even_when_debugging(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """kafka-python logs its whole configuration."""
    caplog.set_level(logging.DEBUG)
    for make in MAKERS:
        make(settings).close()
    secret = settings.kafka.sasl_password
    assert secret is not None
    assert "sasl_plain_password" in caplog.text
    assert secret.get_secret_value() not in caplog.text


def test_clients_outlive_a_broker_that_is_killed(settings: Settings, stack: Stack) -> None:
    ensure_topics(changed(settings, partitions=1))
    producer, consumer = make_producer(settings), at(settings, 0, 0)
    send(producer, settings, b"before")
    assert [record.value for record in read(consumer, 1)] == [b"before"]
    stack.kill("kafka")
    topic = settings.kafka.topic
    late = [producer.send(topic, value=b"late %d" % n, key=b"cam-1") for n in range(3)]
    try:
        with pytest.raises(ServiceUnavailable):
            end_offsets(settings, topic)
    finally:
        stack.start_service("kafka")
    started = time.monotonic()
    assert [future.get(timeout=60).offset for future in late] == [1, 2, 3]
    assert [record.value for record in read(consumer, 3)] == [b"late 0", b"late 1", b"late 2"]
    assert time.monotonic() - started < 30
    assert end_offsets(settings, topic) == {0: 4}
    consumer.close()
    producer.close()
