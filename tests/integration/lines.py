"""A tiny real model, frames for it, and the oracle that re-scores what the application said."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from kafka import TopicPartition

from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, decode_image
from infra.kafka_client import end_offsets, make_consumer, make_producer
from infra.messages import frame_headers
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from serving import app

MODEL = "lines"
NUM_CAMERAS = 4
HOSTILE = '<img src=x onerror=alert(1)>"'
"""A camera id that a careless page would run."""


def picture(rng, defect=False, side=80):
    pixels = (120 + 15 * rng.standard_normal((side, side, 3))).clip(0, 255).astype(np.uint8)
    if defect:
        x, y = rng.integers(10, side - 30, 2)
        pixels[y : y + 20, x : x + 20] = 255
    return pixels


def jpeg(rng, defect=False):
    return cv2.imencode(".jpg", picture(rng, defect), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def fitted(seed, size):
    """A version's files: real, small, of random trunk weights."""
    rng = np.random.default_rng(seed)
    normals = np.stack([decode_image(jpeg(rng), size) for _ in range(24)])
    anomalies = np.stack([decode_image(jpeg(rng, defect=True), size) for _ in range(3)])
    config = replace(
        recipe("edge"),
        weights="random",
        image_size=size,
        patch_prototypes=16,
        patch_dims=16,
        pseudo_normals=16,
        folds=2,
    )
    model = fit(config, ArraySource(normals), anomalies, seed=seed)
    scores = model.score(torch.from_numpy(normals)).score
    threshold = float(scores.max()) * 1.5
    thresholds = {"false_alarm_rate": 0.01, "default": threshold, "cameras": {"cam-1": 1e9}}
    return artifact.pack(model, thresholds=thresholds, metrics={"auroc": 1.0})


def promote(settings, version):
    store = ModelStore(settings)
    store.move_pointer(MODEL, version, store.current(MODEL), by="test", why="test")


def send(settings, num_frames, *, seed, bad_every=10, frames_per_s=float("inf")):
    """num_frames records at a pace; every bad_every-th is one of several kinds of bad."""
    rng = np.random.default_rng(seed)
    producer = make_producer(settings)
    spoil = [
        lambda data: (b"cam-0", data[: len(data) // 3]),
        lambda data: (b"cam-0", b"hello"),
        lambda data: (None, data),
        lambda data: (b"\xff\xfe", data),
        lambda data: (b"cam-0", None),
    ]
    futures, began = [], time.monotonic()
    for i in range(num_frames):
        key = f"cam-{i % NUM_CAMERAS}".encode() if i % 17 else HOSTILE.encode()
        value = jpeg(rng, defect=i % 5 == 0)
        if i % bad_every == bad_every - 1:
            key, value = spoil[i // bad_every % len(spoil)](value)
        if frames_per_s < float("inf"):
            time.sleep(max(0.0, began + i / frames_per_s - time.monotonic()))
        headers = frame_headers(time.time_ns(), "image/jpeg")
        futures.append(producer.send(settings.kafka.topic, key=key, value=value, headers=headers))
    for each in futures:
        each.get(timeout=30)
    producer.close()


def wait_scored(settings, deadline_s=60.0):
    """Until Redis stands at Kafka's end; both are asked, not the code under test."""
    results, until = ResultStore(settings), time.monotonic() + deadline_s
    kafka = settings.kafka
    end = end_offsets(settings, kafka.topic)
    while results.progress(kafka.group, kafka.topic) != end:
        assert time.monotonic() < until, f"{results.progress(kafka.group, kafka.topic)} of {end}"
        time.sleep(0.1)


def wait_version(version, deadline_s=30.0):
    until = time.monotonic() + deadline_s
    while app.scorer_info()["version"] != version:
        assert time.monotonic() < until, f"{version} not in use: {app.scorer_info()}"
        time.sleep(0.2)


def read_topic(settings, topic):
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


def check(settings, versions):
    """Every frame once, in order, scored as its version says offline; the bad ones kept."""
    results = ResultStore(settings)
    records = read_topic(settings, settings.kafka.topic)
    dead = Counter()
    dead_ids = set()
    for record in read_topic(settings, settings.kafka.dead_topic):
        headers = dict(record.headers)
        if headers["dead-frame"] not in dead_ids:
            dead_ids.add(headers["dead-frame"])
            dead[headers["dead-reason"].decode()] += 1
    want, images = defaultdict(list), {}
    for record in records:
        frame_id = f"{record.topic}/{record.partition}/{record.offset}"
        if frame_id.encode() not in dead_ids:
            want[record.key.decode()].append(frame_id)
            images[frame_id] = record.value
    got = {}
    for camera, frame_ids in want.items():
        stored = [each.result for each in results.scores(camera, 10_000)][::-1]
        assert [result.frame_id for result in stored] == frame_ids, camera
        got |= {result.frame_id: result for result in stored}
    assert results.dead_letters() == dict(dead)
    alerts = {each.result.frame_id for each in results.alerts("0", 10_000)}
    assert alerts == {frame_id for frame_id, result in got.items() if result.is_anomaly}
    _check_scores(got, images, versions)
    return got, dead


def _check_scores(got, images, versions):
    by_version = defaultdict(list)
    for result in got.values():
        by_version[result.version].append(result)
    for version, scored in by_version.items():
        loaded = artifact.unpack(versions[version])
        size = loaded.model.config.image_size
        pixels = np.stack([decode_image(images[each.frame_id], size) for each in scored])
        offline = loaded.model.score(torch.from_numpy(pixels))
        np.testing.assert_allclose([r.score for r in scored], offline.score, rtol=1e-3, atol=1e-3)
        for result in scored:
            cameras = loaded.thresholds["cameras"]
            assert result.threshold == pytest.approx(
                cameras.get(result.camera, loaded.thresholds["default"])
            )
            assert result.is_anomaly == (result.score > result.threshold)
