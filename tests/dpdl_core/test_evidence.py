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


def test_twins_share_a_fold_and_folds_are_even():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 40, generator=generator)
    rows[30:40] = rows[:10] + 0.001 * torch.randn(10, 40, generator=generator)
    fold_of = deal_folds(rows, 5, generator)
    assert fold_of[30:40].tolist() == fold_of[:10].tolist()
    sizes = torch.bincount(fold_of, minlength=5)
    assert int(sizes.max() - sizes.min()) <= 2


def test_one_picture_many_times_still_fills_every_fold():
    fold_of = deal_folds(torch.ones(23, 8), 5, torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(fold_of, minlength=5).tolist()) == [3, 5, 5, 5, 5]


def test_folds_are_dealt_at_random():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    first, second = (deal_folds(rows, 4, torch.Generator().manual_seed(s)) for s in (2, 3))
    assert first.tolist() != second.tolist()
