"""The loop's sink on real services: dead letters to Kafka, evidence to S3, results to Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from infra.dead_letters import DeadLetters
from infra.messages import FrameRecord, FrameResult
from infra.redis_client import ResultStore
from serving.archive import Archive
from serving.batch import BadRecord, Span


class StreamSink:
    """serving.batch.Sink. Errors are infra's: those that a retry can help say so."""

    def __init__(
        self, results: ResultStore, archive: Archive, dead: DeadLetters, *, group: str
    ) -> None:
        self._results, self._archive, self._dead = results, archive, dead
        self._group = group

    def set_aside(self, bad: Sequence[BadRecord]) -> None:
        self._dead.put([(each.record, each.reason) for each in bad])

    def keep_evidence(
        self, frames: Sequence[FrameRecord], maps: Sequence[NDArray[np.float32]]
    ) -> list[str]:
        return self._archive.keep(frames, maps)

    def publish(self, span: Span, results: Sequence[FrameResult], dead: Mapping[str, int]) -> int:
        return self._results.publish(
            self._group, *span.partition, span.first, span.next, results, dead
        )
