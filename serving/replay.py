"""Replay: the past in Kafka scored again by another version, beside the live stream.

Reads without a consumer group and writes below a prefix of its own, `<prefix>:replay:<id>`, which
expires: the live stream's progress, alerts and cameras are read here and never written. The same
code decodes, scores and debounces as in the stream, with the thresholds and the cameras' own
debounce rules that hold today. Debounce begins anew at the first frame replayed. One process, no
Ray; memory is one batch and a page of live results per camera, whatever the length of the past.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import torch
from kafka import KafkaConsumer
from kafka.errors import OffsetOutOfRangeError
from kafka.structs import TopicPartition

from dpdl_core.artifact import ArtifactError
from infra.errors import DataError, ServiceUnavailable
from infra.kafka_client import (
    bounds_of,
    kafka_errors,
    make_consumer,
    no_leader,
    partitions_of,
)
from infra.messages import FrameResult, KafkaRecord
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.settings import Settings
from serving.batch import Batch, Plan, Polled, Scored
from serving.compare import Comparison
from serving.decode import Decoder
from serving.score import score_batch
from serving.versions import InUse, verified

GROUP = "replay"
QUIET_S = 30.0
"""Kafka has records for us and gives none for so long: it is away."""
PAGE = 200
_AGO = re.compile(r"(\d+)(s|m|h|d)$")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Progress = Callable[[str, float, dict[str, Any]], None]
"""(stage, fraction done, figures)"""


@dataclass(frozen=True, slots=True)
class Place:
    """An offset, the same in every partition, or a time by the records' timestamps (of arrival)."""

    offset: int | None = None
    time_ms: int | None = None

    @classmethod
    def parse(cls, text: str, *, now_s: float | None = None) -> Place:
        """An offset ("1200"), an ISO time ("2026-11-25T08:00", local without a zone) or how long
        ago ("90s", "30m", "2h", "3d"). ValueError for anything else."""
        now_s = time.time() if now_s is None else now_s
        if text.isascii() and text.isdigit():
            return cls(offset=int(text))
        if ago := _AGO.match(text):
            span_s = timedelta(seconds=int(ago[1]) * _UNIT_S[ago[2]]).total_seconds()
            return cls(time_ms=int((now_s - span_s) * 1000))
        try:
            return cls(time_ms=int(datetime.fromisoformat(text).timestamp() * 1000))
        except (ValueError, OverflowError):
            raise ValueError(
                f"{text}: wanted an offset (1200), a time (2026-11-25T08:00) or how long ago (2h)"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    model: str
    version: str
    start: Place
    end: Place | None = None
    """None: where Kafka ends when the replay begins. The frame there is not replayed."""
    cameras: Sequence[str] = ()
    """Empty: all that the model is to score by now."""
    device: str = "cpu"
    keep_days: float = 7.0
    """The replay's own results expire after this."""


def replay(settings: Settings, options: ReplayOptions, progress: Progress) -> dict[str, Any]:
    """Scores the range and compares; the report's fields are in docs/serving.md.

    Errors: NotFound, VersionBroken and DataError (a version that the stream would refuse too, or
    nothing in the range, no camera for the model), ServiceUnavailable.
    """
    held = _version(settings, options)
    began_s, run_id = time.time(), f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    consumer, decoder = make_consumer(settings), Decoder(settings.stream.decode_threads)
    expired: Counter[TopicPartition] = Counter()
    try:
        with kafka_errors(settings.kafka):
            ranges, cut = _ranges(consumer, settings, options)
            run = _Run(settings, options, held, decoder, run_id, ranges)
            for done, (place, records, next_offset) in enumerate(
                _batches(consumer, ranges, settings, expired)
            ):
                run.score(place, records, next_offset)
                if done % 10 == 0:
                    progress("replay", run.fraction(), {"frames": run.comparison.total.frames})
    finally:
        consumer.close()
        decoder.close()
    if run.left_out and not run.comparison.total.frames:
        raise DataError(
            f"model {options.model} is to score none of the cameras in that range "
            f"({len(run.left_out)} are other models'): name with --camera those to compare on"
        )
    seconds = time.time() - began_s
    return {
        "id": run_id,
        "results_below": run.prefix,
        "results_expire_at": (datetime.now(UTC) + timedelta(days=options.keep_days)).isoformat(),
        "model": options.model,
        "version": options.version,
        "device": options.device,
        "offsets": {str(place.partition): list(span) for place, span in ranges.items()},
        "begun": {
            str(place.partition): {
                "offset": first,
                "at": run.begun_at(place),
                "expired_before": place in cut,
            }
            for place, (first, _) in ranges.items()
        },
        "expired": {str(place.partition): number for place, number in expired.items()},
        "left_out": run.left_out,
        "bad": dict(+run.bad),
        "seconds": round(seconds, 2),
        "frames_per_second": round(run.comparison.total.frames / seconds, 1),
        **run.comparison.report(),
    }


def _version(settings: Settings, options: ReplayOptions) -> InUse:
    store, name, version = ModelStore(settings), options.model, options.version
    try:
        return verified(store, name, version, device=options.device, trial_batch=1)
    except (ArtifactError, KeyError, RuntimeError) as why:
        raise DataError(f"version {name}/{version} cannot be used: {why}") from why


Ranges = dict[TopicPartition, tuple[int, int]]


def _ranges(
    consumer: KafkaConsumer, settings: Settings, options: ReplayOptions
) -> tuple[Ranges, set[TopicPartition]]:
    """Partition -> (first, end) offsets that are there and asked for; those partitions where more
    was asked for than Kafka has kept: it begins later, and has held frames before."""
    places = partitions_of(consumer, settings.kafka.topic)
    bounds = bounds_of(consumer, places)
    if leaderless := {place.partition for place in places} - bounds.keys():
        raise no_leader(settings.kafka.topic, leaderless)
    begins = {place: bounds[place.partition][0] for place in places}
    ends = {place: bounds[place.partition][1] for place in places}
    firsts = _offsets(consumer, options.start, places, ends)
    lasts = _offsets(consumer, options.end, places, ends) if options.end else ends
    ranges = {
        place: (max(begins[place], firsts[place]), min(ends[place], lasts[place]))
        for place in places
    }
    ranges = {place: span for place, span in ranges.items() if span[0] < span[1]}
    if not ranges:
        raise DataError(
            f"{settings.kafka.topic} holds no frames in that range: it has offsets "
            + ", ".join(f"{begins[p]} to {ends[p]} in partition {p.partition}" for p in places)
        )
    by_time = options.start.time_ms is not None
    cut = {
        place
        for place, (first, _) in ranges.items()
        # By time Kafka itself says its first offset, where what was asked for is older.
        if 0 < begins[place] == first and (by_time or firsts[place] < first)
    }
    return ranges, cut


def _offsets(
    consumer: KafkaConsumer,
    place: Place,
    partitions: list[TopicPartition],
    ends: Mapping[TopicPartition, int],
) -> dict[TopicPartition, int]:
    if place.time_ms is None:
        return dict.fromkeys(partitions, place.offset or 0)
    found = consumer.offsets_for_times(dict.fromkeys(partitions, place.time_ms))
    # None: no record is as late.
    return {p: found[p].offset if found.get(p) else ends[p] for p in partitions}


def _batches(
    consumer: KafkaConsumer,
    ranges: Ranges,
    settings: Settings,
    expired: Counter[TopicPartition],
) -> Iterator[tuple[TopicPartition, list[KafkaRecord], int]]:
    """(partition, records, the offset after them), in order within each partition, to the end.

    expired: takes how many frames of a partition retention removed before they were read.
    """
    left = dict(ranges)
    consumer.assign(list(left))
    for place, (first, _) in left.items():
        consumer.seek(place, first)
    heard_s = time.monotonic()
    while left:
        try:
            got = consumer.poll(timeout_ms=500, max_records=settings.stream.max_batch)
        except OffsetOutOfRangeError:
            if not (gone := _overtaken(consumer, left)):
                raise  # beyond Kafka's end: it has lost its last frames, or the topic is another
            expired.update(gone)
            got = {}
        if got:
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > QUIET_S:
            raise ServiceUnavailable(
                f"Kafka gave no frame for {QUIET_S:.0f} s: check `dpdl status`"
            )
        for place, records in got.items():
            if place in left:
                wanted = [record for record in records if record.offset < left[place][1]]
                if wanted:
                    yield place, wanted, wanted[-1].offset + 1
        # Offsets have gaps: the position says where a partition stands, not its last record.
        for place in [each for each in left if consumer.position(each) >= left[each][1]]:
            consumer.pause(place)
            del left[place]


def _overtaken(consumer: KafkaConsumer, left: Ranges) -> dict[TopicPartition, int]:
    """Goes on where Kafka begins by now; how many frames of each partition's range are skipped."""
    gone, bounds = {}, bounds_of(consumer, left)
    for place, (_, end) in left.items():
        begin, at = bounds.get(place.partition, (0, 0))[0], consumer.position(place)
        if at < begin:
            consumer.seek(place, begin)
            gone[place] = min(begin, end) - at
    return gone


class _Run:
    """What one replay holds while it goes over the past."""

    def __init__(
        self,
        settings: Settings,
        options: ReplayOptions,
        held: InUse,
        decoder: Decoder,
        run_id: str,
        ranges: Ranges,
    ) -> None:
        self._options, self._held, self._decoder = options, held, decoder
        self._topic, self._ranges = settings.kafka.topic, ranges
        self._live = ResultStore(settings)
        self.prefix = f"{settings.redis.prefix}:replay:{run_id}"
        redis = settings.redis.model_copy(update={"prefix": self.prefix})
        # Whenever it is killed, nothing of it stays for ever.
        self._own = ResultStore(
            settings.model_copy(update={"redis": redis}), keep_s=int(options.keep_days * 86400)
        )
        self._at = {place: first for place, (first, _) in ranges.items()}
        self._begun_ms: dict[TopicPartition, int] = {}
        self._alerts_then = self._alerts_of_then()
        self._last_alert = "0"
        self._chosen: dict[bytes | None, bool] = {}
        self.left_out: dict[str, str] = {}
        """Camera -> the model that is to score it, another than this."""
        self._ruled: set[str] = set()
        self._overrides: dict[str, float] = {}
        self._then: dict[str, Iterator[FrameResult]] = {}
        self._ahead: dict[str, FrameResult | None] = {}
        self.bad: Counter[str] = Counter()
        self.comparison = Comparison()

    def fraction(self) -> float:
        todo = sum(end - first for first, end in self._ranges.values())
        done = sum(self._at[place] - first for place, (first, _) in self._ranges.items())
        return done / todo

    def begun_at(self, place: TopicPartition) -> str | None:
        """The time of a partition's first record, by Kafka; ISO, UTC. None: it had none to give."""
        at_ms = self._begun_ms.get(place)
        return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat()

    def score(self, place: TopicPartition, records: list[KafkaRecord], next_offset: int) -> None:
        self._begun_ms.setdefault(place, records[0].timestamp)
        records = [record for record in records if self._is_chosen(record.key)]
        decoded = self._decoder(Polled(records, []), Plan(self._held.image_size))
        dead = Counter(bad.reason for bad in decoded.bad)
        self.bad.update(dead)
        self._look_up({frame.camera for batch in decoded.batches for frame in batch.frames})
        results = [each for batch in decoded.batches for each in self._results(batch)]
        first, self._at[place] = self._at[place], next_offset
        topic, number = place.topic, place.partition
        self._own.publish(GROUP, topic, number, first, next_offset, results, dead)
        alerts_now = self._alerts_of_now()
        for result in results:
            self.comparison.add(
                self._of_then(result),
                result,
                alert_then=result.frame_id in self._alerts_then,
                alert_now=result.frame_id in alerts_now,
            )

    def _results(self, batch: Batch) -> list[FrameResult]:
        cameras = [frame.camera for frame in batch.frames]
        name, device = self._options.model, self._options.device
        with torch.inference_mode():
            scored = score_batch(self._held, name, batch.images, cameras, self._overrides, device)
        assert isinstance(scored, Scored), "decoded at this very version's size"
        finite = np.isfinite(scored.score) & np.isfinite(scored.energy)
        self.bad["score-not-finite"] += int((~finite).sum())
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
                is_anomaly=bool(scored.score[row] > scored.threshold[row]),
                model=name,
                version=self._held.version,
                evidence_key="",
            )
            for row, frame in enumerate(batch.frames)
            if finite[row]
        ]

    def _is_chosen(self, key: bytes | None) -> bool:
        """Whether frames with this key are scored; what is no camera's id the decoder counts."""
        if key not in self._chosen:
            camera = (key or b"").decode("utf-8", "replace")
            if self._options.cameras:
                self._chosen[key] = camera in self._options.cameras
            else:
                state, ours = self._live.camera(camera), self._options.model
                bound = state.binding.model if state and state.binding else None
                wanted = bound or (state and state.model) or ours
                self._chosen[key] = wanted == ours
                if wanted != ours:
                    self.left_out[camera] = wanted
        return self._chosen[key]

    def _look_up(self, cameras: set[str]) -> None:
        """What persons have set: a debounce rule is kept where publishing looks for it; a threshold
        holds where it was chosen for this model ("": the default one, which scores the camera)."""
        for camera in cameras - self._ruled:
            state = self._live.camera(camera)
            if state and (rule := state.debounce):
                self._own.set_debounce(camera, (rule.k, rule.n), by=rule.by)
            chosen = state.override if state else None
            if state and chosen and (chosen.model or state.model) == self._options.model:
                self._overrides[camera] = chosen.threshold
        self._ruled |= cameras

    def _alerts_of_then(self) -> set[str]:
        """Frames in the range that the stream alerted for."""
        found: set[str] = set()
        last = "0"
        while page := self._live.alerts(last, 10_000):
            last = page[-1].id
            found.update(each.result.frame_id for each in page if self._in_range(each.result))
        return found

    def _in_range(self, result: FrameResult) -> bool:
        topic, number, offset = result.frame_id.rsplit("/", 2)
        first, end = self._ranges.get(TopicPartition(topic, int(number)), (0, 0))
        return first <= int(offset) < end

    def _alerts_of_now(self) -> set[str]:
        page = self._own.alerts(self._last_alert, 10_000)
        if page:
            self._last_alert = page[-1].id
        return {each.result.frame_id for each in page}

    def _of_then(self, now: FrameResult) -> FrameResult | None:
        """The stream's result of the same frame. Both are in offset order, camera by camera."""
        camera = now.camera
        if camera not in self._then:
            self._then[camera] = self._live_results(camera)
            self._ahead[camera] = next(self._then[camera], None)
        ahead = self._ahead[camera]
        while ahead is not None and ahead.offset < now.offset:
            ahead = next(self._then[camera], None)
        self._ahead[camera] = ahead
        return ahead if ahead is not None and ahead.frame_id == now.frame_id else None

    def _live_results(self, camera: str) -> Iterator[FrameResult]:
        last = "0"
        while page := self._live.scores_after(camera, last, PAGE):
            last = page[-1].id
            yield from (each.result for each in page if self._in_range(each.result))
