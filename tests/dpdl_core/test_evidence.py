"""What a tail probability is worth in the score, and who may judge whom. Oracles: by hand."""

import math

import pytest
import torch

from dpdl_core.calibrate import deal_folds
from dpdl_core.parts import ENERGY_FLOOR, SEEN_FLOOR, evidence


@pytest.mark.parametrize("p", [0.9, 0.5, 0.3, 0.01, 1e-9])
def test_evidence_is_the_log_odds_above_the_floor(p):
    got = evidence(torch.full((1, 2), -math.log(p), dtype=torch.float64), num_energies=1)[0]
    odds = math.log((1 - p) / p)
    assert got[0].item() == pytest.approx(max(odds, ENERGY_FLOOR) - ENERGY_FLOOR, abs=1e-9)
    assert got[1].item() == pytest.approx(max(odds, SEEN_FLOOR) - SEEN_FLOOR, abs=1e-9)


def test_evidence_is_finite_and_never_falls_from_the_most_normal_to_the_farthest():
    tails = torch.cat([torch.zeros(1), torch.logspace(-6, 4, 200)])[:, None].expand(-1, 2)
    got = evidence(tails, num_energies=1)
    assert bool(got.isfinite().all())
    assert got[0].tolist() == [0.0, 0.0]
    assert bool((got.diff(dim=0) >= 0).all())


def pictures(count, seed):
    """Thumbnails of as many things."""
    return torch.randint(256, (count, 32, 32), generator=seeded(seed), dtype=torch.uint8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_twins_share_a_fold_and_folds_are_even():
    rows = pictures(60, 0)
    noise = 3 * torch.randn(10, 32, 32, generator=seeded(1))
    rows[30:40] = (1.02 * rows[:10] + noise).clamp(0, 255).to(torch.uint8)
    fold_of = deal_folds(rows, 5, seeded(0))
    assert fold_of[30:40].tolist() == fold_of[:10].tolist()
    assert torch.bincount(fold_of, minlength=5).tolist() == [12] * 5


def test_one_picture_many_times_still_fills_every_fold():
    fold_of = deal_folds(pictures(1, 0).expand(23, -1, -1), 5, seeded(0))
    assert set(torch.bincount(fold_of, minlength=5).tolist()) <= {3, 4, 5}


def test_folds_are_dealt_at_random():
    rows = pictures(40, 1)
    first, second = (deal_folds(rows, 4, seeded(s)) for s in (2, 3))
    assert first.tolist() != second.tolist()
