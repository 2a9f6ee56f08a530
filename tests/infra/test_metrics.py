"""Metrics: one list, Prometheus' habits, bounded whatever cameras call themselves."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections import defaultdict

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from infra import metrics
from infra.metrics import (
    CameraFacts,
    ExpiryMetrics,
    Names,
    ReplicaMetrics,
    ScorerMetrics,
    StreamMetrics,
    WatchMetrics,
)

MOST_SERIES = 2_000
"""Combinations of tags that an instrument of Ray holds per process (measured, docs/watching.md)."""


class Record:
    """Stands where Ray's instruments send their values: (metric, tags) -> values."""

    def __init__(self, monkeypatch):
        self.values = defaultdict(list)
        record = self.values

        def put(metric, value, tags=None):
            record[metric._name, tuple(sorted((tags or {}).items()))].append(value)

        for kind, name in ((Counter, "inc"), (Gauge, "set"), (Histogram, "observe")):
            monkeypatch.setattr(kind, name, put)

    def series(self, name):
        return {tags: values for (metric, tags), values in self.values.items() if metric == name}

    def total(self, name, **tags):
        return sum(self.series(name)[tuple(sorted(tags.items()))])


@pytest.fixture
def record(monkeypatch):
    return Record(monkeypatch)


def declared() -> list[Metric]:
    owners = (
        StreamMetrics(), ScorerMetrics(), WatchMetrics(), ExpiryMetrics(),
        ReplicaMetrics("consumer", 0),
    )  # fmt: skip
    return [v for owner in owners for v in vars(owner).values() if isinstance(v, Metric)]


def feed(cameras: int, versions: int = 3) -> None:
    """What a plant of so many cameras makes of one process, all owners in it."""
    stream, scorer, watch = StreamMetrics(), ScorerMetrics(), WatchMetrics()
    names = [f"camera {i}" for i in range(cameras)]
    for i, camera in enumerate(names):
        stream.scored(camera, "default", f"v{i % versions}", score=3.0, energy=2.0)
        watch.counts(camera, 100, 10, 5)
    watch.totals()
    found = {"energy": (0.1, 0.25), "prototypes": (0.2, 0.05)}
    for model in ("default", "welds"):
        scorer.drift(model, dict.fromkeys(names, found))
    watch.cameras(CameraFacts(camera, 1000.0 + i, 7.0) for i, camera in enumerate(names))


