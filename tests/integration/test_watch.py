"""What the console and the metrics say of the stream, on real Kafka, Redis and S3."""

import io
import time
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from kafka import TopicPartition
from results import put, result

from infra import decisions, looks
from infra.decisions import Decision
from infra.errors import AuthFailed, DataError, NotFound, ServiceUnavailable, VersionBroken
from infra.kafka_client import ensure_topics, make_admin, make_producer
from infra.looks import Look
from infra.metrics import ExpiryMetrics, WatchMetrics
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets, make_minio
from serving.archive import Debts
from serving.watch import Watch

pytestmark = pytest.mark.integration


@pytest.fixture
def watch(settings):
    """One that looks when it is told to: without its threads."""
    made = Watch.__new__(Watch)
    made._settings, made._results = settings, ResultStore(settings)
    made._metrics, made._kafka, made.waiting = WatchMetrics(), None, {}
    made._expiry, made._expired_s = ExpiryMetrics(), {}
    made._models, made._store = {"default"}, ModelStore(settings)
    made._decisions, made._listed, made._debts = {}, {}, Debts(settings)
    yield made
    if made._kafka is not None:
        made._kafka.close()


def send(settings, by_partition):
    producer = make_producer(settings)
    for partition, frames in enumerate(by_partition):
        for _ in range(frames):
            producer.send(settings.kafka.topic, key=b"cam", value=b"x", partition=partition)
    producer.flush()
    producer.close()


def test_all_partitions_wait_whoever_reads_them(settings, watch):
    """Each consumer replica knows its own partitions only: the sum is nobody's but Kafka's."""
    ensure_topics(settings)
    group, topic = settings.kafka.group, settings.kafka.topic
    send(settings, (5, 3))
    watch._results.publish(group, topic, 0, 0, 2, [])
    watch._look_at_lag()
    rest = dict.fromkeys(range(2, settings.kafka.partitions), 0)
    assert watch.waiting == {0: 3, 1: 3, **rest}
    watch._results.publish(group, topic, 0, 2, 5, [])
    watch._look_at_lag()
    assert watch.waiting == {0: 0, 1: 3, **rest}


def test_frames_that_expired_unscored_are_shown_while_no_consumer_lives(
    settings, watch, monkeypatch
):
    ensure_topics(settings)
    group, topic = settings.kafka.group, settings.kafka.topic
    shown = []
    monkeypatch.setattr(watch._expiry, "show", lambda topic, last_s: shown.append(dict(last_s)))
    send(settings, (5, 3, 3))
    watch._results.publish(group, topic, 0, 0, 2, [])
    watch._results.set_start(group, topic, 2, 0)  # and then the consumer died
    watch._look_at_lag()
    admin = make_admin(settings)
    admin.delete_records({TopicPartition(topic, p): to for p, to in ((0, 4), (1, 2), (2, 1))})
    admin.close()
    watch._look_at_lag()
    # Of partition 1 nothing was ever asked to be scored: a group that begins finds what is there.
    assert [sorted(each) for each in shown] == [[], [0, 2]]
    assert shown[1][0] == pytest.approx(time.time(), abs=30)
    watch._results.publish(group, topic, 0, 2, 5, [])
    watch._look_at_lag()
    assert shown[2][0] == shown[1][0]
    assert shown[2][2] > shown[1][2]


@pytest.mark.parametrize("sent", [1, 6])
def test_all_frames_of_a_topic_made_anew_wait(settings, watch, sent):
    """Fewer than are stored of the old one, or more: then Kafka's id tells."""
    ensure_topics(settings)
    group, topic = settings.kafka.group, settings.kafka.topic
    watch._results.set_topic_id(group, topic, "the id of the old one")
    watch._results.publish(group, topic, 0, 0, 4, [])
    send(settings, (sent,))
    watch._look_at_lag()
    assert watch.waiting[0] == sent


def test_a_camera_was_last_seen_when_its_frame_was_scored(watch, monkeypatch):
    """As `dpdl status` and the console have it: its own clock may be a day late."""
    scored_s = 1_800_000_000
    late = replace(
        result(0, "cam"),
        captured_at_ns=(scored_s - 86400) * 10**9,
        scored_at_ns=scored_s * 10**9,
    )
    put(watch._results, 0, [late])
    shown = []
    monkeypatch.setattr(watch._metrics, "cameras", shown.extend)
    watch._look_at_cameras()
    assert [(each.camera, each.last_frame_s) for each in shown] == [("cam", scored_s)]


