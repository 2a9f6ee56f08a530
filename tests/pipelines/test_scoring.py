"""Thresholds over held-out scores: the stated rate is kept, and too few normals are said to be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpdl_core.images import ArraySource
from pipelines.scoring import alarms, calibrate, observe_each


def test_fresh_normals_alarm_at_most_at_the_stated_rate():
    """Oracle: simulation. Mean over draws of the alarm rate of a large fresh sample."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        thresholds, notes = calibrate(rng.normal(size=99), [""] * 99, 0.05)
        assert notes == []
        rates.append((rng.normal(size=2000) > thresholds["default"]).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)  # four standard errors


def test_a_camera_gets_its_own_threshold_where_it_has_enough_normals():
    scores = np.concatenate([np.arange(40.0), np.arange(5.0) + 100])
    cameras = ["cam-1"] * 40 + ["cam-2"] * 5
    thresholds, _ = calibrate(scores, cameras, 0.1)
    assert set(thresholds["cameras"]) == {"cam-1"}
    assert thresholds["cameras"]["cam-1"] < 40 < thresholds["default"]
    assert thresholds["calibration_normals"] == 45


def test_a_camera_unlike_the_others_is_not_left_to_the_threshold_of_all():
    """Twelve normals do not carry a rate of .01; their highest bounds false alarms at 1 in 13."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        scores = np.concatenate([rng.normal(size=300), rng.normal(4.0, size=12)])
        thresholds, notes = calibrate(scores, ["cam-1"] * 300 + ["cam-2"] * 12, 0.01)
        fresh = rng.normal(4.0, size=500)
        rates.append(alarms(fresh, ["cam-2"] * 500, thresholds).mean())
    assert np.mean(rates) < 1 / 13 + 0.02
    assert (fresh > thresholds["default"]).mean() > 0.2  # what all share would have been worse
    assert "fewer have cam-2 (12)" in notes[0]


def test_what_a_camera_saw_within_a_moment_counts_once():
    """99 frames of one minute are about one normal; of 99 minutes they are what .01 needs."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=300), rng.normal(4, 0.1, 99)])
    cameras = [""] * 300 + ["cam-2"] * 99
    other = [f"{i}" for i in range(300)]
    one, few, many = (
        calibrate(scores, cameras, 0.01, other + [f"m{m}" for m in of_camera])
        for of_camera in ([0] * 99, np.arange(99) % 9, range(99))
    )
    assert one[0]["cameras"] == {}
    assert "fewer have cam-2 (1)" in one[1][0]
    assert few[0]["cameras"] == {"cam-2": scores[300:].max()}
    assert many == calibrate(scores, cameras, 0.01)
    assert many[1] == []


def bursts(rng, minutes):
    """Scores and minutes of one camera: 1 to 40 near-duplicates of each of so many pictures, and
    the more the higher it scores."""
    pictures = rng.normal(size=minutes)
    frames = np.where(pictures > 1, rng.integers(10, 41, minutes), 1)
    scores = np.repeat(pictures, frames) + rng.normal(0, 0.01, frames.sum())
    return scores, [f"m{i}" for i in np.repeat(np.arange(minutes), frames)]


