"""`dpdl status` on real services: what it shows, and what it says when a part is away."""

import io
import time

import pytest
from rich.console import Console

from cluster.status import show_status
from infra.kafka_client import ensure_topics, make_producer
from infra.messages import FrameResult, frame_headers
from infra.redis_client import ResultStore

pytestmark = pytest.mark.integration


def shown(settings):
    console = Console(file=io.StringIO(), width=200)
    found = show_status(settings, "default", console)
    return found, console.file.getvalue()


def result(settings, camera, offset, captured_at_ns):
    return FrameResult(
        frame_id=f"{settings.kafka.topic}/0/{offset}",
        camera=camera,
        captured_at_ns=captured_at_ns,
        scored_at_ns=captured_at_ns,
        score=1.0,
        threshold=2.0,
        energy=0.5,
        is_anomaly=False,
        model="default",
        version="v-1",
        evidence_key="",
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
        result(settings, "line-1", 0, now),
        result(settings, "[red]odd[/]", 1, now - 3600 * 10**9),
    ]
    store.publish(group, topic, 0, 0, 2, rows)
    store.close()
    found, text = shown(settings)
    assert found["lag"][0]["lag"] == 3
    assert {c["camera"]: c["silent"] for c in found["cameras"]} == {
        "line-1": False,
        "[red]odd[/]": True,
    }
    assert "lag: 3 frames" in text
    assert "[red]odd[/]" in text
    assert "silent" in text
    assert "no version yet" in text
    assert found["stream"] == {}


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
