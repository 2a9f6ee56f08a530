"""Every metric of the product, declared once: name, unit, help, tags.

Ray exports them to Prometheus as ray_<name>, and adds tags for node, worker and session of its own.
Units are seconds and frames, totals end in _total. Importing this starts no Ray, and outside a
Ray worker recording does nothing. What shaped the rest (Ray 2.60, measured, docs/watching.md):

- An instrument holds 2,000 combinations of tags per process; what comes later is lumped together,
  and every series of the instrument gets an extra tag. So a camera is a tag only for the first
  CAMERAS that a replica sees, and of histograms for the first HISTOGRAM_CAMERAS; all further ones
  share the value "other".
- A gauge that is not set again within 20 s is gone. So who owns gauges sets all of them every
  GAUGES_S, changed or not; and what is no longer true vanishes by itself.
- A counter travels as increments, which a busy machine now and then sends twice or not at all. So
  totals that must be right are gauges, which hold the total: Prometheus' rate() is the same.
- A histogram's sum is rebuilt from the middles of its buckets: use quantiles, never sum / count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray.util.metrics import Gauge, Histogram

CAMERAS = 500
"""Cameras with outcomes and drift of their own: three outcomes each stay below 2,000."""
HISTOGRAM_CAMERAS = 100
"""Cameras with histograms of their own, per consumer: 30 series each."""
SEEN_CAMERAS = 1_500
"""Cameras whose last frame and threshold are shown."""
GONE_S = 86_400.0
"""A camera silent for so long counts as taken away, as the rule CameraSilent has it."""
VERSIONS = 800
"""Versions with a score histogram of their own, per replica and life of it: since a series is never
given back, as many as 200 days bring at a refresh every six hours."""
OTHER = "other"
DEAD = "dead"
GAUGES_S = 5.0

_STAGE_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_LATENCY_SECONDS = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0, 30.0, 300.0]
# Ray takes positive bounds only: everything below is in the first bucket.
_SCORES = [1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0]
_BATCH = [1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0, 1024.0]


class Names:
    """The first `limit` names keep their own, all others are OTHER. Thread-safe.

    First come, first served, until the process ends: an instrument never gives a series back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def of(self, name: str) -> str:
        if name in self._known:
            return name
        with self._lock:
            if len(self._known) < self._limit:
                self._known.add(name)
                return name
        return OTHER


class ReplicaMetrics:
    """That a replica has begun: who begins again and again is in trouble."""

    def __init__(self, part: str, rank: int) -> None:
        self._started = Gauge(
            "dpdl_replica_started_timestamp_seconds",
            "When a replica began (Unix seconds); a replacement takes over its predecessor's rank.",
            ("part", "rank"),
        )
        self._tags = {"part": part, "rank": str(rank)}
        self._at = time.time()

    def alive(self) -> None:
        self._started.set(self._at, self._tags)


class ExpiryMetrics:
    """That Kafka removed frames before they were scored: shown by the consumer that had to pass
    over them, and by the watch for as long as nobody does. That it lost scored ones, cut off at a
    partition's end: shown by the consumer that found it."""

    def __init__(self) -> None:
        self._last = Gauge(
            "dpdl_frames_expired_timestamp_seconds",
            "When frames were last found to have expired in Kafka unscored (Unix seconds).",
            ("topic", "partition"),
        )
        self._lost = Gauge(
            "dpdl_frames_lost_total",
            "Scored frames that Kafka was found to have lost at a partition's end.",
            ("topic", "partition"),
        )
        self._lost_at = Gauge(
            "dpdl_frames_lost_timestamp_seconds",
            "When Kafka was last found to have lost frames (Unix seconds).",
            ("topic", "partition"),
        )

    def show(self, topic: str, last_s: Mapping[int, float]) -> None:
        """last_s: partition -> when (Unix seconds), of those where it has happened."""
        for partition, at_s in last_s.items():
            self._last.set(at_s, {"topic": topic, "partition": str(partition)})

    def lost(self, topic: str, found: Mapping[int, tuple[int, float]]) -> None:
        """found: partition -> frames since this process began, and when last (Unix seconds)."""
        for partition, (frames, at_s) in found.items():
            tags = {"topic": topic, "partition": str(partition)}
            self._lost.set(frames, tags)
            self._lost_at.set(at_s, tags)


