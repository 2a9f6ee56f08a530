"""`dpdl replay` on real Kafka, Redis and S3: right scores, right comparison, nothing touched."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import datetime

import cv2
import numpy as np
import pytest
import torch
from kafka import TopicPartition
from typer.testing import CliRunner

from cluster.cli import app as cli
from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, decode_image
from infra.errors import DataError, NotFound
from infra.kafka_client import (
    end_offsets,
    ensure_topics,
    make_admin,
    make_consumer,
    make_producer,
)
from infra.messages import FrameResult, frame_headers, frame_id
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.redis_connection import make_redis
from infra.s3_client import ensure_buckets
from serving import replay as serving_replay
from serving.replay import Place, ReplayOptions, replay

pytestmark = pytest.mark.integration
CAMERAS = ("cam-0", "cam-1", "cam-2")
NUM_FRAMES = 60
SIZE = 64
KEPT_FROM = 10
"""The stream's results before this frame of all are gone."""


def jpeg(rng, defect=False):
    pixels = (120 + 15 * rng.standard_normal((80, 80, 3))).clip(0, 255).astype(np.uint8)
    if defect:
        pixels[20:50, 20:50] = 255
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def version():
    """A version's files and the model itself."""
    rng = np.random.default_rng(7)
    config = replace(
        recipe("edge"),
        weights="random",
        image_size=SIZE,
        patch_prototypes=16,
        patch_dims=16,
        pseudo_normals=16,
        folds=2,
    )
    normals = np.stack([decode_image(jpeg(rng), SIZE) for _ in range(24)])
    anomalies = np.stack([decode_image(jpeg(rng, defect=True), SIZE) for _ in range(3)])
    model = fit(config, ArraySource(normals), anomalies, seed=1)
    threshold = float(model.score(torch.from_numpy(normals)).score.max()) * 1.5
    thresholds = {"false_alarm_rate": 0.01, "default": threshold, "cameras": {}}
    return artifact.pack(model, thresholds=thresholds, metrics={}), model, threshold


@pytest.fixture
def past(settings, version):
    """Frames in Kafka (every 20th bad), and what the stream said of those that it still knows:
    every second alert of the replay missed, and one false alarm."""
    files, model, threshold = version
    ensure_topics(settings)
    ensure_buckets(settings)
    ModelStore(settings).put_version("default", "v2", files, {})
    rng, producer = np.random.default_rng(1), make_producer(settings)
    sent = []
    for i in range(NUM_FRAMES):
        image = b"broken" if i % 20 == 19 else jpeg(rng, defect=i % 4 == 0)
        camera = CAMERAS[i % len(CAMERAS)]
        done = producer.send(
            settings.kafka.topic,
            key=camera.encode(),
            value=image,
            headers=frame_headers(time.time_ns(), "image/jpeg"),
        ).get(timeout=30)
        sent.append((camera, image, done))
    producer.close()
    scores = {}
    for i, (camera, image, at) in enumerate(sent):
        if image != b"broken":
            pixels = torch.from_numpy(decode_image(image, SIZE)[None])
            frame = frame_id(at.topic, at.partition, at.offset)
            scores[frame] = (camera, float(model.score(pixels).score[0]), i >= KEPT_FROM)
    kept = {frame: score for frame, (_, score, here) in scores.items() if here}
    false_alarm = min(kept, key=kept.__getitem__)
    missed = sorted(frame for frame, score in kept.items() if score > threshold)[::2]
    said = kept | dict.fromkeys(missed, threshold / 2) | {false_alarm: 2 * threshold}
    live = ResultStore(settings)
    for frame, score in said.items():
        result = FrameResult(
            frame_id=frame,
            camera=scores[frame][0],
            captured_at_ns=1,
            scored_at_ns=2,
            score=score,
            threshold=threshold,
            energy=0.0,
            is_anomaly=score > threshold,
            model="default",
            version="v1",
            evidence_key="",
        )
        topic, partition, offset = frame.rsplit("/", 2)
        # A group for each: here it does not matter how the stream got there.
        live.publish(f"g{offset}", topic, int(partition), int(offset), result.offset + 1, [result])
    live.set_start("dpdl", settings.kafka.topic, 0, 5)
    return settings, scores, threshold, said


