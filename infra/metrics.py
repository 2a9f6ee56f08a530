"""Every metric of the product, declared once: name, unit, help, tags.

Ray exports them to Prometheus as ray_<name>; dashboards and alert rules use these names. Units
are seconds and bytes, counters end in _total. No tag holds a camera or a frame: their number has
no bound. Importing this starts no Ray, and outside a Ray worker recording does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

_STAGE_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
_LATENCY_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0]
# Ray takes positive bounds only: everything below is in the first bucket.
_SCORES = [0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0, 50.0]


class StreamMetrics:
    """What a consumer replica records. One per process; methods are cheap and thread-safe."""

    def __init__(self) -> None:
        self._frames = Counter(
            "dpdl_frames_total",
            "Frames brought to their end, by outcome: normal, anomaly, alert or dead.",
            ("outcome",),
        )
        self._dead = Counter(
            "dpdl_dead_letters_total", "Records put aside, by reason.", ("reason",)
        )
        self._score = Histogram(
            "dpdl_score", "Anomaly scores of frames, in the model's own unit.", _SCORES, ("model",)
        )
        self._stage = Histogram(
            "dpdl_stage_seconds",
            "Time that one batch spends in a stage: decode, score, evidence, publish.",
            _STAGE_SECONDS,
            ("stage",),
        )
        self._latency = Histogram(
            "dpdl_latency_seconds",
            "From a frame's capture to its result, by the clocks of camera and scorer.",
            _LATENCY_SECONDS,
            ("model",),
        )
        self._lag = Gauge(
            "dpdl_lag_frames", "Frames in Kafka that are not yet read.", ("topic", "partition")
        )
        self._in_flight = Gauge("dpdl_in_flight_batches", "Batches between poll and publish.")
        self._active = Gauge(
            "dpdl_active_version", "1 for the version that scores now.", ("model", "version")
        )
        self._current: tuple[str, str] | None = None

    def frames(self, outcome: str, number: int) -> None:
        if number:  # Ray refuses an increment of 0
            self._frames.inc(number, {"outcome": outcome})

    def dead_letters(self, by_reason: Mapping[str, int]) -> None:
        for reason, number in by_reason.items():
            self._dead.inc(number, {"reason": reason})
        self.frames("dead", sum(by_reason.values()))

    def scored(self, model: str, score: float, latency_s: float) -> None:
        self._score.observe(score, {"model": model})
        self._latency.observe(max(latency_s, 0.0), {"model": model})

    def stage(self, stage: str, seconds: float) -> None:
        self._stage.observe(seconds, {"stage": stage})

    def lag(self, topic: str, partition: int, frames: int) -> None:
        self._lag.set(frames, {"topic": topic, "partition": str(partition)})

    def in_flight(self, batches: int) -> None:
        self._in_flight.set(batches)

    def active_version(self, model: str, version: str) -> None:
        if self._current == (model, version):
            return
        if self._current is not None:
            self._active.set(0, dict(zip(("model", "version"), self._current, strict=True)))
        self._active.set(1, {"model": model, "version": version})
        self._current = (model, version)
