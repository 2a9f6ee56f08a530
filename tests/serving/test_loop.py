"""The guarantee of serving/loop.py: whatever dies between two steps, no frame is lost or doubled.

The oracle is a store written here, fenced as ARCHITECTURE.md says, and a topic held in a list.
A crash is a BaseException raised before or after the n-th call that the loop makes to the outside,
for every n: so it falls between every two steps.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from infra.errors import AuthFailed, Fenced, ServiceUnavailable
from serving.batch import (
    BadRecord,
    Batch,
    Decoded,
    Partition,
    Plan,
    Polled,
    Scored,
    Span,
    WrongSize,
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


def decode(polled, plan):
    """A frame's pixels are its offset, so that scores tell which frame they belong to."""
    by_model = defaultdict(list)
    for record in polled.records:
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


def test_every_frame_is_scored_once_in_order_and_the_bad_ones_are_kept():
    world = World()
    reports = run(Outside(world))
    assert world.finished()
    for number in (0, 1):
        ids = [r.frame_id for r in world.results[f"cam-{number}"]]
        want = [f"{TOPIC}/{number}/{o}" for o in range(7)]
        assert ids == [i for i in want if i not in world.bad]
    assert set(world.dead) == world.bad
    assert sum(len(report.results) for report in reports) == 12
    assert sum(report.bad["empty"] for report in reports) == 2
    assert {r.frame_id for rs in world.results.values() for r in rs if r.is_anomaly} == set(
        world.evidence
    )


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_crash_between_any_two_steps_changes_nothing(moment, depth):
    """Every call of the loop to the outside, in turn, is where the process dies."""
    want = quiet_state()
    died_at = []
    for nth in itertools.count():
        world, calls = World(), itertools.count()

        def trap(name, now, calls=calls, nth=nth):
            if now == moment and next(calls) == nth:
                died_at.append(name)
                raise Crash(name)

        try:
            run(Outside(world, trap), depth=depth)
        except Crash:
            assert not world.finished() or died_at[-1] in ("publish", "commit", "poll")
        else:
            break  # the run has fewer than nth calls
        run(Outside(world), depth=depth)  # its successor
        assert world.state() == want, f"died {moment} {died_at[-1]}, call {nth}"
    assert set(died_at) == {"poll", "submit", "set_aside", "keep_evidence", "publish", "commit"}


def test_a_crash_at_every_step_of_every_successor_too():
    """Ten processes die one after the other, each a little later in its own life."""
    want, world = quiet_state(), World()
    for life in range(10):
        calls = itertools.count()

        def trap(name, now, calls=calls, life=life):
            if now == "after" and next(calls) == life:
                raise Crash(name)

        try:
            run(Outside(world, trap))
        except Crash:
            continue
    run(Outside(world))
    assert world.state() == want


def test_the_store_that_fences_is_what_holds_it():
    """The same crash with a store that does not fence doubles frames: the tests above can fail."""
    world = World(bad=())

    def publish_unfenced(span, results, dead):
        for result in results:
            world.results[result.camera].append(result)
        return 0

    world.publish = publish_unfenced

    def trap(name, now):
        if (name, now) == ("commit", "before"):
            raise Crash

    with pytest.raises(Crash):
        run(Outside(world, trap))
    run(Outside(world))
    ids = [r.frame_id for r in world.results["cam-0"]]
    assert len(ids) > len(set(ids))


def test_a_zombie_is_refused_and_reads_again_from_the_stored_offset():
    """Another consumer publishes partition 0 while our batches of it are in flight."""
    want, world = quiet_state(), World()
    rival = Outside(world)
    hit = []

    def trap(name, now):
        if (name, now) == ("publish", "before") and not hit:
            hit.append(name)
            run(rival)  # finishes everything behind our back

    zombie = Outside(world, trap)
    reports = run(zombie, depth=2)
    assert hit
    assert world.state() == want
    assert sum(report.dropped_spans for report in reports) > 0
    assert zombie.positions == world.stored


def test_a_revoked_partition_is_neither_published_nor_committed():
    world = World(bad=())
    revoked = Partition(TOPIC, 0)

    def trap(name, now):
        if (name, now) == ("submit", "after"):
            outside.leases[revoked] = 99

    outside = Outside(world, trap)
    polls = iter([outside._poll()])
    outside._poll = lambda: next(polls, None) or outside.loop.stop()
    reports = run(outside)
    assert world.stored == {revoked: 0, Partition(TOPIC, 1): 2}
    assert [span.partition.number for span in outside.committed] == [1]
    assert reports[0].dropped_spans == 1


@pytest.mark.parametrize("step", ["poll", "set_aside", "submit", "keep_evidence", "publish"])
def test_a_service_that_is_away_is_waited_for(step, monkeypatch):
    monkeypatch.setattr("serving.loop.FIRST_RETRY_S", 0.001)
    world, failures = World(), itertools.count()

    def trap(name, now):
        if (name, now) == (step, "before") and next(failures) < 3:
            raise ServiceUnavailable(f"{step} is away")

    outside = Outside(world, trap)
    if step == "submit":  # its errors come with the answer
        outside.trap, real = (lambda name, now: None), outside.submit

        def submit(batch):
            try:
                trap("submit", "before")
            except ServiceUnavailable as error:
                future = Future()
                future.set_exception(error)
                return future
            return real(batch)

        outside.submit = submit
    run(outside)
    assert world.state() == quiet_state()
    assert outside.idled >= 3  # it stayed in the consumer group meanwhile


