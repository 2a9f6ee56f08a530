"""The real system, watched: Ray Serve, the real services, a real Prometheus, every rule and query.

More than a thousand cameras send a frame each, one sends enough for drift; a version is refused and
a refresh was held. Then Prometheus (Debian's) scrapes Ray as infra/prometheus says, its rules must
be healthy and find their metrics, and each query of each panel must give data of its panel's shape.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, decode_image
from infra import decisions, ray_runtime
from infra.dashboards import dashboards
from infra.kafka_client import end_offsets, make_producer
from infra.messages import frame_headers
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets
from infra.settings import load_settings
from pipelines.scoring import drift_reference, observe
from serving import app

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="apt-get install prometheus"),
]

MODEL = "lines"
SIZE = 64
NUM_CAMERAS = 1_100
DRIFTING = "belt 7"
FOLDER = Path(app.__file__).parents[1] / "infra" / "prometheus"
MAY_BE_EMPTY = {"GPU"}
"""Panels of what this machine need not have."""
NUM_RULES = 18
MAY_BE_ABSENT = {
    "ray_dpdl_frames_expired_timestamp_seconds",
    "ray_dpdl_frames_lost_timestamp_seconds",
    "ray_dpdl_frames_lost_total",
    "ray_dpdl_model_replaced",
    "ray_dpdl_refresh_look_due_timestamp_seconds",
}
"""Metrics of what does not happen here: frames lost to retention, a bound model out of use."""
MAY_BE_NULL = {"Set by hand", "AUROC", "Threshold", "New normals", "From"}
"""Columns of what these cameras and versions need not have."""
KINDS = {
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "timestamp_epoch": (int, float),
    "timestamp": str,
}
"""Infinity's column types, and what JSON has there."""


