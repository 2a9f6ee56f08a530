"""A batch is scored in pieces on a CPU: the same answer as whole, row for row."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from serving import score as subject
from serving.batch import WrongSize
from serving.score import score_batch
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


def test_another_size_is_not_scored(held):
    images = np.zeros((2, 3, 3, 3), np.uint8)
    assert score_batch(held, "m", images, ["a", "b"], {}, "cpu") == WrongSize(2)
    assert held.loaded.model.calls == []
