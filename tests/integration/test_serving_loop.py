"""The loop on real Kafka, Redis and S3: crashes between steps, a zombie, faults of each service.

The scorer here is a few lines of NumPy (brightness), so that the oracle is known in advance; the
model and Ray Serve are in test_serving_app.py.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import defaultdict
from concurrent.futures import Future

import cv2
import numpy as np
import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError

from infra.dead_letters import DeadLetters
from infra.errors import ServiceUnavailable
from infra.kafka_client import (
    _build,
    bounds_of,
    end_offsets,
    ensure_topics,
    make_admin,
    make_consumer,
    make_producer,
)
from infra.messages import evidence_key, frame_headers
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets
from serving.archive import EvidenceBucket, open_archive
from serving.batch import Plan, Polled, Scored, Span
from serving.decode import Decoder
from serving.loop import Loop
from serving.publish import StreamSink
from serving.source import KafkaSource, consumer_group

pytestmark = pytest.mark.integration

SIZE = 16
NUM_CAMERAS = 4
THRESHOLD = 200.0


class Crash(BaseException):
    """The process is gone."""


class Brightness:
    """serving.batch.Score: mean of the pixels; bright frames are anomalies."""

    def plan(self):
        return Plan(SIZE)

    def submit(self, batch):
        score = batch.images.mean(axis=(1, 2, 3)).astype(np.float32)
        future = Future()
        future.set_result(
            Scored(
                model="brightness",
                version="v1",
                image_size=SIZE,
                score=score,
                energy=score,
                threshold=np.full(len(score), THRESHOLD, np.float32),
                maps={
                    int(i): np.ones((4, 4), np.float32) for i in np.flatnonzero(score > THRESHOLD)
                },
            )
        )
        return future


class Life:
    """One consumer process: everything real but the scorer. `trap(step, moment)` may raise."""

    def __init__(self, settings, trap=None):
        self.settings = settings
        self.ends = contextlib.ExitStack()
        dead = DeadLetters(settings)
        self.ends.callback(dead.close, 1)
        archive = open_archive(settings)
        self.ends.callback(archive.close)
        decoder = Decoder(2)
        self.ends.callback(decoder.close)
        self.results = ResultStore(settings)
        consumer = make_consumer(settings, group=consumer_group(settings, self.results))
        self.source = KafkaSource(consumer, self.results, settings)
        self.ends.callback(self.source.close, 2)
        self.sink = StreamSink(self.results, archive, dead, group=settings.kafka.group)
        self.reports = []
        if trap:
            self._trapped(self.source, ["poll", "commit"], trap)
            self._trapped(self.sink, ["set_aside", "keep_evidence", "publish"], trap)
        self.loop = Loop(
            self.source, decoder, Brightness(), self.sink, report=self.reports.append, drain_s=2
        )

    def _trapped(self, part, names, trap):
        for name in names:
            real = getattr(part, name)

            def step(*args, real=real, name=name):
                trap(name, "before")
                value = real(*args)
                trap(name, "after")
                return value

            setattr(part, name, step)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.ends.close()

    def run_to_the_end(self, deadline_s=60.0):
        """Until Redis stands at Kafka's end."""
        watcher = threading.Thread(target=self._stop_at_the_end, args=(deadline_s,))
        watcher.start()
        try:
            self.loop.run()
        finally:
            self.loop.stop()
            watcher.join()

    def _stop_at_the_end(self, deadline_s):
        kafka, until = self.settings.kafka, time.monotonic() + deadline_s
        while time.monotonic() < until and not self.loop._stop.is_set():
            with contextlib.suppress(Exception):  # one may be down: that is what is tested
                end = end_offsets(self.settings, kafka.topic)
                if self.results.progress(kafka.group, kafka.topic) == end:
                    break
            time.sleep(0.2)
        self.loop.stop()


@pytest.fixture
def topic(settings):
    ensure_topics(settings)
    ensure_buckets(settings)
    return settings.kafka.topic


def frame(level):
    return cv2.imencode(".png", np.full((8, 8, 3), level, np.uint8))[1].tobytes()


