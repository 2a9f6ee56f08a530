"""Energies, whitening and tails against oracles of other make."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

from dpdl_core import parts
from dpdl_core.bridge import Bridge
from dpdl_core.calibrate import auroc, make_spoilers
from dpdl_core.learn import Heads
from dpdl_core.metrics import auroc as slow_auroc
from dpdl_core.parts import (
    PatchEnergy,
    PatchSpace,
    PooledEnergy,
    Tails,
    hard_energy,
    hard_nearest,
    pool,
    quadrant_columns,
    whitening,
)


@pytest.mark.parametrize(("rows", "dims"), [(30, 50), (200, 12)])
@pytest.mark.parametrize("axes", [5, 99])
def test_whitening_is_ledoit_wolf_on_its_leading_axes(rows, dims, axes, monkeypatch):
    """Oracle: scikit-learn's LedoitWolf, the small eigenvalues replaced by their mean, inverted by
    NumPy. 200 rows are four slices; with 99 axes none is replaced."""
    monkeypatch.setattr(parts, "_WHITENING_ROWS", 64)
    x = np.random.default_rng(0).normal(size=(rows, dims)) * np.linspace(0.1, 3, dims) + 5
    values, vectors = np.linalg.eigh(LedoitWolf().fit(x).covariance_)
    if axes < dims:
        values[:-axes] = values[:-axes].mean()
    precision = np.linalg.inv(vectors @ np.diag(values) @ vectors.T)
    centred = x - x.mean(0)
    want = np.einsum("nd,de,ne->n", centred, precision, centred)
    part = PooledEnergy(list(range(dims)), axes, 1).double()
    for name, value in whitening(torch.from_numpy(x), axes)._asdict().items():
        getattr(part, name).copy_(value)
    got = part.whiten(torch.from_numpy(x)).square().sum(1).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_lone_prototypes_energy_is_the_bridges_of_whitened_features():
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(50, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    part = PooledEnergy([1, 3, 4, 6, 7, 9, 10], 3, 1)
    for name, value in whitening(pooled[:, part.columns], 3)._asdict().items():
        getattr(part, name).copy_(value)
    want = part.bridge.energy(part.whiten(pooled)) / 7
    torch.testing.assert_close(part(pooled), want, rtol=1e-4, atol=0)


def test_a_lone_prototypes_energy_keeps_its_digits_beside_an_axis_that_varies_most():
    """Light that flickers, ten thousand times as strong as all else. Oracle: float64."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(400, 60, generator=generator)
    pooled[:, 0] *= 100
    part = PooledEnergy(list(range(60)), 8, 1)
    found = whitening(pooled, 8)
    for name, value in found._asdict().items():
        getattr(part, name).copy_(value)
    centred = pooled.double() - found.mean
    white = found.rest * centred + (centred @ found.axes * found.gain) @ found.axes.T
    want = part.bridge.energy(white.float()) / 60
    torch.testing.assert_close(part(pooled), want, rtol=1e-3, atol=0)


def test_hard_energy_is_within_its_bound_of_the_bridges():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(64, 8, generator=generator)
    x = torch.randn(100, 8, generator=generator)
    for eps in (1e-3, 0.1):
        weights = torch.full((64,), -math.log(64))
        bridge = Bridge(means, torch.full((1, 8), 0.05), weights, eps)
        hard, winner = hard_nearest(bridge, x)
        soft, want = bridge.nearest(x)
        assert torch.equal(winner, want)
        assert torch.equal(hard_energy(bridge, x), hard)
        gap = (soft - hard).detach()
        assert gap.min() >= -1e-5
        assert gap.max() <= eps * math.log(64) + 1e-5


