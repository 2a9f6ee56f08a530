"""Hostile records among good ones, through the deployed application, and what became of each."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from frames import jpeg
from hostile import SCORED, hostile
from world import CONSUMER, World

from infra.kafka_client import make_producer
from infra.messages import frame_id
from infra.redis_client import MAX_PAGE

GOOD_CAMERAS = [b"good-0", b"good-1", b"good-2", b"good-3"]
LARGE_BYTES = 2**20


@dataclass(slots=True)
class BadInput:
    hostile: Counter[str] = field(default_factory=Counter)
    """Hostile records by kind."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of those, by reason; "" were scored."""
    good: int = 0
    wrong: list[str] = field(default_factory=list)
    """Hostile records that ended otherwise than they may, nowhere or twice."""
    good_wrong: int = 0
    """Good frames without exactly one result."""
    miscounted: bool = False
    """Redis counts other dead letters than there are."""
    idle_mb: int = 0
    """The largest consumer's resident memory before."""
    peak_mb: int = 0


class Memory:
    """Samples the consumers' resident memory as long as the block."""

    def __init__(self, world: World) -> None:
        self._processes = world.processes(CONSUMER)
        self.idle_mb = self.peak_mb = self._largest_mb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _largest_mb(self) -> int:
        return max(process.memory_info().rss for process in self._processes) // 2**20

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            with suppress(psutil.NoSuchProcess):  # a replaced consumer fails the account instead
                self.peak_mb = max(self.peak_mb, self._largest_mb())


def bad_input(world: World, num_hostile: int) -> BadInput:
    """Sends that many hostile records, a good frame after each, and gives the account."""
    found, dead_before = BadInput(), world.results.dead_letters()
    pids = {process.pid for process in world.processes(CONSUMER)}
    with Memory(world) as memory:
        sent = _send(world, num_hostile, found)
        world.wait_scored(60 + num_hostile / 20)
    found.idle_mb, found.peak_mb = memory.idle_mb, memory.peak_mb
    if pids != {process.pid for process in world.processes(CONSUMER)}:
        found.wrong.append("a consumer was replaced")
    dead: dict[str, str] = {}
    for record in world.read(world.settings.kafka.dead_topic):
        headers = dict(record.headers)
        dead[headers["dead-frame"].decode()] = headers["dead-reason"].decode()
    scored = _scored(world, [b"hostile", *GOOD_CAMERAS])
    for frame, (kind, allowed) in sent.items():
        times, reason = scored[frame], dead.get(frame)
        if kind == "good":
            found.good += 1
            found.good_wrong += (times, reason) != (1, None)
            continue
        outcome = SCORED if (times, reason) == (1, None) else reason if times == 0 else None
        found.hostile[kind] += 1
        found.outcomes[str(outcome)] += 1
        if outcome not in allowed:
            found.wrong.append(f"{kind}: {outcome}, wanted one of {sorted(allowed)}")
    counted = Counter(world.results.dead_letters())
    counted.subtract(dead_before)
    wanted = Counter(reason for frame, reason in dead.items() if frame in sent)
    found.miscounted = +counted != wanted
    return found


def _send(world: World, num_hostile: int, found: BadInput) -> dict[str, tuple[str, frozenset[str]]]:
    """Frame id -> kind and what may become of it."""
    topic, rng = world.settings.kafka.topic, np.random.default_rng(9)
    frames = [jpeg(rng) for _ in range(16)]
    producer = make_producer(world.settings)
    waiting: list[tuple[Any, str, frozenset[str]]] = []
    for i, bad in enumerate(hostile(num_hostile)):
        future = producer.send(topic, value=bad.value, key=bad.key, headers=bad.headers)
        waiting.append((future, bad.kind, bad.allowed))
        if len(bad.value or b"") > LARGE_BYTES:
            future.get(timeout=60)
        good = producer.send(topic, value=frames[i % 16], key=GOOD_CAMERAS[i % len(GOOD_CAMERAS)])
        waiting.append((good, "good", frozenset()))
    sent = {}
    for future, kind, allowed in waiting:
        where = future.get(timeout=60)
        sent[frame_id(where.topic, where.partition, where.offset)] = (kind, allowed)
    producer.close()
    return sent


def _scored(world: World, cameras: Iterable[bytes]) -> Counter[str]:
    """Frame id -> number of results."""
    counts: Counter[str] = Counter()
    for camera in cameras:
        before: str | None = None
        while page := world.results.scores(camera.decode(), MAX_PAGE, before):
            counts.update(each.result.frame_id for each in page)
            before = page[-1].id
    return counts
