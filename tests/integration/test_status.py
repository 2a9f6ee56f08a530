"""`dpdl status` on real services: what it shows, and what it says when a part is away."""

import io
import time
from dataclasses import replace

import pytest
from kafka import TopicPartition
from results import result
from rich.console import Console

from cluster.status import show_status
from infra.kafka_client import ensure_topics, make_admin, make_producer
from infra.messages import frame_headers
from infra.redis_client import ResultStore
from infra.settings import load_settings

pytestmark = pytest.mark.integration


def shown(settings):
    console = Console(file=io.StringIO(), width=200)
    found = show_status(settings, "default", console)
    return found, console.file.getvalue()


def scored(settings, camera, offset, scored_at_ns, captured_at_ns=None):
    return replace(
        result(offset, camera),
        frame_id=f"{settings.kafka.topic}/0/{offset}",
        captured_at_ns=captured_at_ns or scored_at_ns,
        scored_at_ns=scored_at_ns,
    )


def test_lag_and_cameras_are_those_of_the_stream(settings):
    ensure_topics(settings)
    producer = make_producer(settings)
    for _ in range(5):
        producer.send(
            settings.kafka.topic, key=b"line-1", value=b"x", partition=0,
            headers=frame_headers(time.time_ns(), "image/jpeg"),
        )  # fmt: skip
    producer.flush()
    producer.close()
    store, now = ResultStore(settings), time.time_ns()
    group, topic = settings.kafka.group, settings.kafka.topic
    rows = [
        scored(settings, "line-1", 0, now),
        scored(settings, "[red]odd[/]", 1, now - 3600 * 10**9),
    ]
    # Clocks that are wrong by a day, in either direction.
    day = 86400 * 10**9
    rows += [
        scored(settings, "late", 2, now, now - day),
        scored(settings, "early", 3, now - 3600 * 10**9, now + day),
    ]
    store.publish(group, topic, 0, 0, 4, rows)
    store.close()
    found, text = shown(settings)
    assert found["lag"][0] == {"partition": 0, "next": 4, "end": 5, "lag": 1}
    assert {c["camera"]: c["silent"] for c in found["cameras"]} == {
        "line-1": False,
        "[red]odd[/]": True,
        "late": False,
        "early": True,
    }
    assert "lag: 1 frames" in text
    assert "[red]odd[/]" in text
    assert "silent" in text
    assert "no version yet" in text
    assert found["stream"] == {}


def test_silent_cameras_are_shown_before_those_that_send(settings, monkeypatch):
    monkeypatch.setattr("cluster.status.SHOWN_CAMERAS", 3)
    ensure_topics(settings)
    store, now = ResultStore(settings), time.time_ns()
    rows = [scored(settings, f"sends-{i}", i, now) for i in range(5)]
    rows += [scored(settings, "silent-1", 5, now - 3600 * 10**9)]
    store.publish(settings.kafka.group, settings.kafka.topic, 0, 0, len(rows), rows)
    store.close()
    found, text = shown(settings)
    assert found["cameras"][0]["camera"] == "silent-1"
    assert "silent-1" in text
    assert "and 3 more" in text


def test_a_part_that_is_away_is_one_line_and_the_others_are_shown(settings, stack):
    ensure_topics(settings)
    stack.pause("redis")
    try:
        found, text = shown(settings)
    finally:
        stack.resume("redis")
    assert "error" in found["lag"]
    assert "error" in found["cameras"]
    assert found["versions"] == {"model": "default", "current": None}
    assert not found["healthy"]
    assert text.count("Redis at") >= 2


def test_frames_that_retention_removed_do_not_wait(settings):
    ensure_topics(settings)
    producer, topic = make_producer(settings), settings.kafka.topic
    for _ in range(5):
        producer.send(topic, key=b"line-1", value=b"x", partition=0)
    producer.flush()
    producer.close()
    admin = make_admin(settings)
    admin.delete_records({TopicPartition(topic, 0): 3})
    admin.close()
    found, _ = shown(settings)
    assert found["lag"][0] == {"partition": 0, "next": 3, "end": 5, "lag": 2}
    store = ResultStore(settings)
    store.set_start(settings.kafka.group, topic, 0, 1)  # scored so far, then overtaken
    store.close()
    assert shown(settings)[0]["lag"][0]["lag"] == 2


def test_a_service_that_is_configured_elsewhere_is_asked(settings, stack, monkeypatch):
    """The same servers, named in the environment as a plant would name its own."""
    ensure_topics(settings)
    secret = settings.s3.secret_key.get_secret_value()
    monkeypatch.setenv("DPDL_S3_ENDPOINT", settings.s3.endpoint)
    monkeypatch.setenv("DPDL_S3_ACCESS_KEY", settings.s3.access_key)
    monkeypatch.setenv("DPDL_S3_SECRET_KEY", secret)
    plant = load_settings()
    assert plant.is_external("s3")
    found, text = shown(plant)
    assert found["healthy"]
    assert "configured elsewhere, answers" in text
    monkeypatch.setenv("DPDL_S3_SECRET_KEY", "wrong")
    found, text = shown(load_settings())
    assert not found["healthy"]
    assert "configured elsewhere: S3 at" in text
    assert secret not in text
