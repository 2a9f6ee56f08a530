"""The guarantee of serving/loop.py: whatever dies between two steps, no frame is lost or doubled.

A crash is a BaseException raised before or after the n-th call that the loop makes to the outside,
for every n: so it falls between every two steps.
"""

from __future__ import annotations

import itertools

import pytest
from loop_world import TOPIC, Crash, Outside, World, quiet_state, run

from serving.batch import (
    Partition,
)


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