def send(settings, num_frames, *, bad_every=0, bright_every=7):
    """Frames of NUM_CAMERAS cameras, some bright; every bad_every-th record is no image."""
    producer = make_producer(settings)
    sent = []
    for i in range(num_frames):
        camera = f"cam-{i % NUM_CAMERAS}"
        value = frame(250 if bright_every and i % bright_every == 0 else 20 + i % 100)
        if bad_every and i % bad_every == bad_every - 1:
            value = value[: len(value) // 2]
        sent.append(
            producer.send(
                settings.kafka.topic,
                key=camera.encode(),
                value=value,
                headers=frame_headers(time.time_ns(), "image/png"),
            )
        )
    for each in sent:
        each.get(timeout=30)
    producer.close()


def read_topic(settings, topic):
    """Everything in a topic, by a plain consumer: the oracle's view."""
    consumer = make_consumer(settings)
    try:
        places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
        consumer.assign(places)
        end = consumer.end_offsets(places)
        for place in places:
            consumer.seek(place, 0)
        records = []
        while any(consumer.position(place) < end[place] for place in places):
            for got in consumer.poll(timeout_ms=500).values():
                records += got
        return records
    finally:
        consumer.close()


def check_nothing_lost_nothing_twice(settings):
    """Kafka's offsets against what is in Redis; none of the code under test counts."""
    results = ResultStore(settings)
    records = read_topic(settings, settings.kafka.topic)
    dead = read_topic(settings, settings.kafka.dead_topic)
    dead_ids = {dict(record.headers)["dead-frame"].decode() for record in dead}
    want, alerts = defaultdict(list), {}
    for record in records:
        frame_id = f"{record.topic}/{record.partition}/{record.offset}"
        image = cv2.imdecode(np.frombuffer(record.value, np.uint8), cv2.IMREAD_COLOR)
        if frame_id in dead_ids:
            continue
        want[record.key.decode()].append(frame_id)
        if image.mean() > THRESHOLD:
            captured_at_ns = int(dict(record.headers)["captured-at"])
            alerts[frame_id] = evidence_key(frame_id, captured_at_ns)
    for camera, frame_ids in want.items():
        got = [each.result.frame_id for each in results.scores(camera, 10_000)][::-1]
        assert got == frame_ids, f"{camera}: lost, doubled or out of order"
    got = sorted(each.result.frame_id for each in results.alerts("0", 10_000))
    assert got == sorted(alerts)
    kafka = settings.kafka
    assert results.progress(kafka.group, kafka.topic) == end_offsets(settings, kafka.topic)
    return dead_ids, alerts


def test_bad_records_among_good_ones(settings, topic):
    send(settings, 120, bad_every=10)
    with Life(settings) as life:
        life.run_to_the_end()
    dead_ids, alerts = check_nothing_lost_nothing_twice(settings)
    assert len(dead_ids) == 12
    assert ResultStore(settings).dead_letters() == {"truncated": 12}
    bucket = EvidenceBucket(settings)
    for key in alerts.values():
        assert bucket.get(f"{key}/frame") == frame(250)
        assert bucket.get(f"{key}/heat.png").startswith(b"\x89PNG")


def test_dead_letters_larger_than_their_topic_admits(settings):
    """A topic made by hand takes 100 KB: larger ones are kept without their bytes."""
    limit, kafka = 100_000, settings.kafka
    admin = make_admin(settings)
    config = {"max.message.bytes": str(limit)}
    admin.create_topics(
        {kafka.dead_topic: {"num_partitions": 1, "replication_factor": 1, "configs": config}}
    )
    admin.close()
    ensure_topics(settings)
    ensure_buckets(settings)
    send(settings, 30)
    sizes = [3 * limit, 10, 2 * limit, 20, 80 * limit, limit // 2, limit // 2, limit // 2]
    producer = make_producer(settings)
    oversized_header = [("x", bytes(2 * limit))]
    for i, size in enumerate(sizes):
        headers = [*frame_headers(i + 1, "image/jpeg"), *(oversized_header if i == 4 else ())]
        producer.send(kafka.topic, key=b"cam-0", value=b"!" * size, headers=headers).get(60)
    producer.close()
    send(settings, 30)
    with Life(settings) as life:
        life.run_to_the_end(30)
    dead_ids, _ = check_nothing_lost_nothing_twice(settings)
    assert len(dead_ids) == len(sizes)
    assert ResultStore(settings).dead_letters() == {"not-an-image": len(sizes)}
    dead = [(dict(each.headers), each) for each in read_topic(settings, kafka.dead_topic)]
    assert len(dead) == len(sizes)
    dead.sort(key=lambda letter: int(letter[0]["dead-frame"].rsplit(b"/")[-1]))
    assert [int(headers["dead-size"]) for headers, _ in dead] == sizes
    assert [len(each.value) for _, each in dead] == [s if s < limit else 0 for s in sizes]
    assert ["captured-at" in headers for headers, _ in dead] == [i != 4 for i in range(len(sizes))]
    assert {each.key for _, each in dead} == {b"cam-0"}


def test_a_crash_between_every_two_steps(settings, topic):
    """Each life dies at another step of the second batch that it carries; the last one ends."""
    send(settings, 600, bad_every=25)
    steps = ["poll", "set_aside", "keep_evidence", "publish", "commit"]
    died = []
    for step, moment in itertools.product(steps, ["before", "after"]):
        calls = itertools.count()

        def trap(name, now, step=step, moment=moment, calls=calls):
            if (name, now) == (step, moment) and next(calls) == 1:
                died.append(name)
                raise Crash(f"{moment} {name}")

        with Life(settings, trap) as life, contextlib.suppress(Crash):
            life.run_to_the_end(20)
    assert died == [step for step in steps for _ in range(2)]
    with Life(settings) as life:
        life.run_to_the_end()
    dead_ids, _ = check_nothing_lost_nothing_twice(settings)
    assert len(dead_ids) == 24
    assert ResultStore(settings).dead_letters() == {"truncated": 24}  # counted once each


def test_two_consumers_share_and_one_takes_over(settings, topic):
    send(settings, 400)
    with Life(settings) as first, Life(settings) as second:
        threads = [threading.Thread(target=life.run_to_the_end) for life in (first, second)]
        threads[0].start()
        time.sleep(1)
        threads[1].start()
        time.sleep(1)
        send(settings, 400)
        threads[0].join()
        threads[1].join()
    with Life(settings) as last:
        last.run_to_the_end()
    check_nothing_lost_nothing_twice(settings)


def test_installations_with_a_redis_each_do_not_share_a_topics_frames(settings, topic):
    """Each scores all of them, though both call their group alike: consumers of one share."""
    send(settings, 60)
    redis = settings.redis.model_copy(update={"prefix": settings.redis.prefix + "-other"})
    other = settings.model_copy(update={"redis": redis})
    with Life(settings) as ours, Life(other) as theirs:
        threads = [threading.Thread(target=life.run_to_the_end) for life in (ours, theirs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ours.results.store_id() == ResultStore(settings).store_id()
    for each in (settings, other):
        check_nothing_lost_nothing_twice(each)


def test_frames_behind_are_told_at_each_poll_and_not_of_partitions_that_are_gone(settings, topic):
    """The autoscaler goes by them, also while no batch comes to its end."""
    send(settings, 40)
    limits = settings.stream.model_copy(update={"max_batch": 1})
    one_by_one = settings.model_copy(update={"stream": limits})
    with Life(one_by_one) as life:
        ends = {p: end for p, end in end_offsets(settings, topic).items() if end}
        at, until = dict.fromkeys(ends, 0), time.monotonic() + 30
        while not life.source.behind.keys() >= ends.keys() and time.monotonic() < until:
            if polled := life.source.poll(lambda: False):
                at |= {span.partition.number: span.next for span in polled.spans}
        told = {p: end - at[p] for p, end in ends.items()}
        assert told == {p: life.source.behind[p] for p in ends}
        assert sum(told.values()) > 0
        busiest = max(told, key=told.get)
        life.source.on_partitions_revoked([TopicPartition(topic, busiest)])
        life.source.idle(0)
        assert busiest not in life.source.behind


def test_a_zombie_is_fenced(settings, topic):
    """A consumer that sleeps while its partitions go to another: what it publishes is refused."""
    send(settings, 64)
    slept = []

    def trap(name, now):
        if (name, now) == ("publish", "before") and not slept:
            slept.append(name)
            for partition in list(zombie.source._leases):
                publish_behind_its_back(settings, zombie, partition, num_records=5)

    with Life(settings, trap) as zombie:
        zombie.run_to_the_end()
    assert sum(report.dropped_spans for report in zombie.reports) > 0
    check_nothing_lost_nothing_twice(settings)


def publish_behind_its_back(settings, life, partition, num_records):
    """What the partition's new owner would publish first."""
    records = [r for r in read_topic(settings, partition.topic) if r.partition == partition.number]
    start = life.results.next_offset(settings.kafka.group, *partition)
    records = [record for record in records if record.offset >= start][:num_records]
    span = Span(partition, start, start + len(records), lease=0)
    results = []
    for batch in Decoder(1)(Polled(records, [span]), Plan(SIZE)).batches:  # none of no records
        results += life.loop._judge(batch, Brightness().submit(batch).result())[0]
    type(life.sink).publish(life.sink, span, results, {})


def test_frames_that_expired_unscored_are_passed_over_and_said(settings, topic):
    send(settings, 60)
    number, end = max(end_offsets(settings, topic).items(), key=lambda found: found[1])
    # Scored so far, then overtaken.
    ResultStore(settings).set_start(settings.kafka.group, topic, number, 1)
    admin = make_admin(settings)
    admin.delete_records({TopicPartition(topic, number): end - 2})
    admin.close()
    with Life(settings) as life:
        life.run_to_the_end()
        assert life.source.expired_s == {number: pytest.approx(time.time(), abs=60)}
        offsets = [report.offsets.get(str(number)) for report in life.reports]
    spans = [each for each in offsets if each]
    assert (spans[0][0], spans[-1][1]) == (1, end)


def test_nothing_waits_behind_a_transaction_that_is_over(settings, topic):
    """Kafka counts its control record, which no consumer is given: here it comes alone."""
    producer = _build(KafkaProducer, settings, transactional_id="line-1")
    producer.init_transactions()

    def scored_up_to(offset):
        group, until = settings.kafka.group, time.monotonic() + 30
        while life.results.progress(group, topic).get(number) != offset:
            assert time.monotonic() < until
            time.sleep(0.05)

    with Life(settings) as life:
        running = threading.Thread(target=life.loop.run)
        running.start()
        try:
            for ending in (producer.commit_transaction, producer.abort_transaction):
                producer.begin_transaction()
                sent = producer.send(topic, frame(20), b"cam-0", frame_headers(1, "image/png"))
                number, offset = sent.get(30).partition, sent.get(30).offset
                scored_up_to(offset + 1)
                ending()
                scored_up_to(offset + 2)
        finally:
            life.loop.stop()
            running.join()
        assert life.source.behind[number] == 0
        assert life.results.camera("cam-0").frames == 2
    producer.close()
    assert end_offsets(settings, topic)[number] == offset + 2 == 4


def test_frames_that_kafka_lost_stop_no_partition_and_what_comes_next_is_scored(settings, topic):
    """As after a power cut: of one partition, what is stored lies beyond Kafka's end."""
    send(settings, 60)
    with Life(settings) as life:
        life.run_to_the_end()
    ends, kafka = end_offsets(settings, topic), settings.kafka
    cut = max(ends, key=ends.get)
    ResultStore(settings).publish(kafka.group, topic, cut, ends[cut], ends[cut] + 5, [])
    with Life(settings) as life:
        running = threading.Thread(target=life.loop.run)
        running.start()
        until = time.monotonic() + 30
        while not life.source.lost and time.monotonic() < until:
            time.sleep(0.1)
        send(settings, 60)
        life._stop_at_the_end(60)
        running.join()
        assert life.source.lost == {cut: (5, pytest.approx(time.time(), abs=60))}
    check_nothing_lost_nothing_twice(settings)


def make_anew(settings):
    """The topic again, by its name, with no frames in it."""
    admin = make_admin(settings)
    try:
        admin.delete_topics([settings.kafka.topic])
        until = time.monotonic() + 30
        while time.monotonic() < until and any(
            each["error_code"] == 0 for each in admin.describe_topics([settings.kafka.topic])
        ):
            time.sleep(0.2)
    finally:
        admin.close()
    ensure_topics(settings)


def refused(life):
    """Polls until it says why it reads nothing."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            assert life.source.poll(lambda: False) is None
        except ServiceUnavailable as error:
            return str(error)
    pytest.fail("it reads on")


def test_a_topic_made_anew_is_not_read_from_where_the_old_one_ended(settings, topic):
    """Neither while it holds fewer frames than are stored, nor with more, nor after a restart."""
    send(settings, 60)
    with Life(settings) as life:
        life.run_to_the_end()
    make_anew(settings)
    send(settings, 20)
    with Life(settings) as life:
        assert "made anew" in refused(life)
        send(settings, 200)
        assert "made anew" in refused(life)
    with Life(settings) as life:
        assert "made anew" in refused(life)
    # What the error says to do: another group begins with the first frame.
    kafka = settings.kafka.model_copy(update={"group": settings.kafka.group + "-2"})
    with Life(settings.model_copy(update={"kafka": kafka})) as life:
        life.run_to_the_end()
        assert sum(len(report.results) for report in life.reports) == 220


def test_what_a_former_owner_publishes_meanwhile_is_no_topic_made_anew(
    settings, topic, monkeypatch
):
    """Frames come and are published between the two looks of who takes a partition over."""
    results, group = ResultStore(settings), settings.kafka.group
    for partition in range(settings.kafka.partitions):
        results.set_start(group, topic, partition, 0)
    done = []

    def then_others_publish(look):
        def looked(*asked):
            found = look(*asked)
            if not done:
                done.append(look)
                send(settings, 40)
                for partition, end in end_offsets(settings, topic).items():
                    if end:
                        results.publish(group, topic, partition, 0, end, [])
            return found

        return looked

    with Life(settings) as life:
        monkeypatch.setattr("serving.source.bounds_of", then_others_publish(bounds_of))
        life.results.next_offset = then_others_publish(life.results.next_offset)
        until = time.monotonic() + 30
        while len(life.source._leases) < settings.kafka.partitions and time.monotonic() < until:
            life.source.poll(lambda: False)
        assert done
        assert len(life.source._leases) == settings.kafka.partitions


def test_without_kafkas_id_a_topic_is_refused_for_as_long_as_the_process_lives(
    settings, topic, monkeypatch
):
    """It is seen only while the topic ends before what is stored."""
    monkeypatch.setattr("serving.source.topic_id", lambda *asked: "")
    results = ResultStore(settings)
    for partition in range(settings.kafka.partitions):
        results.set_start(settings.kafka.group, topic, partition, 5)
    with Life(settings) as life:
        assert "Kafka ends at 0" in refused(life)
        send(settings, 100)
        assert "Kafka ends at 0" in refused(life)


def test_redis_away_stops_the_stream_and_it_goes_on(settings, topic, stack):
    send(settings, 200)
    killed = []

    def trap(name, now):
        if (name, now) == ("publish", "before") and not killed:
            killed.append(name)
            stack.kill("redis")
            threading.Timer(1.5, stack.start_service, ["redis"]).start()

    with Life(settings, trap) as life:
        life.run_to_the_end()
    assert killed
    check_nothing_lost_nothing_twice(settings)


def test_kafka_away_and_back(settings, topic, stack):
    send(settings, 200)
    killed = []

    def trap(name, now):
        if (name, now) == ("commit", "after") and not killed:
            killed.append(name)
            stack.kill("kafka")
            stack.start_service("kafka")

    with Life(settings, trap) as life:
        life.run_to_the_end()
    assert killed
    check_nothing_lost_nothing_twice(settings)


def test_an_error_while_waiting_leaves_no_partition_paused(settings, topic):
    send(settings, 200)
    failed = []

    def trap(name, now):
        if (name, now) == ("publish", "before") and not failed:
            consumer, poll = life.source._consumer, life.source._consumer.poll

            def fail(**options):
                consumer.poll = poll
                failed.append(consumer.paused())
                raise KafkaTimeoutError("planted")

            consumer.poll = fail
            raise ServiceUnavailable("the loop waits, polling idly")

    with Life(settings, trap) as life:
        life.run_to_the_end(30)
    assert failed[0]
    check_nothing_lost_nothing_twice(settings)


def test_s3_away_scoring_goes_on_and_evidence_is_paid_later(settings, topic, stack, monkeypatch):
    monkeypatch.setattr("serving.archive.BREATHER_S", 0.5)
    send(settings, 60)
    stack.kill("s3")
    try:
        with Life(settings) as life:
            life.run_to_the_end()
        _, alerts = check_nothing_lost_nothing_twice(settings)
        assert len(alerts) == 9
    finally:
        stack.start_service("s3")
    bucket, until = EvidenceBucket(settings), time.monotonic() + 20
    archive = open_archive(settings)  # of another replica, or after a restart
    try:
        while time.monotonic() < until and not all(
            bucket.get(f"{key}/frame") for key in alerts.values()
        ):
            time.sleep(0.3)
    finally:
        archive.close()
    for key in alerts.values():
        assert bucket.get(f"{key}/frame") == frame(250)
        assert bucket.get(f"{key}/heat.png").startswith(b"\x89PNG")
