"""Thresholds from normals that went through the sieve, by simulation: what is stated is kept.

An image is one pixel whose 24 bits are its energy, which is its score as well: exponential of mean
1 for normals, so that P(score > t) is exp(-t), and far out for defects.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpdl_core.images import ArraySource
from dpdl_core.sieve import LIMIT_QUANTILE, look_over, set_aside
from pipelines.scoring import calibrate

UNIT = 2.0**-18
TRIALS = 120
OLD = 499


def pixels(energies):
    steps = (np.asarray(energies) / UNIT).astype(np.uint32)
    shifted = steps[:, None] >> np.array([16, 8, 0], np.uint32)
    return torch.from_numpy((shifted & 255).astype(np.uint8)[:, None, None, :])


class Trunk:
    mean_255, channels = torch.zeros(1), (3,)

    def __call__(self, images):
        return [images.permute(0, 3, 1, 2).float()]


class Model:
    """Says of each image the energy that it is."""

    def __init__(self, energy_limit):
        self.energy_limit = torch.tensor(energy_limit)
        self.config = SimpleNamespace(
            batch_size=4096,
            image_size=1,
            pooled_spaces=["1"],
            patch_spaces=["1"],
            head_stages="1",
        )
        self.trunk, self.weights = Trunk(), torch.ones(1)
        self.parts = SimpleNamespace(energies=SimpleNamespace(names=["all"]))

    def pool(self, maps):
        return None

    def judge(self, pooled, maps):
        energy = (maps[0].flatten(1) * torch.tensor([65536.0, 256.0, 1.0])).sum(1) * UNIT
        return SimpleNamespace(energy=energy, parts={"all": energy})


def model_of(rng, count=500):
    """Its limit comes from so many normals."""
    return Model(float(np.quantile(rng.exponential(size=count), LIMIT_QUANTILE)))


def refreshed(rng, defects=0, at=(0, 0), new=500):
    """Scores that a refresh sets thresholds on, with so many defects among the new normals."""
    unseen = np.concatenate([rng.exponential(size=new - defects), rng.uniform(*at, defects)])
    aside = set_aside(model_of(rng), ArraySource(pixels(unseen)), limit_from=500)
    return np.concatenate([rng.exponential(size=OLD), unseen[~aside.numpy()]])


def alarm_rates(some_scores, rate):
    thresholds = [calibrate(s, [""] * len(s), rate)[0]["default"] for s in some_scores]
    return np.exp(-np.array(thresholds))


def test_after_a_refresh_fresh_normals_alarm_at_the_stated_rate():
    """Exact for 999 normals that nothing is taken from: the rate, within four standard errors."""
    rng = np.random.default_rng(0)
    some_scores = [refreshed(rng) for _ in range(TRIALS)]
    for rate in (0.01, 0.005, 0.001):
        found = alarm_rates(some_scores, rate).mean()
        assert found == pytest.approx(rate, abs=4 * np.sqrt(rate / 1000 / TRIALS)), rate


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("at", [(7, 12), (20, 30)])
def test_defects_among_the_new_normals_do_not_lift_the_threshold(share, at):
    """Of the rate half is lost at most, and no other half added."""
    rng = np.random.default_rng(0)
    rates = alarm_rates([refreshed(rng, round(share * 500), at) for _ in range(TRIALS // 4)], 0.01)
    assert 0.005 < rates.mean() < 0.015
    assert rates.min() > np.exp(-7)


def test_what_chance_explains_is_kept_and_of_more_the_least_anomalous():
    energies = [*np.linspace(0, 3, 994), 6.0, 9.0, 7.0, 8.0, 8.5, 30.0]
    source, model = ArraySource(pixels(energies)), Model(5.0)
    beyond = look_over(model, source, max_maps=0).aside.nonzero().flatten().tolist()
    assert beyond == [*range(994, 1000)]
    # Chance puts none so far: log(1000 / .01) = 11.5.
    assert set_aside(model, source, limit_from=2000).nonzero().flatten().tolist() == [999]
    # Of 1020, 5.6 come on average.
    many = set_aside(model, ArraySource(pixels([*energies, *[8.2] * 20])), limit_from=2000)
    assert many[[994, 996, 997]].tolist() == [False] * 3
    assert (many[[995, 998, 999]].all(), int(many.sum())) == (True, 21)
    assert len(set_aside(model, ArraySource(pixels([])), limit_from=0)) == 0
    vouched = [False] * 999 + [True]
    assert not set_aside(model, source, limit_from=2000, vouched=vouched).any()


def test_a_camera_that_has_moved_is_drift_beside_nine_that_have_not():
    """Its own bulk counts, for what is learnt and for thresholds; what stands out of it is not."""
    rng = np.random.default_rng(0)
    energies = [*rng.exponential(size=180), *rng.normal(15, 1, 19), 60.0]
    cameras = [f"cam-{i % 9}" for i in range(180)] + ["moved"] * 20
    source, model = ArraySource(pixels(energies)), Model(5.3)
    assert look_over(model, source, max_maps=0).aside[180:].all()
    aside = look_over(model, source, cameras, max_maps=0).aside
    assert aside[180:].nonzero().flatten().tolist() == [19]
    unseen = set_aside(model, source, limit_from=500, cameras=cameras)
    assert unseen.nonzero().flatten().tolist() == [199]
    few = [*cameras[:190], *["other"] * 5, *["another"] * 5]  # too few to say where the bulk lies
    assert look_over(model, source, few, max_maps=0).aside[190:].all()


def test_defects_of_one_camera_do_not_pass_for_what_chance_explains_of_all():
    """Ten of 1,000 may be chance; of one camera's 50 they are not."""
    rng = np.random.default_rng(0)
    energies = [*rng.uniform(0, 3, 990), *rng.uniform(7, 12, 10)]
    cameras = ["cam-1"] * 950 + ["cam-2"] * 50
    source, model = ArraySource(pixels(energies)), Model(5.3)
    assert set_aside(model, source, limit_from=500).sum() == 0
    assert set_aside(model, source, limit_from=500, cameras=cameras).sum() == 10
