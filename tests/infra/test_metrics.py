"""Metrics: one list, Prometheus' habits, and no Ray started by importing them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from infra.metrics import StreamMetrics


def declared(metrics: StreamMetrics) -> list[Metric]:
    return [value for value in vars(metrics).values() if isinstance(value, Metric)]


def test_importing_and_recording_start_no_ray() -> None:
    code = (
        "import ray; from infra.metrics import StreamMetrics; m = StreamMetrics();"
        "m.frames('normal', 3); m.frames('alert', 0); m.dead_letters({'empty': 2});"
        "m.scored('default', 1.5, -0.1); m.stage('decode', 0.01); m.lag('t', 0, 7);"
        "m.in_flight(2); m.active_version('default', 'v-1'); m.active_version('default', 'v-2');"
        "assert not ray.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_names_carry_their_units_and_no_tag_is_unbounded() -> None:
    metrics = declared(StreamMetrics())
    assert len({metric.info["name"] for metric in metrics}) == len(metrics) == 8
    for metric in metrics:
        name = metric.info["name"]
        assert name.startswith("dpdl_")
        assert metric.info["description"].endswith(".")
        assert isinstance(metric, Counter) == name.endswith("_total")
        assert not {"camera", "frame", "offset"} & set(metric.info["tag_keys"])
        assert isinstance(metric, (Counter, Gauge, Histogram))


def test_the_version_before_falls_back_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, seen = StreamMetrics(), {}
    monkeypatch.setattr(
        metrics._active, "set", lambda value, tags: seen.__setitem__(tags["version"], value)
    )
    for version in ("v-1", "v-1", "v-2"):
        metrics.active_version("default", version)
    assert seen == {"v-1": 0, "v-2": 1}