def test_importing_and_recording_start_no_ray() -> None:
    code = (
        "import ray; from infra.metrics import *; m = StreamMetrics();"
        "m.scored('cam', 'default', 'v', score=1.5, energy=1.0); m.stage('decoded', 0.01);"
        "m.latency('default', -0.1); m.batch(3); m.in_flight(2);"
        "ScorerMetrics().versions('default', 'v-1', None); WatchMetrics().lag('t', {0: 7});"
        "ReplicaMetrics('scorer', 0).alive(); assert not ray.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_names_carry_their_units_and_every_metric_is_explained() -> None:
    found = declared()
    assert len({metric.info["name"] for metric in found}) == len(found) == 28
    for metric in found:
        name = metric.info["name"]
        assert name.startswith("dpdl_")
        assert metric.info["description"].endswith(".")
        assert not isinstance(metric, Counter)  # loses and doubles increments
        assert not {"frame", "offset"} & set(metric.info["tag_keys"])


@pytest.mark.parametrize("cameras", [1_000, 20_000])
def test_series_are_bounded_with_a_thousand_cameras_and_more(record, cameras) -> None:
    feed(cameras, versions=900)
    for name in {metric for metric, _ in record.values}:
        assert len(record.series(name)) <= MOST_SERIES, name
    assert len(record.series("dpdl_score")) == metrics.HISTOGRAM_CAMERAS + 1
    assert len(record.series("dpdl_version_score")) == metrics.VERSIONS + 1
    assert len(record.series("dpdl_frames_total")) == 3 * (metrics.CAMERAS + 1)
    # Nothing is lost: what has no series of its own is in the common one.
    assert sum(itertools.chain(*record.series("dpdl_frames_total").values())) == 100 * cameras
    others = record.total("dpdl_frames_total", camera="other", outcome="alert")
    assert others == 5 * (cameras - metrics.CAMERAS)
    assert len(record.series("dpdl_drift_psi")) == 2 * metrics.CAMERAS
    assert len(record.series("dpdl_drift_bound")) == 2 * metrics.CAMERAS


def test_the_longest_silent_of_all_other_cameras_is_seen(record) -> None:
    """Of none that the rule takes for gone: it would hide the others for good."""
    now_s = time.time()
    last_s = [now_s] * metrics.SEEN_CAMERAS + [now_s - ago for ago in (90_000, 7_000, 600, 1)]
    WatchMetrics().cameras(CameraFacts(f"c{i}", at, 7.0) for i, at in enumerate(last_s))
    (others,) = record.series("dpdl_camera_last_frame_timestamp_seconds")[("camera", "other"),]
    assert others == now_s - 7_000


def test_totals_follow_the_stores_and_are_never_lowered(record) -> None:
    watch = WatchMetrics()
    for frames, anomalies, alerts in ((10, 4, 1), (10, 4, 1), (25, 6, 2), (3, 0, 0)):
        watch.counts("a", frames, anomalies, alerts)
        watch.dead_letters({"empty": alerts})
        watch.totals()
    watch.totals()  # its store is away: shown as they were
    # 25 frames, then a store that was emptied and has seen 3 more.
    frames = record.series("dpdl_frames_total")
    assert {(dict(tags)["camera"], dict(tags)["outcome"]): v for tags, v in frames.items()} == {
        ("a", "normal"): [6, 6, 19, 22, 22],
        ("a", "anomaly"): [3, 3, 4, 4, 4],
        ("a", "alert"): [1, 1, 2, 2, 2],
        ("", "dead"): [1, 1, 2, 2, 2],
    }
    assert record.series("dpdl_dead_letters_total") == {(("reason", "empty"),): [1, 1, 2, 2, 2]}


def test_a_restart_changes_no_total(record) -> None:
    for _ in range(2):
        watch = WatchMetrics()
        watch.counts("a", 25, 6, 2)
        watch.totals()
    assert record.series("dpdl_frames_total")[("camera", "a"), ("outcome", "normal")] == [19, 19]


def test_a_version_that_scores_no_more_is_not_shown_any_more(record) -> None:
    scorer = ScorerMetrics()
    scorer.versions("default", "v-1", "v-2")
    record.values.clear()
    scorer.versions("default", "v-2", None)
    assert list(record.series("dpdl_active_version")) == [
        (("model", "default"), ("version", "v-2"))
    ]
    assert not record.series("dpdl_version_refused")


def test_a_model_that_is_replaced_is_shown_for_as_long_as_it_is(record) -> None:
    scorer = ScorerMetrics()
    scorer.replaced(["welds"])
    assert record.series("dpdl_model_replaced") == {(("model", "welds"),): [1]}
    record.values.clear()
    scorer.replaced([])
    assert not record.series("dpdl_model_replaced")


def test_drift_of_a_camera_is_told_apart_by_the_model_that_scores_it(record) -> None:
    scorer = ScorerMetrics()
    for model, psi in (("default", 3.0), ("welds", 0.1)):
        scorer.drift(model, {"a": {"energy": (psi, 0.25)}})
    assert {dict(tags)["model"]: v for tags, v in record.series("dpdl_drift_psi").items()} == {
        "default": [3.0],
        "welds": [0.1],
    }


def test_a_replica_keeps_the_time_when_it_began(record) -> None:
    replica, now = ReplicaMetrics("scorer", 3), time.time()
    replica.alive()
    replica.alive()
    first, second = record.series("dpdl_replica_started_timestamp_seconds")[
        ("part", "scorer"), ("rank", "3")
    ]
    assert first == second == pytest.approx(now, abs=5)


def test_names_come_first_come_first_served() -> None:
    names = Names(2)
    assert [names.of(name) for name in ("b", "a", "c", "b", "a")] == ["b", "a", "other", "b", "a"]