def test_an_answer_lost_after_publishing_is_not_a_second_publishing(monkeypatch):
    """Redis did it and its answer never came: the retry finds it done and goes on from there."""
    monkeypatch.setattr("serving.loop.FIRST_RETRY_S", 0.001)
    world, lost = World(), []

    def trap(name, now):
        if (name, now) == ("publish", "after") and len(lost) < 2:
            lost.append(name)
            raise ServiceUnavailable("no answer in time")

    reports = run(Outside(world, trap))
    assert world.state() == quiet_state()
    assert sum(report.dropped_spans for report in reports) == 0


def test_wrong_credentials_are_not_retried():
    def trap(name, now):
        if name == "publish":
            raise AuthFailed("Redis: no permission")

    with pytest.raises(AuthFailed):
        run(Outside(World(), trap))


def test_stopping_publishes_what_is_in_flight():
    world = World(bad=())
    outside = Outside(world)
    poll = outside._poll

    def poll_and_stop():
        outside.loop.stop()
        return poll()

    outside._poll = poll_and_stop
    run(outside, depth=4)
    assert all(offset == 2 for offset in world.stored.values())


def test_stopping_gives_up_at_the_deadline_and_loses_nothing():
    world = World(bad=())

    def trap(name, now):
        if name == "publish":
            outside.loop.stop()
            raise ServiceUnavailable("Redis is away")

    outside = Outside(world, trap)
    run(outside, drain_s=0.05)
    assert all(offset == 0 for offset in world.stored.values())
    run(Outside(world))
    assert world.finished()


def test_a_version_of_another_size_gets_pixels_decoded_at_that_size():
    """Never resized from decoded pixels: online scores must equal offline ones."""
    world = World(bad=())
    outside = Outside(world)
    real = outside._score

    def score(images, model):
        if images.shape[1] != 4:
            future = Future()
            future.set_result(WrongSize(4))
            return future
        outside.size = 4
        return real(images, model)

    outside._score = score
    run(outside)
    assert world.state() == quiet_state(bad=())
    assert outside.submitted[-1][1][1:] == (4, 4, 3)


@pytest.mark.parametrize("lost", [{3}, {0, 1, 2, 3, 4, 5, 6}])
def test_what_cannot_be_decoded_at_the_other_size_is_put_aside(lost):
    """A frame that was decoded once need not be so again: some of a batch's, or all of them."""
    world = World(bad=())
    outside = Outside(world)

    def score(images, model):
        future = Future()
        future.set_result(WrongSize(4))
        return real(images, model) if images.shape[1] == 4 else future

    def decode_some(polled, plan):
        if plan.of("cam-0")[1] != 4:
            return decode(polled, plan)
        bad = [record for record in polled.records if record.offset in lost]
        good = [record for record in polled.records if record.offset not in lost]
        again = decode(Polled(good, []), plan)
        return Decoded(polled, again.batches, [BadRecord(record, "corrupt") for record in bad])

    real, outside._score = outside._score, score
    outside.loop = loop = Loop(outside, decode_some, outside, outside, report=lambda report: None)
    loop.run()
    assert world.finished()
    assert set(world.dead) == {f"{TOPIC}/{p}/{o}" for p in (0, 1) for o in lost}
    assert world.dead_counts == {"corrupt": 2 * len(lost)}
    assert sum(len(results) for results in world.results.values()) == 2 * (7 - len(lost))


def test_each_call_is_for_one_model_and_its_size():
    """cam-1 is bound to a model that reads another size; order and offsets stay as they were."""
    world = World()
    outside = Outside(world)
    outside.bound = {"cam-1": "other"}
    real = outside._score

    def score(images, model):
        if model == "other" and images.shape[1] != 4:
            future = Future()
            future.set_result(WrongSize(4))
            return future
        return real(images, model)

    outside._score = score
    reports = run(outside)
    assert world.state() == quiet_state()
    assert {(model, *set(cameras)) for model, _, cameras in outside.submitted} == {
        ("", "cam-0"),
        ("other", "cam-1"),
    }
    assert {r.model for r in world.results["cam-0"]} == {"m"}
    assert {r.model for r in world.results["cam-1"]} == {"other"}
    assert reports[0].versions == {"m": "v1", "other": "v1"}


def test_cameras_of_two_models_in_one_partition_keep_their_order():
    world = World(num_partitions=1, per_partition=6, bad=())
    for record in world.topic[Partition(TOPIC, 0)]:
        record.key = b"cam-0" if record.offset % 2 else b"cam-1"
    outside = Outside(world)
    outside.bound = {"cam-1": "other"}
    reports = run(outside)
    assert [r.offset for report in reports for r in report.results] == [0, 1, 2, 3, 4, 5]


def test_a_frame_whose_score_is_not_finite_is_put_aside():
    world = World(bad=())
    outside = Outside(world)
    real = outside._score

    def score(images, model):
        future = real(images, model)
        future.result().score[images[:, 0, 0, 0] == 3] = np.nan
        return future

    outside._score = score
    reports = run(outside)
    assert set(world.dead) == {f"{TOPIC}/0/3", f"{TOPIC}/1/3"}
    assert sum(report.bad["score-not-finite"] for report in reports) == 2
    assert world.finished()


def test_no_more_batches_in_flight_than_depth():
    world = World(num_partitions=1, per_partition=40, bad=())
    pending, most = [], []

    class Slow(Outside):
        def _score(self, images, model):
            answer, late = super()._score(images, model), Future()
            pending.append((late, answer.result()))
            most.append(len(pending))
            return late

        def idle(self, seconds):  # the loop waits: now the oldest answer comes
            late, answer = pending.pop(0)
            late.set_result(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.loop.WAIT_S", 0.001)
        run(Slow(world), depth=3)
    assert world.finished()
    assert max(most) == 3