@pytest.mark.parametrize("prototypes", [512, 576, 600, 1024])
def test_the_nearest_of_many_prototypes(prototypes):
    """Oracle: all distances, by SciPy. 576 and 1024 are whole pieces, 600 is not."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(prototypes, 6, generator=generator)
    x = torch.randn(3000, 6, generator=generator)
    bridge = Bridge(means, torch.full((1, 6), 1.0), torch.zeros(prototypes), 1.0)
    distances = cdist(x.numpy(), means.numpy(), "sqeuclidean")
    least, winners = hard_nearest(bridge, x)
    np.testing.assert_array_equal(winners.numpy(), distances.argmin(1))
    np.testing.assert_allclose(least.detach().numpy(), distances.min(1) / 4, rtol=1e-3, atol=1e-5)


def test_energies_keep_their_size_however_small_eps_is():
    """1 - S tends to eps over the variance, 1e-28 here, where 1 less a float is nothing."""
    generator = torch.Generator().manual_seed(0)
    means, x = torch.randn(8, 4, generator=generator), torch.randn(20, 4, generator=generator)
    bridge = Bridge(means, torch.full((1, 4), 0.01), torch.zeros(8), 1e-30)
    want = 1e-28 * cdist(x.numpy(), means.numpy(), "sqeuclidean").min(1) / 2
    np.testing.assert_allclose(hard_energy(bridge, x).detach().numpy(), want, rtol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 6, 7])
def test_pool_by_numpy(side):
    maps = [torch.rand(2, 3, 6, 6), torch.rand(2, 4, side, side)]
    got = pool(maps, (0, 1), [0]).numpy()
    last, half = maps[1].numpy(), (side + 1) // 2
    want = [m.numpy().mean((2, 3)) for m in maps], [m.numpy().std((2, 3)) for m in maps]
    quadrants = [
        last[:, :, r, c].mean((2, 3))
        for r in (np.s_[:half], np.s_[side - half :])
        for c in (np.s_[:half], np.s_[side - half :])
    ]
    first = maps[0].numpy().reshape(2, 3, 2, 3, 2, 3).mean((3, 5)).transpose(0, 2, 3, 1)
    columns = [want[0][0], want[1][0], want[0][1], want[1][1], *quadrants, first.reshape(2, 12)]
    assert quadrant_columns([3, 4], [0, 1]) == {1: range(14, 30), 0: range(30, 42)}
    np.testing.assert_allclose(got, np.concatenate(columns, 1), rtol=1e-4, atol=1e-5)
    columns[0] = columns[1] = 0 * columns[0]
    got = pool(maps, (1,), [1]).numpy()
    np.testing.assert_allclose(got, np.concatenate(columns[:-1], 1), rtol=1e-4, atol=1e-5)


def test_tails_are_minus_log_survival():
    """Oracle: of exponential values the tail is the value itself, within and far beyond."""
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=(200_000, 1))).float()
    tails = Tails(1)
    tails.fit(values)
    at = torch.tensor([[0.1], [0.5], [1.0], [2.0], [8.0], [40.0]])
    np.testing.assert_allclose(tails(at).numpy(), at.numpy(), rtol=0.03, atol=0.01)


def test_tails_keep_order_and_do_not_depend_on_scale():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 1, generator=generator)
    tails, scaled = Tails(1), Tails(1)
    tails.fit(values)
    scaled.fit(1000 * values + 5)
    at = torch.linspace(-4, 9, 200)[:, None]
    got = tails(at)
    assert (got.diff(dim=0) >= 0).all()
    assert (got[at > 0].diff() > 0).all()
    torch.testing.assert_close(got, scaled(1000 * at + 5), rtol=1e-3, atol=1e-3)


def test_tails_of_constant_values_are_finite():
    tails = Tails(1)
    tails.fit(torch.ones(20, 1))
    assert tails(torch.tensor([[0.0], [1.0], [2.0]])).isfinite().all()


def test_auroc_by_scikit_learn():
    a, b = torch.tensor([1.0, 2, 2, 3]), torch.tensor([2.0, 3, 4])
    want = slow_auroc([0] * 4 + [1] * 3, [*a.tolist(), *b.tolist()])
    assert auroc(a, b).item() == pytest.approx(want)


def test_spoiling_depends_on_the_image_not_on_its_batch():
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    numbers = torch.arange(10, 14)
    for spoil in make_spoilers(0):
        together = spoil(images, numbers)
        assert torch.equal(together[2], spoil(images[2:3], numbers[2:3])[0])
        changed = (together != images).any(-1).float().mean((1, 2))
        assert (changed > 0).all()
        assert (changed < 0.3).all()


def test_folded_heads_give_what_the_plain_ones_do():
    torch.manual_seed(0)
    heads = Heads([0, 1], 7, 5, networks=1).eval()
    heads.center.normal_()
    heads.whitener.copy_(torch.randn(7, 7))
    norm = heads.residual.norm
    for parameter in (norm.running_mean, norm.weight, norm.bias):
        torch.nn.init.normal_(parameter)
    norm.running_var.uniform_(0.5, 2)
    maps = [torch.randn(3, 3, 8, 8), torch.randn(3, 4, 4, 4)]
    energy = PatchEnergy(PatchSpace([0], 3, 5, grid=6, smooth=False), 7, 0.1, 0.1)
    energy.bridge = Bridge(torch.randn(7, 5), 0.1 + torch.rand(1, 5), torch.zeros(7), 0.1)
    patches, winners = torch.randn(3, 36, 5), torch.randint(7, (3, 36))
    plain = heads.logits(heads.whiten(heads.join(maps)), energy.residuals(patches, winners))
    folded = heads(maps, energy, patches, winners)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smooth", [False, True])
def test_projecting_before_spreading_changes_nothing(smooth):
    """Oracle: the patches themselves, joined on the grid and projected there."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, c, s, s, generator=generator) for c, s in ((4, 16), (6, 8), (10, 4))]
    space = PatchSpace([0, 1, 2], 20, 5, grid=8, smooth=smooth)
    space.center.copy_(torch.rand(20, generator=generator))
    space.axes.copy_(torch.rand(20, 5, generator=generator))
    want = (space.join(maps) - space.center) @ space.axes
    torch.testing.assert_close(space(maps), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("grid", "step"), [(8, 2), (7, 2), (8, 3)])
