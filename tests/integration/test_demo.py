"""The main job as a newcomer runs it, in short: `dpdl demo` on real images, and its clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dpdl_core.artifact import unpack
from dpdl_core.images import decode_image
from dpdl_core.metrics import auroc
from dpdl_core.protocol import load_dataset
from infra.kafka_client import make_consumer, partitions_of
from infra.messages import FrameRecord
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.settings import load_settings

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

FRAMES = 320


class Demo:
    """A running `dpdl demo` that has reported and stays up."""

    def __init__(self, folder: Path) -> None:
        self.state, self.report_file = folder / "state", folder / "demo.json"
        env = {k: v for k, v in os.environ.items() if not k.startswith("DPDL_")}
        self.log = folder / "demo.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "--debug", "demo", "--frames", str(FRAMES)]
            + ["--report", str(self.report_file)],
            env=env | {"DPDL_STATE_DIR": str(self.state)},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_for_report(self, deadline_s: float) -> dict:
        until = time.monotonic() + deadline_s
        while not self.report_file.exists():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.5)
        return json.loads(self.report_file.read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    running = Demo(tmp_path_factory.mktemp("demo"))
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="module")
def report(demo):
    return demo.wait_for_report(1200)


@pytest.fixture
def settings(demo, report, monkeypatch):
    monkeypatch.setenv("DPDL_STATE_DIR", str(demo.state / "demo"))
    return load_settings()


def test_no_frame_is_lost_or_scored_twice(report):
    assert report["frames_sent"] == FRAMES
    assert report["frames_scored"] == FRAMES
    assert report["frames_lost"] == 0
    assert report["frames_duplicated"] == 0
    assert report["dead_letters"] == 0


def test_the_report_has_every_figure(report):
    assert set(report) == {
        *("frames_sent", "frames_scored", "frames_lost", "frames_duplicated", "dead_letters"),
        *("auroc", "ap", "alerts", "precision", "recall", "latency_ms", "frames_per_second"),
        *("versions", "refresh", "train_seconds", "wall_seconds"),
    }
    assert set(report["latency_ms"]) == {"p50", "p99"}
    assert set(report["refresh"]) == {"decision", "from", "to", "why"}
    assert report["refresh"]["decision"] in ("promoted", "held")
    assert report["refresh"]["why"]
    assert report["refresh"]["from"] in report["versions"]
    if report["refresh"]["decision"] == "held":
        assert report["versions"] == [report["refresh"]["from"]]


def test_it_finds_defects(report):
    assert report["auroc"] >= 0.80
    assert report["alerts"] > 0
    assert report["precision"] > 0.8


def test_what_the_stream_scored_is_what_the_same_version_scores_offline(settings, report):
    """Frames from Kafka, decoded and scored here, against the results in Redis."""
    online = results(settings)
    frames = frames_in_kafka(settings)
    assert len(online) == len(frames) == FRAMES
    label_of = {sha256(s.read()).digest(): s.label for s in all_samples("elpv")}
    labels = {name: label_of[sha256(frame.image).digest()] for name, frame in frames.items()}
    everything = sorted(online)
    assert auroc(
        [labels[name] for name in everything], [online[name].score for name in everything]
    ) == pytest.approx(report["auroc"], abs=1e-9)
    for version in report["versions"]:
        model = unpack(ModelStore(settings).fetch("demo", version)).model
        names = [name for name, result in online.items() if result.version == version]
        offline = score_offline(model, [frames[name].image for name in names])
        scores = np.array([online[name].score for name in names])
        truth = [labels[name] for name in names]
        np.testing.assert_allclose(scores, offline, rtol=1e-3, atol=1e-3)
        if len(set(truth)) == 2:
            assert abs(auroc(truth, scores) - auroc(truth, offline)) <= 1e-6


def test_the_page_and_the_pictures_of_an_alert_are_served(settings):
    base = f"http://{settings.serve.http_host}:{settings.serve.http_port}"
    with urllib.request.urlopen(base + "/", timeout=30) as answer:
        assert answer.status == 200
        assert b"<html" in answer.read().lower()
    with urllib.request.urlopen(base + "/api/v1/alerts?count=1", timeout=30) as answer:
        assert json.load(answer)["alerts"]


def test_sigterm_ends_it_and_everything_it_started(demo, report):
    root = psutil.Process(demo.process.pid)
    started = root.children(recursive=True)
    services = [
        psutil.Process(pid)
        for pid in pids_in((demo.state / "demo" / "run").glob("*.json"))
        if psutil.pid_exists(pid)
    ]
    assert services, "the demo's services should still be up"
    demo.process.send_signal(signal.SIGTERM)
    assert demo.process.wait(90) != 0
    _, alive = psutil.wait_procs([*started, *services], timeout=30)
    assert not alive, f"left behind: {[process.cmdline()[:4] for process in alive]}"


def all_samples(name):
    dataset = load_dataset(name)
    return [*dataset.normals, *dataset.anomalies]


def score_offline(model, images):
    """In batches of another size than the stream's."""
    size = model.config.image_size
    decoded = [torch.from_numpy(decode_image(image, size)) for image in images]
    parts = [torch.stack(decoded[i : i + 13]) for i in range(0, len(decoded), 13)]
    return np.concatenate([model.score(part).score.numpy() for part in parts])


def results(settings):
    store = ResultStore(settings)
    try:
        return {
            stored.result.frame_id: stored.result
            for camera in store.cameras()
            for stored in store.scores(camera.camera, 1000)
        }
    finally:
        store.close()


def frames_in_kafka(settings):
    consumer = make_consumer(settings)
    try:
        partitions = partitions_of(consumer, settings.kafka.topic)
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        found = {}
        while any(consumer.position(tp) < ends[tp] for tp in partitions):
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    frame = FrameRecord.from_kafka(record)
                    found[frame.frame_id] = frame
        return found
    finally:
        consumer.close()


def pids_in(files):
    for file in files:
        record = json.loads(file.read_text())
        yield from (record["service"][0], record["guard"][0])
