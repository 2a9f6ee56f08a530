"""A fold's prototypes out of one look at all patches: against Lloyd's step on the others alone.
The prototypes that stand for all: against every choice there is."""

import itertools
import math

import pytest
import torch

from dpdl_core.bridge import Bridge
from dpdl_core.estimate import covering, leave_out
from dpdl_core.observe import Features
from dpdl_core.parts import PatchEnergy, PatchSpace

IMAGES, CHANNELS, SIDE, DIMS, CODES, FOLDS = 12, 6, 4, 3, 8, 3


def test_a_folds_prototypes_are_those_of_one_step_on_the_other_folds():
    """Oracle: the patches of the other folds by hand, distances by cdist, plain means."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(IMAGES, CHANNELS, SIDE, SIDE, generator=generator).half()
    features = Features(torch.zeros(IMAGES, 0), [maps])
    space = PatchSpace([0], CHANNELS, DIMS, grid=SIDE, smooth=False)
    space.axes.copy_(torch.rand(CHANNELS, DIMS, generator=generator))
    rows = space([maps])
    part = PatchEnergy(space, CODES, 0.01, 0.1)
    means = rows.flatten(0, 1)[:CODES].clone()
    means[-1] = rows[0].mean(0) + 0.001  # near patches of the first fold above all
    part.bridge = Bridge(means, torch.full((1, DIMS), 0.02), torch.zeros(CODES), 0.01)
    fold_of = torch.arange(IMAGES) % FOLDS
    found = leave_out(part, features, fold_of, FOLDS, generator)
    assert len(found) == FOLDS
    for fold, got in enumerate(found):
        others = rows[fold_of != fold].flatten(0, 1)
        nearest = torch.cdist(others, means).argmin(1)
        want = [others[nearest == code].mean(0) for code in range(CODES) if (nearest == code).any()]
        # In the order they had: the first of them stand for all.
        torch.testing.assert_close(got.bridge.means, torch.stack(want), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.bridge.variances, part.bridge.variances)


def test_what_only_one_fold_shows_is_no_prototype_without_it():
    maps = torch.zeros(4, 2, 2, 2)
    maps[:, 0] = 1
    maps[0, 0], maps[0, 1] = 0, 1  # one image unlike the others, alone in its fold
    space = PatchSpace([0], 2, 2, grid=2, smooth=False)
    space.axes.copy_(torch.eye(2))
    part = PatchEnergy(space, 2, 0.01, 0.5)
    part.bridge = Bridge(torch.eye(2), torch.full((1, 2), 0.02), torch.zeros(2), 0.01)
    features = Features(torch.zeros(4, 0), [maps.half()])
    fold_of = torch.tensor([0, 1, 1, 1])
    first, second = leave_out(part, features, fold_of, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.bridge.means, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(second.bridge.means, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("seed", range(5))
def test_the_first_prototypes_stand_for_all(seed):
    """Oracle: every choice of as many points; greedy's gain has its proven share."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 20, (9,), generator=generator).double()
    far = (points[:, None] - points).square().sum(2)

    def left_over(chosen):
        return float(weights @ far[list(chosen)].amin(0))

    order = covering(points, weights, 3).tolist()
    assert sorted(order) == list(range(9))
    assert order[3:] == sorted(order[3:])
    nothing = float(weights.sum() * far.max())
    best = nothing - min(left_over(c) for c in itertools.combinations(range(9), 3))
    assert nothing - left_over(order[:3]) >= (1 - 1 / math.e) * best
    assert left_over(order[:1]) == min(left_over([c]) for c in range(9))
    for held in (1, 2):  # each next one is the one that leaves least
        rest = [left_over([*order[:held], c]) for c in range(9)]
        assert left_over(order[: held + 1]) == pytest.approx(min(rest))


def test_covering_fewer_points_than_asked_for_and_equal_ones():
    assert sorted(covering(torch.zeros(3, 2), torch.ones(3), 128).tolist()) == [0, 1, 2]
