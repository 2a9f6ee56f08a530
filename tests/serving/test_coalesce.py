"""Calls that wait together are scored together, and each gets back its own rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from serving.batch import Scored, WrongSize
from serving.coalesce import Coalescer


class Device:
    """Scores are the first pixel of an image. `gate` keeps it busy, so that calls queue up."""

    def __init__(self):
        self.gate, self.started, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, images, cameras, model):
        self.calls.append((model, len(images)))
        self.started.set()
        assert self.gate.wait(10)
        if images.shape[1] != 2:
            return WrongSize(2)
        if model == "broken":
            raise RuntimeError("device")
        score = images[:, 0, 0, 0].astype(np.float32)
        maps = {int(row): np.full((1, 1), score[row]) for row in np.flatnonzero(score > 5)}
        return Scored(model, "v", 2, score, -score, score + 1, maps)


def images(*values, size=2):
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def ask(coalescer, *values, model="m", size=2):
    return coalescer.submit(images(*values, size=size), ["c"] * len(values), model)


def busy(max_frames):
    """A device that works on one call already, and what is submitted now waits."""
    device = Device()
    coalescer = Coalescer(device, max_frames=max_frames)
    first = ask(coalescer, 1)
    assert device.started.wait(10)
    return device, coalescer, first


def test_what_waits_goes_in_one_call_and_comes_apart_again():
    device, coalescer, first = busy(max_frames=8)
    answers = [ask(coalescer, 2, 9), ask(coalescer, 7), ask(coalescer, 3, 4, 8)]
    device.gate.set()
    found = [answer.result(10) for answer in answers]
    assert device.calls == [("m", 1), ("m", 6)]
    assert first.result(10).score.tolist() == [1]
    assert [each.score.tolist() for each in found] == [[2, 9], [7], [3, 4, 8]]
    assert [each.energy.tolist() for each in found] == [[-2, -9], [-7], [-3, -4, -8]]
    assert [each.threshold.tolist() for each in found] == [[3, 10], [8], [4, 5, 9]]
    maps = [{row: heat.item() for row, heat in each.maps.items()} for each in found]
    assert maps == [{1: 9}, {0: 7}, {2: 8}]
    coalescer.close()


def test_never_more_frames_than_allowed_nor_two_models_nor_two_sizes():
    device, coalescer, _ = busy(max_frames=3)
    answers = [
        ask(coalescer, 1, 2),
        ask(coalescer, 3, model="other"),
        ask(coalescer, 4, 5),  # does not fit with the first
        ask(coalescer, 6, size=4),
        ask(coalescer, 7),  # does
    ]
    device.gate.set()
    found = [answer.result(10) for answer in answers]
    assert device.calls == [("m", 1), ("m", 3), ("other", 1), ("m", 2), ("m", 1)]
    assert found[3] == WrongSize(2)
    assert found[1].model == "other"
    assert found[4].score.tolist() == [7]
    coalescer.close()


@pytest.mark.parametrize("max_frames", [0, 2])
def test_apart_where_that_is_wanted_and_a_call_above_the_bound_goes_alone(max_frames):
    device, coalescer, _ = busy(max_frames)
    answers = [ask(coalescer, 1, 2, 3), ask(coalescer, 4)]
    device.gate.set()
    assert [answer.result(10).score.tolist() for answer in answers] == [[1, 2, 3], [4]]
    assert device.calls == [("m", 1), ("m", 3), ("m", 1)]
    coalescer.close()


def test_a_failure_reaches_all_of_the_call_and_the_next_call_works():
    device, coalescer, _ = busy(max_frames=8)
    broken = [ask(coalescer, 1, model="broken"), ask(coalescer, 2, model="broken")]
    good = ask(coalescer, 3)
    device.gate.set()
    for answer in broken:
        with pytest.raises(RuntimeError, match="device"):
            answer.result(10)
    assert good.result(10).score.tolist() == [3]
    assert coalescer.is_alive()
    coalescer.close()


def test_a_caller_that_gave_up_is_passed_over():
    device, coalescer, _ = busy(max_frames=8)
    gone, there = ask(coalescer, 1), ask(coalescer, 2)
    assert gone.cancel()
    device.gate.set()
    assert there.result(10).score.tolist() == [2]
    assert device.calls == [("m", 1), ("m", 1)]
    coalescer.close()
