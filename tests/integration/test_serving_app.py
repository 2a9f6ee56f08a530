"""The whole streaming application on real services: Kafka in, Ray Serve, Redis and S3 out.

One tiny real model in three versions (two of them at another image size), scored again offline:
each result must be what the version that it names says of that frame.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
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
from infra.errors import DataError, SettingsError
from infra.kafka_client import end_offsets, make_consumer, make_producer
from infra.messages import evidence_key, frame_headers
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets
from infra.settings import load_settings
from serving import app

pytestmark = pytest.mark.integration

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


@pytest.fixture(scope="module")
def versions():
    return {"v1": fitted(1, 64), "v2": fitted(2, 96), "v3": fitted(3, 64)}


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for the module; it ends with it."""
    import ray

    from infra import ray_runtime

    ray_runtime.connect()
    yield
    ray.shutdown()


@pytest.fixture
def deployed(settings, versions, cluster, monkeypatch):
    """Version v1 in use and the application running."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DPDL_SERVE_HTTP_PORT", str(probe.getsockname()[1]))
    settings = load_settings()
    ensure_buckets(settings)
    store = ModelStore(settings)
    for version, files in versions.items():
        store.put_version(MODEL, version, files, {})
    promote(settings, "v1")
    try:
        yield settings, app.deploy(settings, model_name=MODEL, device="cpu")
    finally:
        app.shutdown()


def promote(settings, version):
    store = ModelStore(settings)
    store.move_pointer(MODEL, version, store.current(MODEL), by="test", why="test")


def send(settings, num_frames, *, seed, bad_every=10):
    """num_frames records; every bad_every-th is one of several kinds of bad."""
    rng = np.random.default_rng(seed)
    producer = make_producer(settings)
    spoil = [
        lambda data: (b"cam-0", data[: len(data) // 3]),
        lambda data: (b"cam-0", b"hello"),
        lambda data: (None, data),
        lambda data: (b"\xff\xfe", data),
        lambda data: (b"cam-0", None),
    ]
    futures = []
    for i in range(num_frames):
        key = f"cam-{i % NUM_CAMERAS}".encode() if i % 17 else HOSTILE.encode()
        value = jpeg(rng, defect=i % 5 == 0)
        if i % bad_every == bad_every - 1:
            key, value = spoil[i // bad_every % len(spoil)](value)
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


def get(settings, path, host=None, **headers):
    url = f"http://127.0.0.1:{settings.serve.http_port}{path}"
    if host:
        headers["Host"] = host
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as r:
            return r.status, dict(r.headers), r.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def get_json(settings, path):
    status, _, body = get(settings, path)
    assert status == 200, body
    return json.loads(body)


def test_stream_swap_refuse_and_console(deployed, versions):
    settings, running = deployed
    assert running.version == "v1"

    # Bad records among good ones, then two more versions in mid-stream, one of another size.
    send(settings, 150, seed=1)
    wait_scored(settings)
    send(settings, 300, seed=2)
    promote(settings, "v2")
    wait_version("v2")
    send(settings, 100, seed=3)
    wait_scored(settings)

    # A version that was altered after it was stored, one with NaN weights, one that is newer.
    store = ModelStore(settings)
    broken = {
        "nan": {**versions["v3"], artifact.WEIGHTS: _with_nan(versions["v3"][artifact.WEIGHTS])},
        "newer": {**versions["v3"], artifact.CONFIG: b'{"format": 999}'},
        "altered": versions["v3"],
    }
    for version, files in broken.items():
        store.put_version(MODEL, version, files, {})
    _alter(settings, "altered")
    for version, reason in {"nan": "NaN", "newer": "999", "altered": "sha256"}.items():
        promote(settings, version)
        until = time.monotonic() + 30
        while version not in (refused := app.scorer_info()["refused"]):
            assert time.monotonic() < until, f"{version} was not refused"
            time.sleep(0.2)
        assert reason in refused[version]
    assert app.scorer_info()["version"] == "v2"
    send(settings, 30, seed=4)
    promote(settings, "v3")
    wait_version("v3")
    send(settings, 30, seed=5)
    wait_scored(settings)

    got, dead = check(settings, versions)
    assert {result.version for result in got.values()} == {"v1", "v2", "v3"}
    assert set(dead) == {"truncated", "not-an-image", "no-key", "bad-key", "empty"}
    anomalies = [result for result in got.values() if result.is_anomaly]
    assert len(anomalies) > 50
    assert not any(result.camera == "cam-1" for result in anomalies)  # its own threshold: 1e9

    _check_overrides(settings)
    _check_console(settings, got)


def _with_nan(weights):
    import safetensors.torch

    state = safetensors.torch.load(weights)
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] = float("nan")
    return safetensors.torch.save(state)


def _alter(settings, version):
    from io import BytesIO

    from infra.s3_client import make_minio

    make_minio(settings).put_object(
        settings.s3.models_bucket,
        f"{MODEL}/versions/{version}/{artifact.METRICS}",
        BytesIO(b"{}"),
        2,
    )


def _check_overrides(settings):
    """A person's threshold wins over the version's, from the next look on."""
    results = ResultStore(settings)
    results.set_threshold("cam-1", 0.0, by="test")
    time.sleep(2.5)
    send(settings, 8, seed=6, bad_every=1000)
    wait_scored(settings)
    newest = results.scores("cam-1", 1)[0].result
    assert newest.threshold == 0.0
    assert newest.is_anomaly == (newest.score > 0.0)


def _check_console(settings, got):
    results = ResultStore(settings)
    newest_first = [each.id for each in results.latest_alerts(10_000)]
    ids, before = [], ""
    while before is not None:
        page = get_json(settings, f"/api/v1/alerts?count=40&before={before}")
        ids += [alert["id"] for alert in page["alerts"]]
        before = page["older"]
    assert ids == newest_first
    page = get_json(settings, "/api/v1/alerts?count=3")
    fresh = get_json(settings, f"/api/v1/alerts?after={page['alerts'][2]['id']}")
    assert [alert["id"] for alert in fresh["alerts"]] == newest_first[:2]
    one = get_json(settings, "/api/v1/alerts?camera=cam-2&count=500")["alerts"]
    assert one
    assert {alert["camera"] for alert in one} == {"cam-2"}

    cameras = get_json(settings, "/api/v1/cameras")["cameras"]
    assert HOSTILE in {camera["camera"] for camera in cameras}
    status = get_json(settings, "/api/v1/status")
    assert status["scorer"]["version"] == "v3"
    assert status["consumer"]["trouble"] == ""

    alert = next(a for a in one if a["frame_id"] in got)
    code, headers, frame = get(settings, f"/{alert['frame_url']}")
    assert code == 200
    assert headers["content-type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(frame, np.uint8), 1).shape == (80, 80, 3)
    code, headers, heat = get(settings, f"/{alert['heat_url']}")
    assert (code, headers["content-type"]) == (200, "image/png")
    assert cv2.imdecode(np.frombuffer(heat, np.uint8), cv2.IMREAD_UNCHANGED).shape[2] == 4

    code, headers, body = get(settings, "/")
    assert code == 200
    assert b"<title>DPDL" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    assert get(settings, "/app.js")[0] == 200
    missing = evidence_key(f"{settings.kafka.topic}/0/999999")
    assert get(settings, f"/api/v1/evidence/{missing}/frame")[0] == 404
    assert get(settings, "/api/v1/evidence/..%2F..%2Fx/0/0/frame")[0] in (404, 422)
    assert get(settings, "/api/v1/alerts?count=100000")[0] == 422
    assert get(settings, "/api/v1/alerts?before=DROP")[0] == 422
    assert get(settings, "/console.py")[0] == 404
    # DNS rebinding: a foreign name that leads here is not this machine.
    assert get(settings, "/api/v1/alerts", host="evil.example")[0] == 401
    assert get(settings, "/api/v1/alerts", **{"X-Forwarded-For": "10.0.0.1"})[0] == 401


def test_replicas_that_are_killed_lose_nothing(deployed, versions):
    """SIGKILL of the consumer's and of the scorer's process while frames stream."""
    settings, _ = deployed
    killed = []
    for asked in (app.consumer_stats, app.scorer_info):
        send(settings, 150, seed=len(killed), bad_every=25)
        pid = asked()["pid"]
        os.kill(pid, 9)
        killed.append(pid)
        send(settings, 150, seed=10 + len(killed), bad_every=25)
        wait_scored(settings, 90)
    assert len(set(killed)) == 2
    check(settings, versions)


def test_deploying_without_a_version_or_a_free_port_says_so(settings, cluster, monkeypatch):
    ensure_buckets(settings)
    with pytest.raises(DataError, match="no current version"):
        app.deploy(settings, model_name="nothing")
    monkeypatch.setenv("DPDL_SERVE_HTTP_HOST", "0.0.0.0")
    with pytest.raises(SettingsError, match=r"serve\.token"):
        app.deploy(load_settings(), model_name="nothing")