class StreamMetrics:
    """What a consumer replica records. One per process; methods are cheap and thread-safe."""

    def __init__(self) -> None:
        self._cameras, self._versions = Names(HISTOGRAM_CAMERAS), Names(VERSIONS)
        self._score = Histogram(
            "dpdl_score", "Anomaly scores of frames, in the model's unit.", _SCORES, ("camera",)
        )
        self._energy = Histogram(
            "dpdl_energy",
            "The share of the score that comes from the distance to normal prototypes, same unit.",
            _SCORES,
            ("camera",),
        )
        self._version_score = Histogram(
            "dpdl_version_score",
            "Anomaly scores of frames by the version that gave them, in the model's unit.",
            _SCORES,
            ("model", "version"),
        )
        self._latency = Histogram(
            "dpdl_latency_seconds",
            "From a frame's capture to its published result, by the clocks of camera and consumer.",
            _LATENCY_SECONDS,
            ("model",),
        )
        self._stage = Histogram(
            "dpdl_stage_seconds",
            "From one mark to the next: consumed (since its capture, by frame), decoded, scored, "
            "published (by batch).",
            _STAGE_SECONDS,
            ("stage",),
        )
        self._batch = Histogram("dpdl_batch_frames", "Frames per scoring call.", _BATCH)
        self._in_flight = Gauge("dpdl_in_flight_batches", "Batches between poll and publish.")

    def scored(self, camera: str, model: str, version: str, *, score: float, energy: float) -> None:
        where = {"camera": self._cameras.of(camera)}
        self._score.observe(score, where)
        self._energy.observe(energy, where)
        self._version_score.observe(score, {"model": model, "version": self._versions.of(version)})

    def latency(self, model: str, seconds: float) -> None:
        self._latency.observe(max(seconds, 0.0), {"model": model})

    def stage(self, stage: str, seconds: float) -> None:
        self._stage.observe(max(seconds, 0.0), {"stage": stage})

    def batch(self, frames: int) -> None:
        self._batch.observe(frames)

    def in_flight(self, batches: int) -> None:
        self._in_flight.set(batches)


