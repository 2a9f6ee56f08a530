"""serving/loop.py and models: the size each one reads, one model a call, order all the same."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from loop_world import TOPIC, Outside, World, decode, quiet_state, run

from serving.batch import (
    BadRecord,
    Decoded,
    Partition,
    Polled,
    WrongSize,
)
from serving.loop import Loop


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

    def decode_some(polled, plan, alive):
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
