"""A batch is scored in pieces on a CPU: the same answer as whole, row for row."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infra.cameras import SILENT_S, ThresholdOverride
from infra.errors import ServiceUnavailable
from serving import score as subject
from serving.batch import WrongSize
from serving.score import DeviceHealth, Overrides, Scorer, score_batch
from serving.versions import InUse


class Model:
    """Scores are the first pixel, energies twice that, maps hold the score."""

    config = SimpleNamespace(image_size=2)

    def __init__(self):
        self.calls = []

    def score(self, images):
        self.calls.append(len(images))
        score = images[:, 0, 0, 0].float()
        maps = score[:, None, None].expand(-1, 1, 1)
        winners = torch.zeros(len(images), 1, dtype=torch.long)
        return SimpleNamespace(score=score, energy=2 * score, maps=maps, winners=winners)


class Drift:
    def __init__(self):
        self.rows = []

    def add(self, cameras, energy, winners):
        assert len(cameras) == len(energy) == len(winners)
        self.rows += zip(cameras, energy.tolist(), strict=True)


@pytest.fixture
def held():
    loaded = SimpleNamespace(model=Model(), thresholds={"default": 9.5, "cameras": {"c1": 4.5}})
    return InUse("v1", loaded, 0.0, Drift())


@pytest.mark.parametrize("num", [1, 3, 4, 11])
def test_pieces_make_the_same_answer(held, num, monkeypatch):
    monkeypatch.setattr(subject, "CPU_FRAMES", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    images = np.stack([np.full((2, 2, 3), value, np.uint8) for value in range(num)])
    cameras = [f"c{row % 3}" for row in range(num)]
    found = score_batch(held, "m", images, cameras, {"c2": 0.5}, "cpu")
    assert held.loaded.model.calls == [min(3, num - at) for at in range(0, num, 3)]
    assert found.score.tolist() == list(range(num))
    assert found.energy.tolist() == [2 * value for value in range(num)]
    limits = {"c0": 9.5, "c1": 4.5, "c2": 0.5}
    assert found.threshold.tolist() == [limits[camera] for camera in cameras]
    hot = [row for row in range(num) if row > limits[cameras[row]]]
    assert {row: heat.item() for row, heat in found.maps.items()} == {r: float(r) for r in hot}
    assert held.drift.rows == [(camera, 2.0 * row) for row, camera in enumerate(cameras)]
    assert (found.model, found.version) == ("m", "v1")


def test_a_persons_threshold_holds_for_the_model_it_was_chosen_for_alone():
    """Whatever stands in for that one, or is bound in its place."""
    known = {
        "a": ThresholdOverride(1.0, "ann", 0, "", ""),
        "b": ThresholdOverride(2.0, "ann", 0, "welds", "w1"),
        "c": ThresholdOverride(3.0, "ann", 0, "plates", "p1"),
    }
    overrides = Overrides(SimpleNamespace(thresholds=lambda cameras: known), "plates")
    assert overrides.of(["a", "b", "c", "d"], "plates") == {"a": 1.0, "c": 3.0}
    assert overrides.of(["a", "b", "c", "d"], "welds") == {"b": 2.0}
    overrides.refresh()
    assert overrides.of(["b"], "welds") == {"b": 2.0}


def test_another_size_is_not_scored(held):
    images = np.zeros((2, 3, 3, 3), np.uint8)
    assert score_batch(held, "m", images, ["a", "b"], {}, "cpu") == WrongSize(2)
    assert held.loaded.model.calls == []


@pytest.fixture
def scorer(held):
    """Without Ray and stores; `failing` is raised by the device where it is set."""
    made = Scorer.__new__(Scorer)
    made.failing = None

    def score(images):
        if made.failing:
            raise made.failing
        return real(images)

    real, held.loaded.model.score = held.loaded.model.score, score
    alive = SimpleNamespace(is_alive=lambda: True, close=lambda: None)
    made._models = SimpleNamespace(of=lambda model: ("m", held))
    made._overrides = SimpleNamespace(of=lambda cameras, model: {})
    made._calls, made._watches, made._closing = alive, [alive], threading.Event()
    made._device, made._device_health = "cpu", DeviceHealth()
    return made


def call(scorer):
    try:
        scorer._score(np.zeros((1, 2, 2, 3), np.uint8), ["a"], "")
    except Exception as error:
        return error


def test_a_scorer_whose_device_only_fails_is_replaced(scorer, monkeypatch):
    now_s = [time.monotonic()]
    monkeypatch.setattr(subject.time, "monotonic", lambda: now_s[0])
    scorer.failing = torch.AcceleratorError("CUDA error: unspecified launch failure")
    for _ in range(10):
        assert call(scorer) is scorer.failing
    scorer.check_health()  # it may be for a moment
    now_s[0] += 31
    with pytest.raises(RuntimeError, match=r"10 times.*launch failure"):
        scorer.check_health()
    scorer.failing = None
    call(scorer)
    scorer.check_health()
    scorer.failing = torch.OutOfMemoryError("CUDA out of memory")
    now_s[0] += 3600  # a quiet hour, and then a moment's trouble
    for _ in range(10):
        call(scorer)
    scorer.check_health()


def test_what_is_not_the_devices_fault_replaces_no_scorer(scorer, monkeypatch):
    now_s = [time.monotonic()]
    monkeypatch.setattr(subject.time, "monotonic", lambda: now_s[0])

    def away(cameras, model):
        raise ServiceUnavailable("Redis is away")

    scorer.failing = ValueError("an input that does not fit")
    for _ in range(10):
        call(scorer)
    scorer._overrides.of = away
    for _ in range(10):
        assert isinstance(call(scorer), ServiceUnavailable)
    now_s[0] += 31
    scorer.check_health()


def test_what_a_scorer_shows_of_its_models(scorer, held):
    """Drift by the model that scores, of cameras that are not silent; and who is replaced."""
    shown = []

    class Shown:
        def __getattr__(self, name):
            return lambda *said: shown.append((name, *said))

    held.drift.psi = lambda within_s: {"a": within_s}
    scorer._replica, scorer._metrics = Shown(), Shown()
    versions = SimpleNamespace(name="m", in_use=held, refused_now=None)
    scorer._models = SimpleNamespace(in_use=lambda: [versions], trouble={"welds": "why"})
    scorer._measure()
    assert shown == [
        ("alive",),
        ("versions", "m", "v1", None),
        ("drift", "m", {"a": SILENT_S}),
        ("replaced", ["welds"]),
    ]


def test_thresholds_are_followed_while_the_store_of_models_hangs(scorer, monkeypatch):
    """Each look in a thread of its own: a person's threshold waits for no S3."""
    looked = {"hangs": threading.Event(), "fails": threading.Event(), "works": threading.Event()}
    go_on = threading.Event()

    def look(name):
        looked[name].set()
        if name == "hangs":
            go_on.wait(10)
        elif name == "fails":
            raise ServiceUnavailable("S3 is away")

    threads = scorer._follow_all([(name, lambda name=name: look(name), 0.01) for name in looked])
    for _ in range(3):
        assert looked["works"].wait(5)
        looked["works"].clear()
    assert all(each.is_alive() for each in threads)
    scorer._closing.set()
    go_on.set()


def test_a_scorer_that_never_comes_back_from_its_device_is_replaced(scorer, held, monkeypatch):
    now_s, checked = [time.monotonic()], []
    monkeypatch.setattr(subject.time, "monotonic", lambda: now_s[0])
    real = held.loaded.model.score

    def slow(images):
        now_s[0] += subject.STUCK_S
        scorer.check_health()  # it may be slow
        now_s[0] += 1
        with pytest.raises(RuntimeError, match="at one batch for 301 s"):
            scorer.check_health()
        checked.append(len(images))
        return real(images)

    held.loaded.model.score = slow
    assert call(scorer) is None
    assert checked == [1]
    now_s[0] += 3600
    scorer.check_health()  # idle is not stuck
