"""The heart of the stream: frames in order, each scored once, whatever dies in between.

Knows no Kafka, Redis, S3 or Ray: three small Protocols (batch.py) stand for them, so that a test
can abort between every two steps (tests/serving/test_loop.py).

The guarantee: exactly-once results. The results of a span of offsets, its alerts and the
partition's next offset are written in one step by `Sink.publish`, which refuses (`Fenced`) a span
that does not begin at the stored offset. Reading begins at the stored offset. So everything
before `publish` may happen twice and changes nothing, and `publish` itself cannot: after a crash
the span is read again, and a consumer that lost its partition is refused.

What goes with it: a bad record is put aside before its offset is passed, so it is never nowhere
(twice is possible after a crash; its frame id tells). Evidence is written under a key made of the
frame id and its time of capture, so that writing it again is the same. Kafka's own commit is for
lag metrics only; nothing reads it back.

A polled batch is scored by one call for each model that its cameras are bound to: each call by one
version of one model, and a result names both.

Memory: at most `depth` batches are between decode and publish, and nothing is polled beyond them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from infra.errors import DpdlError, Fenced
from infra.messages import FrameResult, KafkaRecord, frame_id
from serving.batch import (
    BadRecord,
    Batch,
    BatchReport,
    Decode,
    Decoded,
    Plan,
    Polled,
    Report,
    Score,
    Scored,
    Sink,
    Source,
    Span,
    WrongSize,
)

log = logging.getLogger("dpdl.stream")
T = TypeVar("T")

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
WAIT_S = 5.0
"""How often the loop shows life while the scorer is away, and polls idly while it decodes."""


class _Clock:
    def __init__(self, stage_ms: dict[str, float]) -> None:
        self.stage_ms = stage_ms
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stage_ms[stage] = round((now - self._last) * 1000, 1)
        self._last = now


@dataclass(slots=True)
class _Flight:
    """A polled batch between decode and publish."""

    decoded: Decoded
    answers: list[Future[Scored | WrongSize]]
    """Of decoded.batches. Empty when no record was good: there is only an offset to pass."""
    polled_at_ns: int
    clock: _Clock
    """Goes on from submit to answer, so that waiting behind other batches counts as scoring."""

    def done(self) -> bool:
        return all(answer.done() for answer in self.answers)


class Stopping(Exception):
    """A step still failed when the drain's deadline came; what is in flight will be replayed."""