@pytest.mark.parametrize("camera", ["cam-2", ""])
def test_bursts_of_one_picture_do_not_set_a_threshold_by_their_number(camera):
    """Oracle: simulation. A frame of a fresh minute alarms at the stated rate."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(300):
        scores, moments = bursts(rng, 199)
        thresholds, _ = calibrate(scores, [camera] * len(scores), 0.05, moments)
        limit = thresholds["cameras"].get(camera, thresholds["default"])
        rates.append((rng.normal(size=2000) > limit).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)


def test_a_burst_supports_no_rate_and_makes_no_camera_unlike_the_others():
    scores = np.r_[np.linspace(0, 1, 150), np.full(300, 9.0)]
    moments = [f"{i}" for i in range(150)] + ["burst"] * 300
    alone, notes = calibrate(scores[150:], [""] * 300, 0.01, moments[150:])
    assert alone["false_alarm_rate"] == 0.5
    assert notes[0].startswith("1 held-out normals of different moments support")
    thresholds, _ = calibrate(scores, ["cam-1"] * 150 + ["cam-2"] * 300, 0.05, moments)
    assert thresholds["default"] < 1  # one of 151
    assert set(thresholds["cameras"]) == {"cam-1"}


def test_a_few_normals_never_lower_a_threshold():
    scores = np.concatenate([np.arange(300.0), np.zeros(12)])
    thresholds, _ = calibrate(scores, ["cam-1"] * 300 + ["cam-2"] * 12, 0.01)
    assert set(thresholds["cameras"]) == {"cam-1"}


def test_too_few_normals_lower_the_claim_not_the_threshold():
    thresholds, notes = calibrate(np.arange(9.0), [""] * 9, 0.01)
    assert thresholds["false_alarm_rate"] == pytest.approx(0.1)
    assert thresholds["default"] == 8.0
    assert "99 are needed" in notes[0]


def test_no_normals_at_all_are_refused():
    with pytest.raises(ValueError, match="no held-out normals"):
        calibrate(np.empty(0), [], 0.01)


class Judge(torch.nn.Module):
    """A model whose score is its trunk's mean times `factor`; counts the trunk's passes."""

    def __init__(self, gain, factor):
        super().__init__()
        self.trunk, self.factor, self.passes = torch.nn.Linear(1, 1, bias=False), factor, 0
        self.trunk.weight.data.fill_(gain)
        self.trunk.forward = self.look
        self.weights = torch.ones(1)

    def look(self, images):
        self.passes += 1
        return [images.permute(0, 3, 1, 2).float() * self.trunk.weight.item()]

    def pool(self, maps):
        return None

    def judge(self, pooled, maps):
        score = maps[0].mean((1, 2, 3)) * self.factor
        winners = torch.zeros(len(score), 1, dtype=torch.long)
        return SimpleNamespace(score=score, energy=score + 1, winners=winners)


def test_models_of_one_trunk_share_its_passes_and_each_says_its_own():
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 2, 2, 3)
    source = ArraySource(images.contiguous())
    one, other, same = models = [Judge(2.0, 1.0), Judge(3.0, 1.0), Judge(2.0, 5.0)]
    found = observe_each(models, source)
    assert (one.passes, other.passes, same.passes) == (2, 2, 0)
    for model, seen in zip(models, found, strict=True):
        np.testing.assert_allclose(
            seen.score, np.arange(40) * model.trunk.weight.item() * model.factor
        )
        np.testing.assert_allclose(seen.energy, seen.score + 1)
    nothing = observe_each(models, ArraySource(images[:0].contiguous()))
    assert [len(seen.score) for seen in nothing] == [0, 0, 0]


def test_alarms_use_each_cameras_threshold():
    thresholds = {"default": 1.0, "cameras": {"cam-1": 5.0}}
    got = alarms(np.array([2.0, 2.0, 1.0]), ["cam-1", "cam-9", "cam-9"], thresholds)
    assert got.tolist() == [False, True, False]  # at the threshold is no alarm


def test_a_camera_unlike_the_others_does_not_lift_their_threshold():
    """400 normals of one kind and 12 of a camera far above: 3 % of all, at a rate of 1 %."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=400), rng.normal(8, 0.1, 12)])
    thresholds, _ = calibrate(scores, [""] * 400 + ["cam-9"] * 12, 0.01)
    alone, _ = calibrate(scores[:400], [""] * 400, 0.01)
    assert thresholds["default"] == alone["default"] < 4
    assert thresholds["cameras"] == {"cam-9": scores[400:].max()}


def test_where_the_unlike_are_no_minority_the_default_is_of_all():
    scores = np.concatenate([np.linspace(0, 1, 200), np.linspace(8, 9, 200)])
    thresholds, _ = calibrate(scores, ["cam-1"] * 200 + ["cam-2"] * 200, 0.01)
    assert thresholds["default"] > 8
