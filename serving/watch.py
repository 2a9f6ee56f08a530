"""What the stores say of the stream, as metrics: lag, cameras, outcomes, refreshes.

Looks from outside: at Kafka's ends, at Redis, at the decisions in S3. So lag grows and cameras fall
silent in the metrics also when no consumer is alive to say so, and a restart of any replica loses
no count: counters are brought up to what Redis holds, which is exactly once. Runs as a thread of
the one console replica.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from kafka import KafkaConsumer

from infra.decisions import Decision, Recorded
from infra.errors import DpdlError
from infra.kafka_client import kafka_errors, make_consumer, partitions_of
from infra.metrics import GAUGES_S, CameraFacts, ReplicaMetrics, WatchMetrics
from infra.redis_client import ResultStore
from infra.settings import Settings

log = logging.getLogger("dpdl.watch")

DECISIONS_S = 30.0
"""How often S3 is listed."""
DECISIONS = ("promoted", "held")


class Watch:
    """Looks every GAUGES_S from a daemon thread; a store that is away only costs its own figures.

    Args:
        model_name: whose refreshes are counted.
    """

    def __init__(
        self, settings: Settings, results: ResultStore, model_name: str, replica: ReplicaMetrics
    ) -> None:
        self._settings, self._results = settings, results
        self._model, self._replica = model_name, replica
        self._metrics = WatchMetrics()
        self._kafka: KafkaConsumer | None = None
        self._decisions: Recorded | None = None
        self._found: list[Decision] = []
        self._listed_s = float("-inf")
        self._failing: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        looks = {
            "Kafka": self._look_at_lag,
            "Redis": self._look_at_cameras,
            "S3": self._look_at_decisions,
        }
        while True:
            self._replica.alive()
            for store, look in looks.items():
                self._patiently(store, look)
            if self._stopping.wait(GAUGES_S):
                return

    def _patiently(self, store: str, look: Callable[[], None]) -> None:
        try:
            look()
            self._failing.pop(store, None)
        except DpdlError as error:
            if self._failing.get(store) != str(error):
                log.warning("cannot look at %s: %s", store, error)
            self._failing[store] = str(error)
        except Exception:  # whatever a store holds, the other figures go on
            log.exception("looking at %s", store)

    def _look_at_lag(self) -> None:
        topic, group = self._settings.kafka.topic, self._settings.kafka.group
        try:
            if self._kafka is None:
                self._kafka = make_consumer(self._settings)
            with kafka_errors(self._settings.kafka):
                places = partitions_of(self._kafka, topic)
                ends = self._kafka.end_offsets(places)
                begins = self._kafka.beginning_offsets(places)
        except DpdlError:
            if self._kafka is not None:
                self._kafka.close()
            self._kafka = None
            raise
        behind = {}
        for place, end in ends.items():
            stored = self._results.next_offset(group, topic, place.partition)
            # Before the first result, all that Kafka holds waits.
            behind[place.partition] = max(0, end - (begins[place] if stored is None else stored))
        self._metrics.lag(topic, behind)

    def _look_at_cameras(self) -> None:
        seen = self._results.cameras()
        for each in seen:
            self._metrics.counts(each.camera, each.frames, each.anomalies, each.alerts)
        self._metrics.dead_letters(self._results.dead_letters())
        self._metrics.cameras(
            CameraFacts(each.camera, each.last_captured_at_ns / 1e9, each.threshold_used)
            for each in seen
            if each.last_captured_at_ns is not None
        )

    def _look_at_decisions(self) -> None:
        if self._decisions is None:
            self._decisions = Recorded(self._settings, self._model)
        if time.monotonic() - self._listed_s > DECISIONS_S:
            self._found = self._decisions.all()
            self._listed_s = time.monotonic()
        for decision in DECISIONS:
            such = [each.at for each in self._found if each.decision == decision]
            last = max(such, default="")
            at_s = datetime.fromisoformat(last).timestamp() if last else 0.0
            self._metrics.refreshes(self._model, decision, len(such), at_s)