def jpeg(rng, defect=False):
    pixels = (120 + 15 * rng.standard_normal((SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
    if defect:
        pixels[20:40, 20:40] = 255
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


class _Rows:
    """Images with rows, as the pipelines score them."""

    def __init__(self, images):
        self.rows, self._source = [], ArraySource(images)
        self.num_images = len(images)
        self.batches = self._source.batches


def version_files():
    """A small real version: a threshold between normals and defects, and its drift reference."""
    rng = np.random.default_rng(0)
    normals = np.stack([decode_image(jpeg(rng), SIZE) for _ in range(64)])
    anomalies = np.stack([decode_image(jpeg(rng, defect=True), SIZE) for _ in range(3)])
    config = replace(
        recipe("edge"),
        weights="random",
        image_size=SIZE,
        patch_prototypes=32,
        patch_dims=16,
        pseudo_normals=16,
        folds=2,
    )
    model = fit(config, ArraySource(normals[:24]), anomalies, seed=0)
    seen = observe(model, _Rows(normals[24:]))
    reference = drift_reference(model, [seen], [""] * 40)
    assert reference
    thresholds = {"false_alarm_rate": 0.01, "default": 1.5 * float(seen.score.max()), "cameras": {}}
    return artifact.pack(model, thresholds=thresholds, metrics={"drift": reference})


def send(settings, frames):
    """(camera, jpeg) each; None for a frame that cannot be read."""
    producer = make_producer(settings)
    sent = [
        producer.send(
            settings.kafka.topic,
            key=camera.encode(),
            value=data or b"no picture",
            headers=frame_headers(time.time_ns(), "image/jpeg"),
        )
        for camera, data in frames
    ]
    for each in sent:
        each.get(timeout=30)
    producer.close()


def wait_scored(settings, deadline_s=90.0):
    results, until = ResultStore(settings), time.monotonic() + deadline_s
    kafka = settings.kafka
    end = end_offsets(settings, kafka.topic)
    while results.progress(kafka.group, kafka.topic) != end:
        assert time.monotonic() < until, f"{results.progress(kafka.group, kafka.topic)} of {end}"
        time.sleep(0.1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url, **params):
    query = urllib.parse.urlencode(params, doseq=True)
    try:
        with urllib.request.urlopen(f"{url}?{query}" if query else url, timeout=10) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url} {params}: {error.code} {error.read()[:500]}") from None


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **params):
        answer = json.loads(fetch(f"{self.url}/api/v1/{path}", **params))
        assert answer["status"] == "success", answer
        return answer["data"]

    def instant(self, expr):
        found = self.get("query", query=expr)
        if found["resultType"] == "scalar":
            return [{"metric": {}, "value": found["result"]}]
        return found["result"]

    def range(self, expr):
        now = time.time()
        return self.get("query_range", query=expr, start=now - 60, end=now, step=2)["result"]

    def value(self, expr):
        (one,) = self.instant(expr)
        return float(one["value"][1])


@contextmanager
def prometheus(folder):
    """Debian's Prometheus on a free loopback port, on our own files, looking every 3 seconds."""
    for name in ("dpdl.rules.yml", "prometheus.yml"):
        shutil.copy(FOLDER / name, folder)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "3s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


def until(check, deadline_s=30.0):
    """Calls until it raises no more; its last error otherwise."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            return check()
        except (AssertionError, OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


@pytest.fixture
def system(settings, monkeypatch, tmp_path):
    """The application at work on version v1, with v2 refused and a refresh held."""
    import ray
    from ray import serve

    monkeypatch.setenv("DPDL_SERVE_HTTP_PORT", str(free_port()))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "3000")  # gauges last twice that
    settings = load_settings()
    ensure_buckets(settings)
    files, store = version_files(), ModelStore(settings)
    for version in ("v1", "v2"):
        store.put_version(MODEL, version, files, {})
    pointer = store.move_pointer(MODEL, "v1", None, by="test", why="test")
    try:
        app.deploy(settings, model_name=MODEL, device="cpu")
        _break(settings, "v2")
        store.move_pointer(MODEL, "v2", pointer, by="test", why="test")
        decision = decisions.Decision("v2", "v1", "held", "AUROC down", {}, {})
        decisions.record(settings, MODEL, decision)
        yield settings
    finally:
        app.shutdown()
        serve.shutdown()  # else the next module's Serve would look for this one's controller
        ray.shutdown()


def _break(settings, version):
    from io import BytesIO

    from infra.s3_client import make_minio

    key = f"{MODEL}/versions/{version}/{artifact.METRICS}"
    make_minio(settings).put_object(settings.s3.models_bucket, key, BytesIO(b"{}"), 2)


def test_the_real_system_is_watched(system, stack, tmp_path):
    settings, rng = system, np.random.default_rng(1)
    normal, defect = jpeg(rng), jpeg(rng, defect=True)
    send(settings, [(DRIFTING, jpeg(rng)) for _ in range(200)] + [(DRIFTING, None)])
    ray_runtime.write_scrape_targets(tmp_path / "targets" / "ray.json")
    with prometheus(tmp_path) as prom:
        # From now on this camera and this reason have their own series.
        until(partial(_check_scraped, prom))
        send(settings, [(f"camera-{i}", normal) for i in range(NUM_CAMERAS)])
        wait_scored(settings)
        send(settings, [(DRIFTING, jpeg(rng, defect=i % 2 > 0)) for i in range(24)])
        send(settings, [("camera-1", None)] * 3 + [("camera-1", normal), ("camera-2", defect)])
        wait_scored(settings)
        _check_counts(prom, settings)
        _check_bounds(prom)
        _check_rules(prom)
        for name, board in dashboards().items():
            _check_dashboard(prom, settings, name, board)
        stack.kill("redis")
        try:
            until(partial(_check_stores, prom, {"Kafka": 1, "Redis": 0, "S3": 1}))
        finally:
            stack.start_service("redis")
        until(partial(_check_stores, prom, {"Kafka": 1, "Redis": 1, "S3": 1}))


def _check_stores(prom, want):
    found = prom.instant("ray_dpdl_store_up")
    assert {r["metric"]["store"]: int(r["value"][1]) for r in found} == want


def _check_scraped(prom):
    (target,) = prom.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert prom.instant(f'ray_dpdl_frames_total{{camera="{DRIFTING}"}}')
    assert prom.instant("ray_dpdl_dead_letters_total")


def _check_counts(prom, settings):
    """Prometheus' totals are those of Redis, camera by camera and reason by reason."""
    results = ResultStore(settings)
    want = Counter()
    for camera in results.cameras():
        want["normal"] += camera.frames - camera.anomalies
        want["anomaly"] += camera.anomalies - camera.alerts
        want["alert"] += camera.alerts
    want["dead"] = sum(results.dead_letters().values())
    want = +want
    assert set(want) == {"normal", "alert", "dead"}

    def same():
        _check_scraped(prom)
        found = prom.instant("sum by (outcome) (ray_dpdl_frames_total)")
        assert {r["metric"]["outcome"]: float(r["value"][1]) for r in found} == want
        assert prom.value("max(ray_dpdl_lag_frames)") == 0
        assert prom.value(f'ray_dpdl_drift_psi{{camera="{DRIFTING}", of="energy"}}') > 0
        # A histogram is reported when its process next does.
        assert prom.value("sum(ray_dpdl_latency_seconds_count)") == want.total() - want["dead"]

    until(same)
    alerts = next(c.alerts for c in results.cameras() if c.camera == DRIFTING)
    assert prom.value(f'ray_dpdl_frames_total{{camera="{DRIFTING}", outcome="alert"}}') == alerts


def _check_bounds(prom):
    """Series by metric with 1,100 cameras; none overflowed Ray's instruments."""
    found = prom.instant('count by (__name__) ({__name__=~"ray_dpdl_.*"})')
    series = {r["metric"]["__name__"]: int(r["value"][1]) for r in found}
    assert prom.instant('count({otel_metrics_overflow!=""})') == []
    assert series["ray_dpdl_camera_last_frame_timestamp_seconds"] == NUM_CAMERAS + 1
    assert series["ray_dpdl_frames_total"] < 2_000
    assert series["ray_dpdl_score_count"] == 101
    assert sum(series.values()) < 9_000, series
    print("series:", sum(series.values()), series)


def _check_rules(prom):
    def healthy():
        groups = prom.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == NUM_RULES
        for rule in rules:
            assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        return {rule["name"] for rule in rules if rule["state"] == "firing"}, rules

    _, rules = until(healthy)
    for rule in rules:
        for metric in set(re.findall(r"ray_dpdl_\w+", rule["query"])) - MAY_BE_ABSENT:
            assert prom.instant(metric), f"{rule['name']}: no {metric}"
    until(lambda: _firing(healthy()[0]))


def _firing(names):
    assert names == {"DeadLetters", "VersionRefused", "RefreshHeld"}


def _check_dashboard(prom, settings, name, board):
    values = {"model": MODEL, "camera": DRIFTING, "before": "v1", "after": "v1"}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            definition = variable["definition"]
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition).groups()
            found = prom.get(f"label/{label}/values", **{"match[]": metric})
            assert values[variable["name"]] in found
    for panel in board["panels"]:
        for target in panel["targets"]:
            where = f"{name}: {panel['title']} {target['refId']}"
            if target["datasource"]["uid"] == "dpdl-prometheus":
                until(partial(_check_promql, prom, panel, target, values, where), 10)
            else:
                _check_api(settings, panel, target, values, where)


