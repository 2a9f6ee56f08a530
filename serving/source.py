"""Frames out of Kafka: batches across partitions, each partition read from Redis' offset on.

One KafkaConsumer, used by the loop's thread only. Kafka says which partitions are ours; where to
read them from is said by the result store alone. A lease numbers each such beginning: what was
read under an older lease (revoked, rewound) is void, and the loop drops it.

Memory: what is fetched and not yet polled is bounded by the consumer's fetch.max.bytes, a batch
by its frames and by MAX_BATCH_BYTES; a loop that does not poll fetches nothing.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from kafka import ConsumerRebalanceListener, KafkaConsumer
from kafka.errors import KafkaError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata, TopicPartition

from infra.errors import DpdlError, ServiceUnavailable
from infra.kafka_client import (
    bounds_of,
    kafka_errors,
    no_leader,
    partitions_of,
    position_of,
    topic_id,
)
from infra.messages import KafkaRecord
from infra.redis_client import ResultStore
from infra.settings import Settings
from serving.batch import Partition, Polled, Span

log = logging.getLogger("dpdl.stream")

MAX_BATCH_BYTES = 64 * 2**20
SLICE_S = 0.01
"""How often a waiting poll looks whether scores have come: adds to latency on average half."""
IDLE_S = 0.5
"""Longest poll with nothing to read; the loop shows life and sees `stop` between two."""


def consumer_group(settings: Settings, results: ResultStore) -> str:
    """Kafka's, for the consumers that share these results.

    Another installation on the same Kafka, with a Redis of its own and the same kafka.group, would
    else be given part of our partitions, and we never see their frames.
    """
    return f"{settings.kafka.group}-{results.store_id()}"


class Offsets(Protocol):
    """The part of the result store that says where a partition goes on."""

    def next_offset(self, group: str, topic: str, partition: int) -> int | None: ...
    def set_start(self, group: str, topic: str, partition: int, offset: int) -> int: ...
    def set_topic_id(self, group: str, topic: str, topic_id: str) -> str: ...
    def take_back(
        self, group: str, topic: str, topic_id: str, partition: int, stored: int, end: int
    ) -> int | None: ...


class KafkaSource(ConsumerRebalanceListener):  # type: ignore[misc]
    """serving.batch.Source over a KafkaConsumer with auto-commit off.

    A partition that the store has never seen is read from its beginning, and that is written to
    the store before its first record is polled.

    A topic that was made anew counts its offsets from 0 again: its frames are not read from where
    the old one's ended, but refused, until a person names another group. Where it is the same
    topic and Kafka has lost its last frames (a power cut, an unclean election), reading goes on at
    Kafka's end: what comes next bears the offsets of what is lost.
    """

    def __init__(self, consumer: KafkaConsumer, offsets: Offsets, settings: Settings) -> None:
        self._consumer, self._offsets = consumer, offsets
        self._kafka, self._limits = settings.kafka, settings.stream
        self._lease_numbers = itertools.count(1)
        self._leases: dict[Partition, int] = {}
        self._positions: dict[Partition, int] = {}
        self._unplaced: set[Partition] = set()
        self._refused = ""
        """Why the topic is not read. Kept: soon it ends beyond what is stored of the old one."""
        self.trouble = ""
        """Which of our partitions cannot be read just now, for people; "" when all can."""
        self.expired_s: dict[int, float] = {}
        """Partition -> when frames were last found to have expired unscored (Unix seconds)."""
        self.lost: dict[int, tuple[int, float]] = {}
        """Partition -> scored frames that Kafka was found to have lost, and when last (Unix s)."""
        self.behind: dict[int, int] = {}
        """Frames in Kafka beyond what was polled, per partition that we read; for any thread."""
        consumer.subscribe([settings.kafka.topic], listener=self)
        with kafka_errors(settings.kafka):
            # Before joining: kafka-python 3.0.12 forgets to ask for the topic when a metadata
            # request is in flight, and its assignor then gives nobody anything for minutes.
            partitions_of(consumer, settings.kafka.topic)

    # Called by kafka-python inside poll(), so in the loop's thread. Nothing that can fail or wait
    # is done here: placing needs Redis, and an error would be lost inside the client.
    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        for place in assigned:
            # Any position and no fetching until placed: else the client looks for Kafka's own
            # committed offset, which means nothing here.
            self._consumer.seek(place, 0)
            self._consumer.pause(place)
            self._void([Partition(*place)])

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        partitions = [Partition(*each) for each in revoked]
        self._void(partitions)
        self._unplaced.difference_update(partitions)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)

    def poll(self, until: Callable[[], bool]) -> Polled | None:
        """Up to max_batch frames, waiting at most max_wait_s after the first.

        With none, where only offsets without a frame are to be passed: a transaction's control
        records, or what expired.
        ServiceUnavailable when Kafka or Redis is away; nothing polled is forgotten then.
        """
        try:
            return self._polled(until)
        finally:
            self._measure()

    def _polled(self, until: Callable[[], bool]) -> Polled | None:
        self._place()
        records: list[KafkaRecord] = []
        spans: dict[Partition, Span] = {}
        room, num_bytes, first_s = self._limits.max_batch, 0, 0.0
        idle_until = time.monotonic() + IDLE_S
        while room > 0 and num_bytes < MAX_BATCH_BYTES:
            now = time.monotonic()
            left_s = first_s + self._limits.max_wait_s - now if records else SLICE_S
            if left_s <= 0 or (not records and (until() or now > idle_until)):
                break
            try:
                got = self._fetched(left_s, room)
            except DpdlError:
                if spans:
                    break  # score these; the next poll says it again
                raise
            for source, polled in got.items():
                fresh = self._fresh(Partition(*source), polled)
                records += fresh
                room -= len(fresh)
                num_bytes += sum(len(record.value or b"") for record in fresh)
            self._extend(spans)
            if records and not first_s:
                first_s = now
        if not spans:
            return None
        waited_s = time.monotonic() - first_s if records else 0.0
        return Polled(records, list(spans.values()), waited_s=waited_s)

    def _fetched(self, wait_s: float, room: int) -> dict[TopicPartition, list[KafkaRecord]]:
        try:
            with kafka_errors(self._kafka):
                got = self._consumer.poll(timeout_ms=max(1, int(wait_s * 1000)), max_records=room)
        except DpdlError as error:
            if isinstance(error.__cause__, OffsetOutOfRangeError):
                # Retention overtook us: _place() says how far and goes on where Kafka begins.
                self._void(list(self._leases))
                return {}
            raise
        return dict(got)

    def holds(self, span: Span) -> bool:
        return self._leases.get(span.partition) == span.lease

    def rewind(self, partition: Partition) -> None:
        if partition in self._leases:
            self._void([partition])

    def commit(self, spans: Sequence[Span]) -> None:
        done = {
            TopicPartition(*span.partition): OffsetAndMetadata(span.next, "", -1)
            for span in spans
            if self.holds(span)
        }
        if done:
            try:
                self._consumer.commit_async(done, callback=lambda offsets, response: None)
            except KafkaError as error:
                log.debug("Kafka's own commit failed, for lag metrics only: %r", error)

    def idle(self, seconds: float) -> None:
        """Polls with everything paused, so that the group does not throw us out meanwhile."""
        until = time.monotonic() + seconds
        try:
            self._consumer.pause(*self._consumer.assignment())
            got = self._consumer.poll(timeout_ms=int(seconds * 1000), max_records=1)
            for source in got:  # assigned during this very poll: it will be placed anew
                self.rewind(Partition(*source))
        except KafkaError as error:
            log.debug("idle poll: %r", error)
        finally:
            ours = self._consumer.assignment() & {TopicPartition(*each) for each in self._leases}
            self._consumer.resume(*ours)
            self._measure()
        time.sleep(max(0.0, until - time.monotonic()))

    def close(self, timeout_s: float) -> None:
        """Leaves the group at once, so that another consumer need not wait for the session."""
        self._consumer.close(autocommit=False, timeout_ms=int(timeout_s * 1000))

    def _measure(self) -> None:
        ends = {each: self._consumer.highwater(TopicPartition(*each)) for each in self._positions}
        self.behind = {
            each.number: max(0, end - self._positions[each])
            for each, end in ends.items()
            if end is not None
        }

    def _fresh(self, partition: Partition, polled: list[KafkaRecord]) -> list[KafkaRecord]:
        if partition not in self._leases:
            return []  # assigned in this very poll: not placed yet, will be read again
        return [record for record in polled if record.offset >= self._positions[partition]]

    def _extend(self, spans: dict[Partition, Span]) -> None:
        """Up to where the client stands by now."""
        for partition, lease in self._leases.items():
            first = self._positions[partition]
            now = position_of(self._consumer, TopicPartition(*partition))
            if now is not None and now > first:
                before = spans.get(partition)
                spans[partition] = Span(partition, before.first if before else first, now, lease)
                self._positions[partition] = now

    def _void(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._leases.pop(partition, None)
            self._positions.pop(partition, None)
            self._unplaced.add(partition)

    def _place(self) -> None:
        """Seeks each new or rewound partition to the stored offset, and leases it."""
        places = {partition: TopicPartition(*partition) for partition in sorted(self._unplaced)}
        if not places:
            self.trouble = ""
            return
        group = self._kafka.group
        # Before Kafka's end is asked: a former owner may publish meanwhile what came meanwhile.
        stored = {each: self._offsets.next_offset(group, *each) for each in places}
        with kafka_errors(self._kafka):
            # With the topic's others: the client waits in vain where none it asks for has a leader.
            others = partitions_of(self._consumer, self._kafka.topic)
            bounds = bounds_of(self._consumer, {*others, *places.values()})
        self._say_who_waits([each.number for each in places if each.number not in bounds])
        places = {each: place for each, place in places.items() if each.number in bounds}
        if places:
            ends = {each: bounds[each.number][1] for each in places}
            stored |= self._of_this_topic(ends, stored)
        for partition, place in places.items():
            begin, next_offset = bounds[partition.number][0], stored[partition]
            if next_offset is None:
                next_offset = self._offsets.set_start(group, *partition, begin)
            if next_offset < begin:
                log.error(
                    "partition %d: %d frames expired in Kafka before they were scored "
                    "(offsets %d to %d): give the topic more retention",
                    partition.number, begin - next_offset, next_offset, begin - 1,
                )  # fmt: skip
                self.expired_s[partition.number] = time.time()
            self._consumer.seek(place, max(next_offset, begin))
            self._consumer.resume(place)
            # The chain of spans goes on at the stored offset, over what expired.
            self._positions[partition] = next_offset
            self._leases[partition] = next(self._lease_numbers)
            self._unplaced.discard(partition)
            log.info(
                "partition %d: reading from offset %d", partition.number, max(next_offset, begin)
            )

    def _say_who_waits(self, leaderless: Sequence[int]) -> None:
        """They are tried again at each poll, and do not keep the others from being read."""
        error = no_leader(self._kafka.topic, leaderless) if leaderless else None
        if error and str(error) != self.trouble:
            log.warning("%s", error)
        self.trouble = str(error or "")

    def _of_this_topic(
        self, ends: Mapping[Partition, int], stored: Mapping[Partition, int | None]
    ) -> dict[Partition, int]:
        """The next offsets of partitions that Kafka has cut off before what is stored.

        ServiceUnavailable where what is stored is of another topic of the same name.
        """
        topic, group = self._kafka.topic, self._kafka.group
        held: dict[Partition, int] = {}
        with kafka_errors(self._kafka):
            this = topic_id(self._consumer, topic)
        for partition, end in ends.items():
            at = stored[partition] or 0
            if at <= end or self._refused:
                continue
            # Asked before an id is kept: progress without one may be of any topic.
            next_offset = self._offsets.take_back(group, topic, this, partition.number, at, end)
            if next_offset is None:
                self._refused = (
                    f"results are stored up to offset {at} of {topic} partition "
                    f"{partition.number}, but Kafka ends at {end}"
                )
                continue
            held[partition] = next_offset
            self._say_lost(partition.number, at, end)
        if not self._refused and this and self._offsets.set_topic_id(group, topic, this) != this:
            self._refused = f"results are stored of another topic {topic} than Kafka has now"
        if self._refused:
            raise ServiceUnavailable(
                f"{self._refused}: was the topic made anew? Then set another kafka.group, which "
                "begins with its first frame"
            )
        return held

    def _say_lost(self, partition: int, stored: int, end: int) -> None:
        log.error(
            "partition %d: Kafka has lost %d frames that were scored (offsets %d to %d), and goes "
            "on with their offsets: what it lost beyond them was never scored. Give the topic "
            "kafka.replication=3, or the broker a power supply of its own",
            partition, stored - end, end, stored - 1,
        )  # fmt: skip
        frames, _ = self.lost.get(partition, (0, 0.0))
        self.lost[partition] = (frames + stored - end, time.time())