@pytest.mark.parametrize("smooth", [False, True])
def test_some_places_are_those_of_the_whole_grid(grid, step, smooth):
    """A deep map that has as many places as are looked at is spread on the grid all the same."""
    generator = torch.Generator().manual_seed(0)
    sides = (2 * grid, grid, len(range(0, grid, step)))
    maps = [torch.rand(3, 4, side, side, generator=generator) for side in sides]
    space = PatchSpace([0, 1, 2], 12, 5, grid=grid, smooth=smooth, step=step)
    space.axes.copy_(torch.rand(12, 5, generator=generator))
    want = space.everywhere(maps).view(3, grid, grid, 5)[:, ::step, ::step]
    assert space.side == want.shape[1]
    torch.testing.assert_close(space(maps), want.flatten(1, 2), rtol=1e-5, atol=1e-6)


def test_a_smooth_patch_is_the_mean_of_its_neighbours_and_itself():
    """Oracle: means of those there are, place by place."""
    m = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    patches = PatchSpace([0], 4, 4, grid=5, smooth=True).join([m])[0].numpy()
    for place, patch in enumerate(patches):
        y, x = divmod(place, 5)
        mean = m[0, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].numpy().mean(axis=(1, 2))
        np.testing.assert_allclose(patch, mean / np.linalg.norm(mean), rtol=1e-5)


def test_a_heat_map_of_every_other_place_covers_the_grid():
    part = PatchEnergy(PatchSpace([0], 3, 3, grid=5, smooth=True, step=2), 4, 0.1, 0.1)
    grid = part.on_grid(torch.arange(9.0)[None])
    want = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5], [6, 6, 7, 7, 8]]
    assert grid[0].tolist() == want


@pytest.mark.parametrize("num_prototypes", [40, 600])
def test_an_images_energy_is_of_its_worst_patches_against_all_prototypes(num_prototypes):
    """Oracle: SciPy's distances. Few prototypes and many take different ways; the worst patches
    stand out, so that the many's first look finds them."""
    generator = torch.Generator().manual_seed(0)
    space = PatchSpace([0], 5, 5, grid=8, smooth=False)
    space.axes.copy_(torch.eye(5))
    energy = PatchEnergy(space, num_prototypes, 0.1, 1 / 16)
    means = torch.nn.functional.normalize(
        torch.randn(num_prototypes, 5, generator=generator).abs(), dim=1
    )
    weights = torch.full((num_prototypes,), -math.log(num_prototypes))
    energy.bridge = Bridge(means, torch.full((1, 5), 0.1), weights, 0.1)
    maps = torch.rand(3, 5, 8, 8, generator=generator)
    maps[:, :, 2, 1:5] *= -1
    with torch.inference_mode():
        found, grid = energy([maps])
        patches = space([maps])
        energies, winners = energy.nearest(patches)
    distances = cdist(patches.flatten(0, 1).numpy(), means.numpy(), "sqeuclidean")
    want = 0.5 * distances.min(1).reshape(3, 64) / 2  # 1 - S is a half
    worst = np.sort(want, 1)[:, -4:]
    np.testing.assert_allclose(found.numpy(), worst.mean(1), rtol=1e-4)
    assert torch.equal(grid.flatten(1), energies)
    top = energies.topk(4, 1).indices
    nearest = distances.argmin(1).reshape(3, 64)
    assert torch.equal(winners.gather(1, top), torch.from_numpy(nearest).gather(1, top))


@pytest.mark.parametrize("worst", [0.03, 0.3, 1.0])
def test_all_of_an_images_worst_patches_are_held_against_all_prototypes(worst):
    """Oracle: every patch against every prototype; the few of most images' worst may be missed."""
    generator = torch.Generator().manual_seed(0)
    space = PatchSpace([0], 8, 8, grid=14, smooth=False)
    part = PatchEnergy(space, 600, 0.001, worst)
    part.bridge.means.data.copy_(torch.randn(600, 8, generator=generator))
    patches = torch.randn(20, 196, 8, generator=generator)
    exact = hard_energy(part.bridge, patches.flatten(0, 1)).view(20, 196)
    got, want = part.image_energy(part.nearest(patches)[0]), part.image_energy(exact)
    assert (got - want).abs().mean() < 0.05 * want.mean()
    if worst == 1.0:
        torch.testing.assert_close(got, want)