class ScorerMetrics:
    """What a scorer replica says of its versions and of drift; all gauges, see GAUGES_S."""

    def __init__(self) -> None:
        self._cameras = Names(CAMERAS)
        self._active = Gauge(
            "dpdl_active_version", "1 for the version that scores now.", ("model", "version")
        )
        self._refused = Gauge(
            "dpdl_version_refused",
            "1 for a version that the pointer names and this replica will not use.",
            ("model", "version"),
        )
        self._replaced = Gauge(
            "dpdl_model_replaced",
            "1 for a model that cameras are bound to and that this replica cannot use: the default "
            "one scores them.",
            ("model",),
        )
        self._drift = Gauge(
            "dpdl_drift_psi",
            "Population stability index of a camera's last frames against the version's held-out "
            "normals, of energy or prototypes. Above its bound: it has moved.",
            ("model", "camera", "of"),
        )
        self._bound = Gauge(
            "dpdl_drift_bound",
            "What dpdl_drift_psi of frames like the version's held-out normals rarely exceeds.",
            ("model", "camera", "of"),
        )

    def versions(self, model: str, active: str, refused: str | None) -> None:
        self._active.set(1, {"model": model, "version": active})
        if refused:
            self._refused.set(1, {"model": model, "version": refused})

    def replaced(self, models: Iterable[str]) -> None:
        for model in models:
            self._replaced.set(1, {"model": model})

    def drift(self, model: str, by_camera: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
        """Camera -> "energy", "prototypes" -> PSI and bound. Those beyond CAMERAS are left out: a
        camera counts once for each model that has scored it."""
        for camera, found in by_camera.items():
            if self._cameras.of(f"{model}/{camera}") == OTHER:
                continue
            for of, (psi, bound) in found.items():
                tags = {"model": model, "camera": camera, "of": of}
                self._drift.set(psi, tags)
                self._bound.set(bound, tags)


@dataclass(frozen=True, slots=True)
class CameraFacts:
    camera: str
    last_frame_s: float
    """When its last frame was scored (Unix seconds): a camera's own clock may be anything."""
    threshold: float | None


class WatchMetrics:
    """What the stores say, whoever is alive to process it; for gauges see GAUGES_S.

    Frames and dead letters follow the totals that the stores keep. They begin at the total, so that
    a restart changes nothing, and are never lowered: a camera that is forgotten, or a store that is
    emptied, takes nothing away, and what comes after adds up.
    """

    def __init__(self) -> None:
        self._counted, self._cameras = Names(CAMERAS), Names(SEEN_CAMERAS)
        self._known: dict[tuple[str, str], int] = {}
        """(camera or reason, outcome) -> its total at the last look."""
        self._totals: Counter[tuple[str, str]] = Counter()
        """(camera's own name or OTHER, outcome) -> what is shown."""
        self._lock = threading.Lock()
        self._frames = Gauge(
            "dpdl_frames_total",
            "Frames brought to their end, by camera and outcome: normal, anomaly (over the "
            "threshold, but no alert), alert, or dead (camera is empty).",
            ("camera", "outcome"),
        )
        self._dead = Gauge("dpdl_dead_letters_total", "Records put aside, by reason.", ("reason",))
        self._lag = Gauge(
            "dpdl_lag_frames",
            "Frames in Kafka whose result is not yet published.",
            ("topic", "partition"),
        )
        self._up = Gauge(
            "dpdl_store_up", "1 for a store that answers, 0 for one that does not.", ("store",)
        )
        self._last_frame = Gauge(
            "dpdl_camera_last_frame_timestamp_seconds",
            "When a camera's last frame was scored (Unix seconds).",
            ("camera",),
        )
        self._threshold = Gauge(
            "dpdl_threshold",
            "Threshold of a camera's last frame, unit of the score.",
            ("camera",),
        )
        self._decisions = Gauge(
            "dpdl_refresh_decisions",
            "Refreshes and trainings that the gate has decided, ever: promoted or held.",
            ("model", "decision"),
        )
        self._decided = Gauge(
            "dpdl_refresh_decided_timestamp_seconds",
            "When the gate last decided so (Unix seconds), 0 for never.",
            ("model", "decision"),
        )
        self._moved = Gauge(
            "dpdl_pointer_moved_timestamp_seconds",
            "When the gate or a person last made a version current (Unix seconds), 0 for never.",
            ("model",),
        )

        self._owed = Gauge(
            "dpdl_evidence_owed", "Alerts whose picture S3 has not taken yet; it is noted in Redis."
        )
        self._lost = Gauge(
            "dpdl_evidence_lost_total", "Alerts that stay without a picture: S3 did not take it."
        )
        self._look_due = Gauge(
            "dpdl_refresh_look_due_timestamp_seconds",
            "When a loop of refreshes is to have looked again (Unix seconds).",
            ("model",),
        )

    def store(self, store: str, *, up: bool) -> None:
        self._up.set(int(up), {"store": store})

    def counts(self, camera: str, frames: int, anomalies: int, alerts: int) -> None:
        """Totals of one camera, as Redis keeps them."""
        outcomes = {"normal": frames - anomalies, "anomaly": anomalies - alerts, "alert": alerts}
        name = self._counted.of(camera)
        with self._lock:
            for outcome, total in outcomes.items():
                self._totals[name, outcome] += self._new(camera, outcome, total)

    def dead_letters(self, by_reason: Mapping[str, int]) -> None:
        """Totals, as Redis keeps them."""
        with self._lock:
            for reason, total in by_reason.items():
                self._totals[reason, DEAD] += self._new(reason, DEAD, total)

    def _new(self, name: str, outcome: str, total: int) -> int:
        """By how much a total has grown; all of it where the store has begun anew."""
        before = self._known.get((name, outcome), 0)
        self._known[name, outcome] = total
        return total - before if total >= before else total

    def totals(self) -> None:
        """Show what counts() and dead_letters() were told, also while their store is away."""
        with self._lock:
            totals = dict(self._totals)
        for (name, outcome), total in totals.items():
            if outcome == DEAD:
                self._dead.set(total, {"reason": name})
            elif total:
                self._frames.set(total, {"camera": name, "outcome": outcome})
        dead = sum(total for (_, outcome), total in totals.items() if outcome == DEAD)
        if dead:
            self._frames.set(dead, {"camera": "", "outcome": DEAD})

    def lag(self, topic: str, by_partition: Mapping[int, int]) -> None:
        for partition, frames in by_partition.items():
            self._lag.set(frames, {"topic": topic, "partition": str(partition)})

    def cameras(self, seen: Iterable[CameraFacts]) -> None:
        """Cameras beyond SEEN_CAMERAS share one series: that of the longest silent of them, but of
        none that counts as taken away: the rule would be deaf to all others."""
        oldest, gone_s = float("inf"), time.time() - GONE_S
        for each in seen:
            camera = self._cameras.of(each.camera)
            if camera == OTHER:
                if each.last_frame_s > gone_s:
                    oldest = min(oldest, each.last_frame_s)
                continue
            self._last_frame.set(each.last_frame_s, {"camera": camera})
            if each.threshold is not None:
                self._threshold.set(each.threshold, {"camera": camera})
        if oldest != float("inf"):
            self._last_frame.set(oldest, {"camera": OTHER})

    def refreshes(self, model: str, decision: str, number: int, last_s: float) -> None:
        tags = {"model": model, "decision": decision}
        self._decisions.set(number, tags)
        self._decided.set(last_s, tags)

    def evidence(self, owed: int, lost: int) -> None:
        """Totals, as Redis keeps them."""
        self._owed.set(owed)
        self._lost.set(lost)

    def look_due(self, model: str, at_s: float) -> None:
        self._look_due.set(at_s, {"model": model})

    def pointer(self, model: str, moved_s: float) -> None:
        self._moved.set(moved_s, {"model": model})