def _filled_in(text, values):
    now_ms = int(time.time() * 1000)
    values = values | {"__from": str(now_ms - 3_600_000), "__to": str(now_ms)}
    for variable, value in values.items():
        text = text.replace(f"${{{variable}:percentencode}}", urllib.parse.quote(value))
        text = text.replace(f"${{{variable}}}", value).replace(f"${variable}", value)
    return text.replace("$__rate_interval", "30s").replace("$__range", "1m")


def _check_promql(prom, panel, target, values, where):
    expr = _filled_in(target["expr"], values)
    assert "$" not in expr, where
    found = prom.instant(expr) if target["instant"] else prom.range(expr)
    if panel["title"] in MAY_BE_EMPTY:
        return
    assert found, f"{where}: no data for {expr}"
    numbers = [
        float(value)
        for series in found
        for _, value in ([series["value"]] if "value" in series else series["values"])
    ]
    assert np.isfinite(numbers).any(), f"{where}: {expr} gives {numbers[:5]}"
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert all(label in series["metric"] for series in found), f"{where}: no {label}"
    if panel["type"] == "heatmap" or target["format"] == "heatmap":
        bounds = {series["metric"]["le"] for series in found}
        assert {"+Inf"} < bounds, where
    if panel["type"] == "stat" and panel["title"] not in ("State",):
        assert len(found) == 1, f"{where}: {len(found)} values"


def _seconds(moment):
    """Unix seconds of milliseconds or ISO 8601."""
    return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else moment / 1e3


def _check_api(settings, panel, target, values, where):
    """As Infinity's backend parser reads it: GET, the root's rows, a field per column."""
    params = {p["key"]: _filled_in(p["value"], values) for p in target["url_options"]["params"]}
    base = f"http://127.0.0.1:{settings.serve.http_port}"
    rows = json.loads(fetch(base + _filled_in(target["url"], values), **params))
    for part in target["root_selector"].split("."):
        rows = rows[part]
    assert rows, f"{where}: no rows"
    for column in target["columns"]:
        found = [row[column["selector"]] for row in rows]
        known = [value for value in found if value is not None]
        assert all(isinstance(value, KINDS[column["type"]]) for value in known), (where, column)
        if column["type"].startswith("timestamp"):
            assert all(abs(_seconds(value) - time.time()) < 3600 for value in known), where
        assert known or column["text"] in MAY_BE_NULL, f"{where}: {column['text']} is empty"
    if panel["title"] == "Alerts":
        assert {row["camera"] for row in rows} == {DRIFTING}
    for linked in ("frame_url", "heat_url"):
        if linked in rows[0]:
            assert fetch(f"{base}/{rows[0][linked]}")[:4] in (b"\xff\xd8\xff\xe0", b"\x89PNG")
