"""The loop's sink on real services: dead letters to Kafka, evidence to S3, results to Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from kafka import KafkaProducer
from numpy.typing import NDArray

from infra.kafka_client import kafka_errors, send_dead
from infra.messages import FrameRecord, FrameResult
from infra.redis_client import ResultStore
from infra.settings import KafkaSettings
from serving.archive import Archive
from serving.batch import BadRecord, Span

DEAD_TIMEOUT_S = 30.0


class StreamSink:
    """serving.batch.Sink. Errors are infra's: those that a retry can help say so."""

    def __init__(
        self, results: ResultStore, archive: Archive, producer: KafkaProducer, kafka: KafkaSettings
    ) -> None:
        self._results, self._archive = results, archive
        self._producer, self._kafka = producer, kafka

    def set_aside(self, bad: Sequence[BadRecord]) -> None:
        """All sent, then all acknowledged: one round trip for however many."""
        with kafka_errors(self._kafka):
            sent = [
                send_dead(self._producer, self._kafka.dead_topic, each.record, each.reason)
                for each in bad
            ]
            for each in sent:
                each.get(timeout=DEAD_TIMEOUT_S)

    def keep_evidence(
        self, frames: Sequence[FrameRecord], maps: Sequence[NDArray[np.float32]]
    ) -> list[str]:
        return self._archive.keep(frames, maps)

    def publish(self, span: Span, results: Sequence[FrameResult], dead: Mapping[str, int]) -> int:
        group = self._kafka.group
        return self._results.publish(group, *span.partition, span.first, span.next, results, dead)
