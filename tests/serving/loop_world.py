"""The world outside serving/loop.py: a topic in a list, and a store that is fenced.

The store is the oracle: written here, as ARCHITECTURE.md says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np

from infra.errors import Fenced
from serving.batch import (
    BadRecord,
    Batch,
    Decoded,
    Partition,
    Plan,
    Polled,
    Scored,
    Span,
)
from serving.loop import Loop

TOPIC = "frames"
SIZE = 2


class Crash(BaseException):
    """A process that is gone: nothing in the loop may catch it."""


class World:
    """What outlives a consumer: the topic, the dead letters, the evidence, the fenced store."""

    def __init__(self, num_partitions=2, per_partition=7, bad=((0, 2), (1, 6))):
        self.topic = {
            Partition(TOPIC, p): [
                SimpleNamespace(
                    topic=TOPIC,
                    partition=p,
                    offset=o,
                    key=f"cam-{p}".encode(),
                    value=None if (p, o) in bad else b"pixels",
                )
                for o in range(per_partition)
            ]
            for p in range(num_partitions)
        }
        self.bad = {f"{TOPIC}/{p}/{o}" for p, o in bad}
        self.stored = dict.fromkeys(self.topic, 0)
        self.results = defaultdict(list)  # camera -> results in the order of publishing
        self.dead = []
        self.dead_counts = Counter()
        self.evidence = {}

    def publish(self, span, results, dead):
        if self.stored[span.partition] != span.first:
            raise Fenced(expected=self.stored[span.partition], found=span.first)
        self.stored[span.partition] = span.next
        self.dead_counts.update(dead)
        for result in results:
            self.results[result.camera].append(result)
        return sum(result.is_anomaly for result in results)

    def state(self):
        """What a user sees in the end."""
        return {
            "stored": self.stored,
            "results": {
                camera: [(r.frame_id, r.score, r.is_anomaly, r.evidence_key) for r in results]
                for camera, results in self.results.items()
            },
            "dead": set(self.dead),
            "dead_counts": self.dead_counts,
            "evidence": self.evidence,
        }

    def finished(self):
        return all(self.stored[p] == len(log) for p, log in self.topic.items())


class Outside:
    """Source, scorer and sink of one consumer process; `trap(name, moment)` may raise."""

    def __init__(self, world, trap=lambda name, moment: None, size=SIZE):
        self.world, self.trap, self.size = world, trap, size
        self.positions = dict(world.stored)
        self.leases = dict.fromkeys(world.topic, 1)
        self.loop = None
        self.bound = {}
        self.submitted = []
        self.committed = []
        self.idled = 0

    def call(self, name, action):
        self.trap(name, "before")
        value = action()
        self.trap(name, "after")
        return value

    # Source
    def poll(self, until):
        return self.call("poll", self._poll)

    def _poll(self):
        records, spans = [], []
        for partition, log in self.world.topic.items():
            first = self.positions[partition]
            got = log[first : first + 2]
            if got:
                self.positions[partition] = first + len(got)
                spans.append(Span(partition, first, first + len(got), self.leases[partition]))
                records += got
        if not records:
            self.loop.stop()
            return None
        return Polled(records, spans)

    def holds(self, span):
        return self.leases[span.partition] == span.lease

    def rewind(self, partition):
        self.leases[partition] += 1
        self.positions[partition] = self.world.stored[partition]

    def commit(self, spans):
        self.call("commit", lambda: self.committed.extend(spans))

    def idle(self, seconds):
        self.idled += 1

    # Score
    def plan(self):
        return Plan(self.size, self.bound)

    def submit(self, batch):
        cameras = [frame.camera for frame in batch.frames]
        self.submitted.append((batch.model, batch.images.shape, cameras))
        return self.call("submit", lambda: self._score(batch.images, batch.model))

    def _score(self, images, model):
        future = Future()
        n = len(images)
        score = np.arange(n, dtype=np.float32) * 0 + images[:, 0, 0, 0]
        future.set_result(
            Scored(
                model=model or "m",
                version="v1",
                image_size=self.size,
                score=score,
                energy=score,
                threshold=np.full(n, 2.5, np.float32),
                maps={i: np.ones((1, 1), np.float32) for i in range(n) if score[i] > 2.5},
            )
        )
        return future

    # Sink
    def set_aside(self, bad):
        self.call("set_aside", lambda: self.world.dead.extend(frame_id(b.record) for b in bad))

    def keep_evidence(self, frames, maps):
        def keep():
            self.world.evidence.update({f.frame_id: f.image for f in frames})
            return [f.frame_id for f in frames]

        return self.call("keep_evidence", keep)

    def publish(self, span, results, dead):
        return self.call("publish", lambda: self.world.publish(span, results, dead))


def frame_id(record):
    return f"{record.topic}/{record.partition}/{record.offset}"


def decode(polled, plan, alive=lambda: None):
    """A frame's pixels are its offset, so that scores tell which frame they belong to."""
    by_model = defaultdict(list)
    for record in polled.records:
        alive()
        if record.value is not None:
            by_model[plan.of(record.key.decode())].append(record)
    bad = [BadRecord(r, "empty") for r in polled.records if r.value is None]
    batches = [batch(model, size, good) for (model, size), good in by_model.items()]
    return Decoded(polled, batches, bad)


def batch(model, size, good):
    frames = [
        SimpleNamespace(
            frame_id=frame_id(r),
            camera=r.key.decode(),
            captured_at_ns=r.offset,
            image=r.value,
        )
        for r in good
    ]
    images = np.zeros((len(good), size, size, 3), np.uint8)
    for row, record in enumerate(good):
        images[row] = record.offset
    return Batch(model, good, frames, images)


def run(outside, **options):
    reports = []
    loop = Loop(outside, decode, outside, outside, report=reports.append, **options)
    outside.loop = loop
    loop.run()
    return reports


def quiet_state(**world):
    calm = World(**world)
    run(Outside(calm))
    return calm.state()