def test_when_the_pointer_moved_and_that_a_broken_one_is_not_taken_for_s3_away(
    settings, watch, monkeypatch
):
    ensure_buckets(settings)
    shown = []
    monkeypatch.setattr(watch._metrics, "pointer", lambda *found: shown.append(found))
    monkeypatch.setattr("serving.watch.DECISIONS_S", 0.0)
    watch._look_at_decisions()
    watch._store.put_version("default", "v-1", {"a": b"x"}, {})
    moved = watch._store.move_pointer("default", "v-1", None, by="someone", why="overruled")
    watch._look_at_decisions()
    at_s = datetime.fromisoformat(moved.promoted_at).timestamp()
    assert shown == [("default", 0.0), ("default", at_s)]
    bucket = settings.s3.models_bucket
    make_minio(settings).put_object(bucket, "default/current.json", io.BytesIO(b"{}"), 2)
    watch._look_at_decisions()
    assert len(shown) == 2


def test_a_decision_that_is_broken_hides_no_other_and_is_not_taken_for_s3_away(
    settings, watch, monkeypatch, caplog
):
    ensure_buckets(settings)
    for candidate in ("r-1", "r-3"):
        decisions.record(
            settings, "default", Decision(candidate, None, "promoted", "better", {}, {})
        )
    client, bucket = make_minio(settings), settings.s3.models_bucket
    client.put_object(bucket, "default/decisions/r-2.json", io.BytesIO(b"{"), 1)
    shown = []
    monkeypatch.setattr(watch._metrics, "refreshes", lambda *found: shown.append(found[:3]))
    monkeypatch.setattr("serving.watch.DECISIONS_S", 0.0)
    watch._look_at_decisions()
    watch._look_at_decisions()
    assert shown == 2 * [("default", "promoted", 2), ("default", "held", 0)]
    assert [each.name for each in caplog.records if "r-2.json" in each.message] == [
        "dpdl.decisions"
    ]
    # Who settles inputs by them goes no further: those of the broken one are not known.
    with pytest.raises(DataError, match=r"r-2\.json"):
        decisions.recorded(settings, "default")


def test_only_a_store_that_does_not_answer_is_down(watch, monkeypatch):
    class Ended(BaseException):
        pass

    def ended(seconds):
        raise Ended

    monkeypatch.setattr("serving.watch.time.sleep", ended)
    watch._trouble, watch._replica, shown = {}, SimpleNamespace(alive=lambda: None), {}
    monkeypatch.setattr(watch._metrics, "store", lambda name, up: shown.update({name: up}))
    for error in (ServiceUnavailable(), AuthFailed(), NotFound(), DataError(), VersionBroken()):

        def look(error=error):
            raise error

        with pytest.raises(Ended):
            watch._follow(type(error).__name__, look)
    with pytest.raises(Ended):
        watch._show()
    assert [name for name, up in shown.items() if up] == ["DataError", "VersionBroken"]


def test_when_a_loop_of_refreshes_is_due_and_nothing_where_there_was_none(
    settings, watch, monkeypatch
):
    ensure_buckets(settings)
    shown = []
    monkeypatch.setattr(watch._metrics, "look_due", lambda *found: shown.append(found))
    monkeypatch.setattr("serving.watch.DECISIONS_S", 0.0)
    watch._look_at_decisions()
    looks.record(settings, "default", Look(1000.0))
    watch._look_at_decisions()
    looks.record(settings, "default", Look(2000.0))
    watch._look_at_decisions()
    assert shown == [("default", 1000.0), ("default", 2000.0)]


def test_evidence_that_is_owed_and_lost_is_what_redis_holds(settings, watch, monkeypatch):
    shown = []
    monkeypatch.setattr(watch._metrics, "evidence", lambda *found: shown.append(found))
    frame = SimpleNamespace(frame_id="t/0/1", evidence_key="key")
    watch._look_at_cameras()
    Debts(settings).note(frame, np.eye(4))
    watch._look_at_cameras()
    Debts(settings).settle("t/0/1", paid=False)
    watch._look_at_cameras()
    assert shown == [(0, 0), (1, 0), (0, 1)]
