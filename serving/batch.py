"""What passes between the steps of the loop, and what it asks of its neighbours.

Knows no Kafka, Redis, S3 or Ray. Letters: B frames of a batch, S side of the model's square,
h w map sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from infra.messages import FrameRecord, FrameResult, KafkaRecord


class Partition(NamedTuple):
    topic: str
    number: int


@dataclass(frozen=True, slots=True)
class Span:
    """One partition's part of a batch: all offsets from `first` up to, without, `next`.

    `first` is where the span before it ended, not its first record, and `next` not behind its last
    one: offsets have gaps, and a transaction ends with one that is no record.
    """

    partition: Partition
    first: int
    next: int
    lease: int
    """Which assignment it was read under; a newer lease makes it void."""


@dataclass(frozen=True, slots=True)
class Polled:
    records: list[KafkaRecord]
    """In order within each partition. None where there are only offsets to pass."""
    spans: list[Span]
    waited_s: float = 0.0
    """From the first record to the full batch."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be scored; it is kept as it came, byte for byte."""

    record: KafkaRecord
    reason: str
    """Short slug: "truncated", "no-key", ..."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which model scores which camera, and the size of image that each reads."""

    default_size: int
    bound: Mapping[str, str] = field(default_factory=dict)
    """Camera -> model, where a person bound it to one."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Model -> size, as far as is known; a wrong guess is answered by WrongSize."""

    def of(self, camera: str) -> tuple[str, int]:
        model = self.bound.get(camera, DEFAULT_MODEL)
        return model, self.sizes.get(model, self.default_size)


DEFAULT_MODEL = ""
"""Stands for the model that the application was deployed with."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of the scorer carries: frames for one model, of one size."""

    model: str
    records: list[KafkaRecord]
    """What frames were read from: frames[i] from records[i]."""
    frames: list[FrameRecord]
    images: NDArray[np.uint8]
    """(B,S,S,3) RGB, row i is frames[i]."""


@dataclass(frozen=True, slots=True)
class Decoded:
    polled: Polled
    batches: list[Batch]
    """One for each model that any of the frames wants."""
    bad: list[BadRecord]


@dataclass(frozen=True, slots=True)
class Scored:
    """One batch's answer; every row by the same version. Arrays (B,) float32."""

    model: str
    """Its name; the default one's where the model that was asked for cannot be used."""
    version: str
    image_size: int
    score: NDArray[np.float32]
    energy: NDArray[np.float32]
    threshold: NDArray[np.float32]
    maps: dict[int, NDArray[np.float32]]
    """Row -> (h,w) low-resolution heat map, only where score > threshold."""


@dataclass(frozen=True, slots=True)
class WrongSize:
    """The version in use reads another size: decode the original bytes again at this one."""

    image_size: int


@dataclass(slots=True)
class BatchReport:
    """What the one log line per batch says."""

    offsets: dict[str, list[int]]
    polled_at_ns: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    """Model -> the version of it that scored."""
    alerts: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Dead letters by reason."""
    dropped_spans: int = 0
    stage_ms: dict[str, float] = field(default_factory=dict)
    results: list[FrameResult] = field(default_factory=list)
    """Only what was published."""


class Source(Protocol):
    """The frames. Every call comes from the loop's own thread."""

    def poll(self, until: Callable[[], bool]) -> Polled | None:
        """The next batch; None when `until` turned true or nothing came for a while."""

    def holds(self, span: Span) -> bool:
        """Whether the partition is still ours under the lease that read this span."""

    def rewind(self, partition: Partition) -> None:
        """Voids what was read and not published; reading goes on at the stored offset."""

    def commit(self, spans: Sequence[Span]) -> None:
        """Tells Kafka, for lag metrics only. Never fails."""

    def idle(self, seconds: float) -> None:
        """Waits without reading, staying in the consumer group."""


class Score(Protocol):
    def plan(self) -> Plan:
        """Which model is wanted for which camera, by what is known now."""

    def submit(self, batch: Batch) -> Future[Scored | WrongSize]:
        """One call for the whole batch; answers come in any order."""


class Sink(Protocol):
    def set_aside(self, bad: Sequence[BadRecord]) -> None:
        """Returns when all are durably in the dead-letter topic."""

    def keep_evidence(
        self, frames: Sequence[FrameRecord], maps: Sequence[NDArray[np.float32]]
    ) -> list[str]:
        """The key of each frame's evidence, kept now or durably noted to be kept later."""

    def publish(self, span: Span, results: Sequence[FrameResult], dead: Mapping[str, int]) -> int:
        """Results, alerts, dead-letter counts and next offset in one step; the alerts raised.

        Fenced: the span is not the next one, and nothing was written. After any other error the
        step may or may not have happened.
        """


Decode = Callable[[Polled, Plan, Callable[[], None]], Decoded]
"""(what was polled, plan, called after each record): a batch of hostile images takes minutes."""
Report = Callable[[BatchReport], None]
