"""What the stores say of the stream, as metrics: lag, cameras, outcomes, refreshes; or that they do
not answer.

Looks from outside: at Kafka's ends, at Redis, at the decisions in S3. So lag grows and cameras fall
silent in the metrics also when no consumer is alive to say so, and a restart of any replica loses
no count: totals are what Redis holds, which is exactly once. Runs in threads of the one console
replica.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from kafka import KafkaConsumer

from infra import looks
from infra.decisions import Decision, Recorded
from infra.errors import DataError, DpdlError, NotFound, VersionBroken
from infra.kafka_client import (
    behind,
    bounds_of,
    kafka_errors,
    make_consumer,
    no_leader,
    partitions_of,
    topic_id,
)
from infra.looks import Look
from infra.metrics import GAUGES_S, CameraFacts, ExpiryMetrics, ReplicaMetrics, WatchMetrics
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.settings import Settings
from serving.archive import Debts

log = logging.getLogger("dpdl.watch")

DECISIONS_S = 30.0
"""How often S3 is listed."""
DECISIONS = ("promoted", "held")


class _Listed(NamedTuple):
    """What S3 said of a model."""

    at_s: float
    """When it did (time.monotonic())."""
    decisions: list[Decision]
    moved_s: float | None
    """Watch._moved_s()."""
    look: Look | None
    """The last one of a loop of refreshes."""


class Watch:
    """Looks every GAUGES_S from daemon threads; a store that is away only costs its own figures.

    Args:
        model_name: whose refreshes are counted, beside those of all models that have scored.
    """

    def __init__(
        self, settings: Settings, results: ResultStore, model_name: str, replica: ReplicaMetrics
    ) -> None:
        self._settings, self._results = settings, results
        self._models, self._replica = {model_name}, replica
        self._metrics, self._expiry = WatchMetrics(), ExpiryMetrics()
        self._kafka: KafkaConsumer | None = None
        self._store = ModelStore(settings)
        self._decisions: dict[str, Recorded] = {}
        self._listed: dict[str, _Listed] = {}
        self._debts = Debts(settings)
        self._trouble: dict[str, DpdlError | None] = {}
        """Store -> why it cannot be looked at; None when all is well."""
        self.waiting: dict[int, int] = {}
        """Partition -> frames in Kafka whose result is not yet published, at the last look."""
        self._expired_s: dict[int, float] = {}
        """Partition -> when frames of it were last seen to have expired unscored (Unix seconds)."""
        stores = {
            "Kafka": self._look_at_lag,
            "Redis": self._look_at_cameras,
            "S3": self._look_at_decisions,
        }
        # A thread for each: one that waits for a store must not silence what is known of another.
        threads = [threading.Thread(target=self._show, name="watch", daemon=True)]
        for store, look in stores.items():
            threads.append(
                threading.Thread(
                    target=self._follow, args=(store, look), name=f"watch {store}", daemon=True
                )
            )
        for thread in threads:
            thread.start()

    def _show(self) -> None:
        while True:
            self._replica.alive()
            for store, trouble in list(self._trouble.items()):
                self._metrics.store(store, up=not _is_away(trouble))
            self._metrics.totals()
            time.sleep(GAUGES_S)

    def _follow(self, store: str, look: Callable[[], None]) -> None:
        while True:
            try:
                look()
                self._trouble[store] = None
            except DpdlError as error:
                if str(self._trouble.get(store)) != str(error):
                    log.warning("cannot look at %s: %s", store, error)
                self._trouble[store] = error
            except Exception:  # whatever a store holds, the next look may find something else
                log.exception("looking at %s", store)
                self._trouble[store] = None  # it answered
            time.sleep(GAUGES_S)

    def _look_at_lag(self) -> None:
        topic = self._settings.kafka.topic
        try:
            if self._kafka is None:
                self._kafka = make_consumer(self._settings)
            with kafka_errors(self._settings.kafka):
                this, places = topic_id(self._kafka, topic), partitions_of(self._kafka, topic)
                # Before Kafka's end: what is published between the two is not beyond it then.
                stored = self._stored(this, [place.partition for place in places])
                bounds = bounds_of(self._kafka, places)
        except DpdlError:
            if self._kafka is not None:
                self._kafka.close()
            self._kafka = None
            raise
        if stored is None:
            return  # Kafka answers; that Redis does not is said by its own thread
        self.waiting = {p: behind(*bounds[p], stored[p]) for p in bounds}
        self._metrics.lag(topic, self.waiting)
        # A consumer says so too, when it comes to them; here also while none is alive.
        for p, (begin, _) in bounds.items():
            if (next_offset := stored[p]) is not None and next_offset < begin:
                self._expired_s[p] = time.time()
        self._expiry.show(topic, self._expired_s)
        if leaderless := stored.keys() - bounds.keys():
            raise no_leader(topic, leaderless)

    def _stored(self, topic_id: str, partitions: Sequence[int]) -> dict[int, int | None] | None:
        """Partition -> next offset; None where Redis does not answer."""
        topic, group = self._settings.kafka.topic, self._settings.kafka.group
        try:
            return self._results.next_offsets(group, topic, topic_id, partitions)
        except DpdlError:
            return None

    def _look_at_cameras(self) -> None:
        seen = self._results.cameras()
        self._models = self._models | {each.model for each in seen if each.model}
        for each in seen:
            self._metrics.counts(each.camera, each.frames, each.anomalies, each.alerts)
        self._metrics.dead_letters(self._results.dead_letters())
        self._metrics.evidence(len(self._debts), self._debts.lost())
        self._metrics.cameras(
            CameraFacts(each.camera, each.last_scored_at_ns / 1e9, each.threshold_used)
            for each in seen
            if each.last_scored_at_ns is not None
        )

    def _look_at_decisions(self) -> None:
        trouble: DpdlError | None = None
        for model in sorted(self._models):
            try:
                self._look_at_decisions_of(model)
            except DataError as error:  # one model's: the others have theirs
                trouble = error
        if trouble is not None:
            raise trouble

    def _look_at_decisions_of(self, model: str) -> None:
        known = self._decisions.setdefault(model, Recorded(self._settings, model))
        seen = self._listed.get(model)
        if seen is None or time.monotonic() - seen.at_s > DECISIONS_S:
            look = looks.last(self._settings, model)
            seen = _Listed(time.monotonic(), known.all(), self._moved_s(model), look)
            self._listed[model] = seen
        if seen.moved_s is not None:
            self._metrics.pointer(model, seen.moved_s)
        if seen.look is not None:
            self._metrics.look_due(model, seen.look.due_s)
        for decision in DECISIONS:
            such = [each.at for each in seen.decisions if each.decision == decision]
            last = max(such, default="")
            self._metrics.refreshes(model, decision, len(such), _unix_s(last))

    def _moved_s(self, model: str) -> float | None:
        """When the pointer last moved. None for one that cannot be read: S3 answers, and scorers
        say what is wrong with it."""
        try:
            pointer = self._store.current(model)
        except VersionBroken:
            return None
        return _unix_s(pointer.promoted_at if pointer else "")


def _is_away(trouble: DpdlError | None) -> bool:
    """Not where only something in a store is broken; but where a topic or bucket is gone."""
    return trouble is not None and (
        isinstance(trouble, NotFound) or not isinstance(trouble, DataError)
    )


def _unix_s(moment: str) -> float:
    """Of ISO 8601; 0 for never."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0