def snapshot(settings):
    """Everything of the live stream in Redis, byte for byte."""
    client, prefix = make_redis(settings), settings.redis.prefix
    keys = [k for k in client.scan_iter(f"{prefix}:*") if f"{prefix}:replay:" not in k]
    return {key: (client.ttl(key), _read(client, key)) for key in keys}


def _read(client, key):
    kind = client.type(key)
    if kind == "stream":
        return client.xrange(key)
    if kind == "hash":
        return client.hgetall(key)
    if kind == "zset":
        return client.zrange(key, 0, -1, withscores=True)
    return client.get(key)


def test_a_replay_scores_compares_and_touches_nothing(past, tmp_path, monkeypatch):
    settings, scores, threshold, then = past
    before, report = snapshot(settings), tmp_path / "replay.json"
    asked = ["replay", "--from", "0", "--model", "v2", "--report", str(report)]
    ran = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    done = json.loads(report.read_text())
    assert snapshot(settings) == before

    # Its own results: every good frame once, in order, with the score that the model gives offline.
    client, prefix = make_redis(settings), done["results_below"]
    found = {}
    for camera in CAMERAS:
        entries = [fields for _, fields in client.xrange(f"{prefix}:scores:{camera}")]
        offsets = [int(e["frame"].rsplit("/", 1)[1]) for e in entries]
        assert offsets == sorted(offsets)
        found |= {e["frame"]: float(e["score"]) for e in entries}
    assert set(found) == set(scores)
    for frame, (_, score, _) in scores.items():
        assert found[frame] == pytest.approx(score, rel=1e-3, abs=1e-3)
    assert done["bad"] == {"not-an-image": 3}
    keys = list(client.scan_iter(f"{prefix}:*"))
    assert len(keys) >= 2 + 2 * len(CAMERAS)
    assert all(0 < client.ttl(key) <= 7 * 86400 for key in keys)

    # The comparison, by hand.
    kept = {frame: score for frame, (_, score, here) in scores.items() if here}
    only_then = {f for f in kept if then[f] > threshold >= kept[f]}
    only_now = {f for f in kept if kept[f] > threshold >= then[f]}
    assert len(only_now) > 1
    assert (done["frames"], done["compared"]) == (len(scores), len(kept))
    assert done["alerts_only_then"] == len(only_then) == 1
    assert done["alerts_only_now"] == len(only_now)
    differ = len(only_then) + len(only_now)
    assert done["agreement"] == pytest.approx(1 - differ / len(kept))
    wanted = np.corrcoef([then[f] for f in kept], [kept[f] for f in kept])[0, 1]
    assert done["score_correlation"] == pytest.approx(wanted, rel=1e-3)
    assert {e["frame"] for e in done["examples"]} == only_then | only_now
    assert done["versions_then"] == {"default/v1": len(kept)}
    assert sum(c["frames"] for c in done["cameras"].values()) == len(scores)
    assert "only now" in ran.output
    assert "expired" not in ran.output

    _check_ranges(settings, scores)
    _check_debounce(settings, scores, threshold, done)
    _check_thresholds(settings, scores)
    _check_whose_cameras(settings)
    _check_what_expired(settings)
    _check_what_expires_meanwhile(settings, monkeypatch)


def _check_thresholds(settings, scores):
    """A person's holds where it was chosen for the model that is replayed."""
    live = ResultStore(settings)
    live.set_threshold("cam-0", -1e9, by="test")
    live.bind_model("cam-2", "welds", by="test")
    live.set_threshold("cam-2", -1e9, by="test")
    chosen = ReplayOptions(model="default", version="v2", start=Place(offset=0), cameras=CAMERAS)
    found = replay(settings, chosen, lambda *_: None)["cameras"]
    kept = [name for _, (name, _, here) in scores.items() if here]
    assert found["cam-0"]["alerts_now"] == kept.count("cam-0")
    assert found["cam-2"]["alerts_now"] < kept.count("cam-2")


def _check_whose_cameras(settings):
    """cam-2 is bound to welds by now: its frames say nothing of how the default one has changed."""
    ran = CliRunner().invoke(cli, ["replay", "--from", "0", "--model", "v2"])
    assert ran.exit_code == 0, ran.output
    assert "cam-0" in ran.output
    assert "cam-2" not in ran.output
    assert "cameras left out, which other models are to score: 1" in " ".join(ran.output.split())
    ModelStore(settings).put_version("other", "v1", ModelStore(settings).fetch("default", "v2"), {})
    chosen = ReplayOptions(model="other", version="v1", start=Place(offset=0))
    with pytest.raises(DataError, match=r"other is to score none of the cameras .*--camera"):
        replay(settings, chosen, lambda *_: None)


