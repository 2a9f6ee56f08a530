"""serving/loop.py and services that are away, its own end, and how much is in flight."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import pytest
from loop_world import Outside, World, decode, quiet_state, run

from infra.errors import AuthFailed, ServiceUnavailable
from serving import loop as loop_module
from serving.loop import Loop


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


def test_a_batch_that_is_long_to_decode_shows_life_and_stays_in_the_group(monkeypatch):
    """Else it is taken for a stuck loop, and read again by the next one: for ever."""
    monkeypatch.setattr("serving.loop.WAIT_S", 0.0)
    outside, shown = Outside(World()), []

    def slowly(polled, plan, alive):
        def frame_done():
            loop.last_poll_s = 0.0
            alive()
            shown.append(loop.last_poll_s)

        idled = outside.idled
        decoded = decode(polled, plan, frame_done)
        assert outside.idled == idled + len(polled.records)
        return decoded

    loop = Loop(outside, slowly, outside, outside, report=lambda report: None)
    outside.loop = loop
    loop.run()
    assert len(shown) == 14
    assert all(shown)


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


def test_stopping_does_not_wait_for_a_score_that_never_comes(monkeypatch):
    monkeypatch.setattr(loop_module, "WAIT_S", 0.01)
    world = World(bad=())
    outside = Outside(world)

    def never(batch):
        outside.loop.stop()
        return Future()

    outside.submit = never
    run(outside, drain_s=0.05)
    assert all(offset == 0 for offset in world.stored.values())
    run(Outside(world))
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