class Loop:
    """Runs the steps, in the order that the module's docstring promises.

    Args:
        depth: batches between decode and publish. Two keep the scorer busy: one is scored while
            the next is polled and decoded.
        drain_s: how long after `stop` the batches in flight may take to be published.
    """

    def __init__(
        self,
        source: Source,
        decode: Decode,
        score: Score,
        sink: Sink,
        *,
        report: Report,
        depth: int = 2,
        drain_s: float = 15.0,
    ) -> None:
        self._source, self._decode, self._score, self._sink = source, decode, score, sink
        self._report = report
        self._depth = depth
        self._drain_s = drain_s
        self._in_flight: deque[_Flight] = deque()
        self._stop = threading.Event()
        self._stop_by = float("inf")
        self.last_poll_s = time.monotonic()
        """When the loop last went round, decoded or retried: its sign of life."""
        self._idled_s = self.last_poll_s
        self.trouble = ""
        """What is being retried just now, for people; "" when all is well."""

    @property
    def in_flight(self) -> int:
        """Batches between decode and publish."""
        return len(self._in_flight)

    def stop(self) -> None:
        """Any thread: poll no more, publish what is in flight within the deadline, return."""
        self._stop_by = time.monotonic() + self._drain_s
        self._stop.set()

    def run(self) -> None:
        """Scores frames until `stop`. Whatever it raises, nothing is lost or doubled."""
        try:
            while not self._stop.is_set():
                polled = self._patiently("reading frames", lambda: self._source.poll(self._due))
                if polled:
                    self._in_flight.append(self._launch(polled))
                # At full depth this waits for the oldest; nothing more is read meanwhile.
                while self._in_flight and (self._due() or len(self._in_flight) >= self._depth):
                    self._land(self._in_flight.popleft())
            while self._in_flight:
                self._land(self._in_flight.popleft())
        except Stopping as why:
            log.warning("stopped with %d batches to replay: %s", len(self._in_flight) + 1, why)

    def _due(self) -> bool:
        return self._stop.is_set() or (bool(self._in_flight) and self._in_flight[0].done())

    def _launch(self, polled: Polled) -> _Flight:
        polled_at_ns = time.time_ns()
        clock = _Clock({"poll": round(polled.waited_s * 1000, 1)})
        plan = self._patiently("asking which model is wanted", self._score.plan)
        decoded = self._decode(polled, plan, self._show_life)  # 1. decode
        clock.lap("decode")
        if decoded.bad:  # 2. bad records are kept before their offset is passed
            self._set_aside(decoded.bad)
            clock.lap("aside")
        answers = [self._score.submit(each) for each in decoded.batches]  # 3. score: a call a model
        return _Flight(decoded, answers, polled_at_ns, clock)

    def _land(self, flight: _Flight) -> None:
        clock, spans = flight.clock, flight.decoded.polled.spans
        report = BatchReport(
            polled_at_ns=flight.polled_at_ns,
            offsets={f"{s.partition.number}": [s.first, s.next] for s in spans},
            stage_ms=clock.stage_ms,
        )
        results: list[FrameResult] = []
        bad = list(flight.decoded.bad)
        if flight.answers:
            pairs = zip(flight.decoded.batches, flight.answers, strict=True)
            answered = [self._answered(batch, answer, bad) for batch, answer in pairs]
            clock.lap("score")
            for batch, scored in filter(None, answered):
                judged, senseless = self._judge(batch, scored)  # 4. evidence
                results += judged
                bad += senseless
                report.versions[scored.model] = scored.version
            results.sort(key=lambda result: result.offset)  # within each partition: as they came
            clock.lap("evidence")
        published = []
        for span in spans:  # 5. results, alerts and next offset: one step
            mine = [r for r in results if _within(span, r.frame_id)]
            dead = Counter(each.reason for each in bad if _within(span, _frame_id(each.record)))
            alerts = self._published(span, mine, dead)
            if alerts is None:
                continue
            published.append(span)
            report.results += mine
            report.alerts += alerts
            report.bad.update(dead)
        clock.lap("publish")
        self._source.commit(published)  # 6. for lag metrics only
        report.dropped_spans = len(spans) - len(published)
        self._report(report)

    def _answered(
        self, batch: Batch, answer: Future[Scored | WrongSize], bad: list[BadRecord]
    ) -> tuple[Batch, Scored] | None:
        """Waits for the scores; asks again when the scorer was replaced or changed its size.

        Adds to `bad`, and puts aside, what cannot be decoded at that size; None when nothing can.
        """
        pending: Future[Scored | WrongSize] | None = answer

        def ask() -> Scored | WrongSize:
            nonlocal pending
            asked = pending or self._score.submit(batch)
            pending = None  # a failed answer is not asked for again, its question is
            while wait([asked], timeout=WAIT_S).not_done:
                if time.monotonic() > self._stop_by:
                    raise Stopping("scoring: no answer")
                self._show_life()
            return asked.result()

        while True:
            scored = self._patiently("scoring", ask)
            if isinstance(scored, Scored):
                return batch, scored
            # Never resized from the decoded pixels: online scores equal offline ones.
            plan = Plan(scored.image_size, dict.fromkeys(_cameras(batch), batch.model))
            again = self._decode(Polled(batch.records, []), plan, self._show_life)
            self._set_aside(again.bad)
            bad += again.bad
            if not again.batches:
                return None
            (batch,) = again.batches

    def _show_life(self) -> None:
        """In a long step, as often as it likes: to Serve, and to Kafka, by polling idly."""
        self.last_poll_s = time.monotonic()
        if self.last_poll_s - self._idled_s >= WAIT_S:
            self._source.idle(0)
            self._idled_s = self.last_poll_s

    def _set_aside(self, bad: Sequence[BadRecord]) -> None:
        if bad:
            self._patiently("putting bad records aside", lambda: self._sink.set_aside(bad))

    def _judge(self, batch: Batch, scored: Scored) -> tuple[list[FrameResult], list[BadRecord]]:
        """Results of a batch, evidence of its anomalies kept; frames without a finite score."""
        finite = np.isfinite(scored.score) & np.isfinite(scored.energy)
        senseless = [
            BadRecord(record, "score-not-finite", f"version {scored.version}")
            for record, fine in zip(batch.records, finite, strict=True)
            if not fine
        ]
        self._set_aside(senseless)
        rows = [row for row in sorted(scored.maps) if finite[row]]
        keys: dict[int, str] = {}
        if rows:
            frames, maps = [batch.frames[r] for r in rows], [scored.maps[r] for r in rows]
            kept = self._patiently(
                "keeping evidence", lambda: self._sink.keep_evidence(frames, maps)
            )
            keys = dict(zip(rows, kept, strict=True))
        now_ns = time.time_ns()
        return [
            FrameResult(
                frame_id=frame.frame_id,
                camera=frame.camera,
                captured_at_ns=frame.captured_at_ns,
                scored_at_ns=now_ns,
                score=float(scored.score[row]),
                threshold=float(scored.threshold[row]),
                energy=float(scored.energy[row]),
                is_anomaly=row in keys,
                model=scored.model,
                version=scored.version,
                evidence_key=keys.get(row, ""),
            )
            for row, frame in enumerate(batch.frames)
            if finite[row]
        ], senseless

    def _published(
        self, span: Span, results: Sequence[FrameResult], dead: Mapping[str, int]
    ) -> int | None:
        """Alerts raised; None when the span is not ours to publish."""

        def publish() -> int | None:
            if not self._source.holds(span):
                return None  # revoked meanwhile: its new owner reads it again
            return self._sink.publish(span, results, dead)

        try:
            return self._patiently("publishing", publish)
        except Fenced as fenced:
            if fenced.expected == span.next:
                return 0  # it is in: a first try had worked, and only its answer was lost
            log.warning("partition %d: %s", span.partition.number, fenced)
            self._source.rewind(span.partition)
            return None

    def _patiently(self, doing: str, step: Callable[[], T]) -> T:
        """Retries a step whose error says that a retry helps, with back-off, reading nothing."""
        wait_s = FIRST_RETRY_S
        failed_since = 0.0
        while True:
            self.last_poll_s = time.monotonic()
            try:
                done = step()
            except DpdlError as error:
                if not error.retryable:
                    raise
                if time.monotonic() + wait_s > self._stop_by:
                    raise Stopping(f"{doing}: {error}") from error
                if not failed_since:
                    failed_since = time.monotonic()
                    self.trouble = f"{doing} failed, retrying: {error}"
                    log.warning("%s failed, retrying: %s", doing, error)
                self._source.idle(wait_s)
                wait_s = min(2 * wait_s, LAST_RETRY_S)
                continue
            if failed_since:
                self.trouble = ""
                log.warning("%s works again after %.1f s", doing, time.monotonic() - failed_since)
            return done


def _frame_id(record: KafkaRecord) -> str:
    return frame_id(record.topic, record.partition, record.offset)


def _cameras(batch: Batch) -> set[str]:
    return {frame.camera for frame in batch.frames}


def _within(span: Span, frame: str) -> bool:
    topic, number, offset = frame.rsplit("/", 2)
    return (topic, int(number)) == span.partition and span.first <= int(offset) < span.next
