"""What became of the frames: Kafka's offsets set against what lies in Redis and the dead letters.

Counts nothing that the stream counts of itself, so that a wrong counter there cannot hide a loss.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infra.errors import DpdlError, ServiceUnavailable
from infra.kafka_client import end_offsets, kafka_errors, make_consumer, partitions_of
from infra.messages import FrameResult, frame_id
from infra.redis_client import MAX_PAGE, ResultStore
from infra.settings import Settings


@dataclass(frozen=True)
class Account:
    """Of the frames between two sets of Kafka offsets."""

    sent: int
    results: dict[str, FrameResult]
    """By frame id; of a duplicate, the newest."""
    duplicated: int
    """Results beyond the first of their frame."""
    dead: dict[str, str]
    """Frame id -> reason."""

    @property
    def lost(self) -> int:
        return self.sent - len(self.results.keys() | self.dead.keys())


def take_account(settings: Settings, start: Mapping[int, int]) -> Account:
    """Account for every frame of the topic from `start` (partition -> offset) to now."""
    topic = settings.kafka.topic
    ends = end_offsets(settings, topic)
    store = ResultStore(settings)
    try:
        cameras = [camera.camera for camera in store.cameras()]
        found = [r for camera in cameras for r in _results(store, camera, start, topic)]
    finally:
        store.close()
    counts = Counter(result.frame_id for result in found)
    offsets = (frame_id(topic, p, o) for p in ends for o in range(start.get(p, 0), ends[p]))
    sent = set(offsets)
    dead = {frame: reason for frame, reason in _dead(settings) if frame in sent}
    return Account(
        sent=len(sent),
        results={result.frame_id: result for result in reversed(found) if result.frame_id in sent},
        duplicated=sum(count - 1 for count in counts.values()),
        dead=dead,
    )


def wait_until_scored(settings: Settings, ends: Mapping[int, int], *, stall_s: float) -> None:
    """Wait until the stored offsets reach `ends`.

    Raises ServiceUnavailable when nothing has moved for stall_s.
    """
    store = ResultStore(settings)
    moved, seen = time.monotonic(), -1
    try:
        while True:
            progress = store.progress(settings.kafka.group, settings.kafka.topic)
            missing = sum(max(0, end - progress.get(p, 0)) for p, end in ends.items())
            if missing == 0:
                return
            if missing != seen:
                moved, seen = time.monotonic(), missing
            if time.monotonic() - moved > stall_s:
                raise ServiceUnavailable(
                    f"{missing} frames are not scored and nothing moved for {stall_s:.0f} s: "
                    "see the replicas' logs under /tmp/ray/session_latest/logs/serve"
                )
            time.sleep(0.2)
    finally:
        store.close()


def _results(
    store: ResultStore, camera: str, start: Mapping[int, int], topic: str
) -> Iterable[FrameResult]:
    """A camera's results in the topic from `start` on, newest first."""
    before: str | None = None
    while page := store.scores(camera, MAX_PAGE, before):
        for stored in page:
            where, partition, offset = stored.result.frame_id.rsplit("/", 2)
            if where == topic and int(offset) >= start.get(int(partition), 0):
                yield stored.result
        before = page[-1].id


def _dead(settings: Settings) -> Iterable[tuple[str, str]]:
    """(frame id, reason) of every dead letter there is."""
    topic = settings.kafka.dead_topic
    consumer = make_consumer(settings)
    try:
        with kafka_errors(settings.kafka):
            partitions = partitions_of(consumer, topic)
            ends = consumer.end_offsets(partitions)
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            while any(consumer.position(tp) < ends[tp] for tp in partitions):
                for records in consumer.poll(timeout_ms=500).values():
                    for record in records:
                        headers = dict(record.headers)
                        yield headers["dead-frame"].decode(), headers["dead-reason"].decode()
    except KeyError as error:
        raise DpdlError(f"a record in {topic} has no header {error}: who wrote it?") from None
    finally:
        consumer.close()