def _check_what_expired(settings):
    """Retention has removed the beginning: it is said where it began, and that more was asked."""
    topic = settings.kafka.topic
    number, end = max(end_offsets(settings, topic).items(), key=lambda found: found[1])
    admin = make_admin(settings)
    admin.delete_records({TopicPartition(topic, number): 3})
    admin.close()
    consumer = make_consumer(settings)
    found = consumer.offsets_for_times({TopicPartition(topic, number): 0})
    consumer.close()
    at_ms = found[TopicPartition(topic, number)].timestamp
    for start, cut in (("0", True), ("1h", True), ("3", False)):
        ran = CliRunner().invoke(
            cli, ["replay", "--from", start, "--model", "v2"], env={"COLUMNS": "400"}
        )
        assert ran.exit_code == 0, ran.output
        at = datetime.fromtimestamp(at_ms / 1000)
        where = f"partition {number} at offset 3 of {at:%Y-%m-%d %H:%M:%S}"
        assert where in ran.output
        assert (f"keeps nothing older of {where}: if you" in ran.output) is cut
    assert end > 3


def _check_what_expires_meanwhile(settings, monkeypatch):
    """Retention overtakes the replay: it goes on where Kafka begins, and counts what is gone."""
    topic, batches = settings.kafka.topic, serving_replay._batches
    number, _ = max(end_offsets(settings, topic).items(), key=lambda found: found[1])

    def overtaken(*rest):
        admin = make_admin(settings)
        admin.delete_records({TopicPartition(topic, number): 7})
        admin.close()
        return batches(*rest)

    monkeypatch.setattr(serving_replay, "_batches", overtaken)
    ran = CliRunner().invoke(
        cli, ["replay", "--from", "3", "--model", "v2"], env={"COLUMNS": "400"}
    )
    assert ran.exit_code == 0, ran.output
    assert f"4 frames of partition {number} expired in Kafka before" in ran.output


def _check_debounce(settings, scores, threshold, without):
    """cam-1 has its own rule, counted here by hand; the other cameras' alerts stay as they were."""
    ResultStore(settings).set_debounce("cam-1", (3, 5), by="test")
    chosen = ReplayOptions(model="default", version="v2", start=Place(offset=0))
    found = replay(settings, chosen, lambda *_: None)["cameras"]
    mine = sorted(
        (int(frame.rsplit("/", 1)[1]), score > threshold, kept)
        for frame, (camera, score, kept) in scores.items()
        if camera == "cam-1"
    )
    over = [is_over for _, is_over, _ in mine]
    alerts = [over[i] and sum(over[max(0, i - 4) : i + 1]) >= 3 for i in range(len(over))]
    wanted = {name: each["alerts_now"] for name, each in without["cameras"].items()}
    plain = wanted["cam-1"]
    wanted["cam-1"] = sum(alert and kept for alert, (_, _, kept) in zip(alerts, mine, strict=True))
    assert wanted["cam-1"] < plain
    assert {name: each["alerts_now"] for name, each in found.items()} == wanted


def _check_ranges(settings, scores):
    def run(**options):
        chosen = ReplayOptions(model="default", version="v2", **options)
        return replay(settings, chosen, lambda *_: None)

    one = run(start=Place(offset=0), cameras=["cam-1"])
    assert set(one["cameras"]) == {"cam-1"}
    assert one["frames"] == sum(camera == "cam-1" for camera, _, _ in scores.values())
    first = run(start=Place(offset=1), end=Place(offset=3))
    within = [f for f in scores if 1 <= int(f.rsplit("/", 1)[1]) < 3]
    assert first["frames"] == len(within)
    assert run(start=Place.parse("1h"))["frames"] == len(scores)
    with pytest.raises(DataError, match="no frames in that range"):
        run(start=Place(time_ms=int(time.time() * 1000) + 3_600_000))
    with pytest.raises(NotFound):
        replay(
            settings,
            ReplayOptions(model="default", version="v9", start=Place(offset=0)),
            lambda *_: None,
        )
