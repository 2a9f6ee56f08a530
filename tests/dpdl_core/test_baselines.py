"""The baselines against SciPy and hand-worked values, and each on an easy set it must solve."""

import math
import weakref

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.covariance import LedoitWolf

from dpdl_core.baselines import (
    BASELINES,
    SETTINGS,
    BaselineConfig,
    FrozenTrunk,
    dra,
    frozen,
    make,
    tails,
)
from dpdl_core.baselines.base import sample_images
from dpdl_core.baselines.distances import (
    PatchDraw,
    Tail,
    Whitener,
    cross_folds,
    mean_on_finest,
)
from dpdl_core.baselines.dra import Dra, pseudo_anomalies
from dpdl_core.baselines.frozen import middle_stage
from dpdl_core.baselines.knn import Banks
from dpdl_core.baselines.supervised import deviation_loss, half_size
from dpdl_core.images import ArraySource
from dpdl_core.metrics import auroc

SIDE = 64


def textures(count: int, seed: int, *, spoiled: bool = False) -> torch.Tensor:
    """Noisy stripes; a spoiled one has a bright blot, which any pretrained or random net sees."""
    rng = np.random.default_rng(seed)
    x = np.arange(SIDE)
    images = np.empty((count, SIDE, SIDE, 3))
    for i in range(count):
        stripes = 110 + 30 * np.sin(x / 3 + rng.uniform(0, 6))
        images[i] = stripes[None, :, None] + rng.normal(0, 6, (SIDE, SIDE, 1))
        if spoiled:
            top, left = rng.integers(4, 36, 2)
            images[i, top : top + 22, left : left + 22] = [250, 240, 20]
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def trunk() -> FrozenTrunk:
    torch.manual_seed(0)
    return FrozenTrunk("test_resnet", "random", batch_size=8)


CONFIG = BaselineConfig(image_size=SIDE, bank=500, iterations=60)


@pytest.mark.parametrize("name", BASELINES)
def test_each_finds_an_obvious_blot(name, trunk):
    method = make(name, trunk, CONFIG)
    shares = []
    method.fit(
        ArraySource(textures(24, 0)), textures(4, 1, spoiled=True), seed=0, progress=shares.append
    )
    test = torch.cat([textures(10, 2), textures(10, 3, spoiled=True)])
    found = method.score(test)
    assert auroc([0] * 10 + [1] * 10, found.score) > 0.9
    assert shares == sorted(shares)
    if found.maps is not None:
        assert found.maps.shape[0] == 20
    alone = torch.cat([method.score(image[None]).score for image in test])
    assert torch.allclose(alone, found.score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_repeats_and_the_callers_numbers_go_on(name, trunk):
    def run() -> torch.Tensor:
        method = make(name, trunk, BaselineConfig(image_size=SIDE, bank=200, iterations=5))
        method.fit(ArraySource(textures(12, 0)), textures(3, 1), seed=3, progress=lambda s: None)
        return method.score(textures(4, 2)).score

    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first = run()
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, run())


@pytest.mark.parametrize("name", BASELINES)
def test_without_anomalies_a_method_judges_or_says_that_it_needs_one(name, trunk):
    method = make(name, trunk, CONFIG)

    def fit() -> None:
        nothing = torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
        method.fit(ArraySource(textures(12, 0)), nothing, seed=0, progress=lambda s: None)

    if name in ("devnet", "dra"):
        with pytest.raises(ValueError, match=f"{name} .* M=0: need at least 1"):
            fit()
    else:
        fit()
        assert torch.isfinite(method.score(textures(2, 2)).score).all()


def test_settings_are_fields_that_a_method_looks_at(trunk):
    """Oracle: a config that tells what is read of it."""
    config = BaselineConfig(image_size=SIDE, bank=200, iterations=1)
    for name in BASELINES:
        asked = {"trunk", "weights", "image_size"}  # what the trunk and the images come by

        class Watched:
            def __getattr__(self, key, asked=asked):
                asked.add(key)
                return getattr(config, key)

        method = make(name, trunk, Watched())
        method.fit(
            ArraySource(textures(12, 0)), textures(3, 1), seed=0, progress=lambda share: None
        )
        assert set(SETTINGS[name]) == asked


def test_unknown_names_are_listed(trunk):
    with pytest.raises(ValueError, match="one of mahalanobis"):
        make("magic", trunk, CONFIG)


def test_a_trunk_that_takes_no_images_of_these_sizes_is_told():
    with pytest.raises(ValueError, match=r"no images of 96 px .* set image_size=224"):
        FrozenTrunk("vit_tiny_patch16_224", "random", 96)
    trunk = FrozenTrunk("vit_tiny_patch16_224", "random", 224)
    config = BaselineConfig(trunk="vit_tiny_patch16_224", image_size=224)
    for name in BASELINES:
        if name in ("devnet", "dra"):
            with pytest.raises(ValueError, match=f"{name} looks at .* no images of 112 px"):
                make(name, trunk, config)
        else:
            make(name, trunk, config)


@pytest.mark.parametrize("change", [{"image_size": 8}, {"bank": 0}, {"iterations": -1}])
def test_configs_that_cannot_be(change):
    with pytest.raises(ValueError, match="need"):
        BaselineConfig(**change)


def test_frozen_trunk_remembers_images_and_what_that_saved(trunk):
    images = textures(6, 9)
    before = trunk.saved_seconds
    first = trunk.views(images)
    assert trunk.saved_seconds == before
    again = trunk.views(images.flip(0))
    assert trunk.saved_seconds > before
    assert torch.equal(again.pooled.flip(0), first.pooled)
    assert torch.equal(again.mid.flip(0), first.mid)


def test_pooled_views_are_means_and_deviations(trunk):
    views = trunk.views(textures(2, 5))
    channels = views.last.shape[1]
    assert torch.allclose(views.last_pooled, views.last.mean((2, 3)))
    # The last stage stands last: its means, then its deviations.
    assert torch.allclose(views.pooled[:, -2 * channels : -channels], views.last_pooled, atol=1e-5)
    spread = views.last.flatten(2).std(2, correction=0)
    assert torch.allclose(views.pooled[:, -channels:], spread, atol=1e-5)
    assert torch.allclose(views.last_patches.norm(dim=1), torch.ones(()), atol=1e-4)


def test_middle_stage_of_the_trunks():
    assert middle_stage(7) == 4  # the fifth of EfficientNet's seven, MATH.md 7.1
    assert middle_stage(4) == 2


def test_whitened_distance_is_mahalanobis():
    """Oracle: SciPy's distance with scikit-learn's estimator."""
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    x = rng.normal(size=(3, 6))
    estimate = LedoitWolf().fit(normals)
    inverse = np.linalg.inv(estimate.covariance_)
    want = [mahalanobis(row, normals.mean(0), inverse) ** 2 / 6 for row in x]
    got = Whitener.fit(torch.from_numpy(normals)).distance(torch.from_numpy(x))
    assert got.tolist() == pytest.approx(want, rel=1e-9)


def test_patch_distance_is_the_nearest_of_all():
    """Oracle: brute force by SciPy, on unit-norm vectors."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(4, 5, 3, 2, generator=generator), dim=1)
    images = torch.nn.functional.normalize(torch.randn(2, 5, 3, 2, generator=generator), dim=1)
    draw = PatchDraw(torch.arange(4), 10_000, seed=0)
    for batch in normals.split(3):
        draw.take(batch)
    bank = draw.bank()
    rows = [m.permute(0, 2, 3, 1).reshape(-1, 5).numpy() for m in (images, normals)]
    want = cdist(*rows, "sqeuclidean").min(1).reshape(2, 3, 2)
    assert np.allclose(bank.map(images).numpy(), want, atol=1e-5)
    assert bank.map(normals).max() < 1e-5


def test_patches_are_drawn_alike_from_any_batches():
    maps = torch.arange(7 * 6).view(7, 1, 2, 3).float()
    banks = []
    for size in (1, 3, 7):
        draw = PatchDraw(torch.arange(7), 20, seed=5)
        for batch in maps.split(size):
            draw.take(batch)
        banks.append(draw.bank().patches.flatten().sort().values)
    assert all(torch.equal(bank, banks[0]) for bank in banks)
    assert len(set(banks[0].tolist())) == 20


def test_patches_of_some_rows_are_drawn_as_if_there_were_no_others():
    maps = torch.arange(7 * 6).view(7, 1, 2, 3).float()
    rows = torch.tensor([5, 0, 3])
    alone, among = PatchDraw(torch.arange(3), 9, seed=5), PatchDraw(rows, 9, seed=5)
    alone.take(maps[rows])
    for batch in maps.split(2):
        among.take(batch)
    found = [draw.bank().patches.flatten().sort().values for draw in (alone, among)]
    assert torch.equal(*found)


def test_tails_are_those_of_all_views_in_memory_at_once(trunk):
    """Oracle: each fold's fit and values, from views that all lie side by side."""
    normals, seen, test = textures(23, 0), textures(3, 1, spoiled=True), textures(5, 2)
    views, known = trunk.views(normals), trunk.views(seen).pooled
    bank, nothing = 60, lambda share: None

    def fit(rows):
        of = views.rows(rows)
        mid, last = (PatchDraw(torch.arange(len(rows)), bank, 4) for _ in range(2))
        mid.take(of.mid)
        last.take(of.last_patches)
        banks = Banks(mid.bank(), last.bank())
        return tails.Parts.fit(of.last_pooled, of.pooled, known, banks)

    held_out = torch.empty(23, 5, dtype=torch.float64)
    for rows, judged in cross_folds(23, seed=4):
        held_out[judged] = fit(rows).values(views.rows(judged))[0]
    values = fit(torch.arange(23)).values(trunk.views(test))[0]
    columns = zip(held_out.unbind(1), values.unbind(1), strict=True)
    want = sum(Tail.fit(known)(value) for known, value in columns)
    method = make("tails", trunk, BaselineConfig(image_size=SIDE, bank=bank))
    method.fit(ArraySource(normals), seen, seed=4, progress=nothing)
    torch.testing.assert_close(method.score(test).score.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis-all", "knn", "tails"])
def test_no_more_maps_are_held_than_a_batchs(name, monkeypatch):
    """Those of a large set are many GB."""
    monkeypatch.setattr(frozen, "KEPT_BYTES", 0)
    trunk = FrozenTrunk("test_resnet", "random", batch_size=4)
    look, maps, alive = trunk.views, [], []

    def watched(images):
        alive.append(sum(ref() is not None for ref in maps))
        views = look(images)
        maps.append(weakref.ref(views.mid))
        return views

    monkeypatch.setattr(trunk, "views", watched)
    nothing = torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
    method = make(name, trunk, CONFIG)
    method.fit(ArraySource(textures(24, 0)), nothing, seed=0, progress=lambda share: None)
    assert len(alive) == (12 if name == "tails" else 6)
    assert max(alive) <= 1  # the batch before, while the next is looked at


def test_tail_by_hand():
    tail = Tail.fit(torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    # P(v or more) with the image itself counted: (1 + values at or above) / 5
    values = torch.tensor([0.0, 1.0, 2.5, 4.0, 5.0, 6.0])
    counts = [5, 5, 3, 2, 1, 1]
    beyond = [0, 0, 0, 0, 1, 2]  # in units of max - median = 4 - 3
    want = [-math.log(c / 5) + b for c, b in zip(counts, beyond, strict=True)]
    assert tail(values).tolist() == pytest.approx(want, abs=1e-12)


def test_tail_of_equal_values_is_finite():
    assert torch.isfinite(Tail.fit(torch.zeros(5))(torch.tensor([-1.0, 0.0]))).all()


def test_cross_fitting_never_sees_the_row_it_judges():
    folds = cross_folds(23, seed=1)
    for fit_rows, rows in folds:
        assert sorted(torch.cat([fit_rows, rows]).tolist()) == list(range(23))
    assert sorted(torch.cat([rows for _, rows in folds]).tolist()) == list(range(23))
    assert sorted(len(rows) for _, rows in folds) == [4, 4, 5, 5, 5]


def test_deviation_loss_by_hand():
    torch.manual_seed(0)
    label = torch.tensor([0.0, 1.0, 1.0])
    # z equals the score up to the draws' mean and spread: 1 for the normal, 5 - 2, and 0 beyond 5
    got = deviation_loss(torch.tensor([1.0, 2.0, 9.0]), label)
    assert got.item() == pytest.approx((1 + 3 + 0) / 3, abs=0.1)


def test_dras_score_by_hand(monkeypatch):
    """MATH.md 5: the holistic head is trained to be high for normals, so it counts against."""
    method = object.__new__(Dra)
    by_scale = [(1.0, 2.0, 4.0, 16.0), (3.0, 4.0, 6.0, 18.0)]
    heads = ("seen", "pseudo", "residual", "holistic")
    found = iter(
        ({head: torch.full((2,), v) for head, v in zip(heads, values, strict=True)}, None)
        for values in by_scale
    )
    method._trunk, method._references = None, [None, None]
    method._heads = lambda maps, references: next(found)
    monkeypatch.setattr(dra, "two_scales", lambda trunk, images: [None, None])
    monkeypatch.setattr(dra, "mean_on_finest", lambda places: None)
    assert method.score(torch.zeros(2)).score.tolist() == [2 + 3 + 5 - 17] * 2


def test_each_head_of_dra_learns_from_the_images_it_is_for(monkeypatch):
    told = []
    monkeypatch.setattr(
        dra, "deviation_loss", lambda score, label: told.append((score, label)) or score.sum()
    )
    kind = torch.tensor([0, 1, 2])
    number = torch.tensor([10.0, 11.0, 12.0])
    scores = {head: number for head in ("seen", "pseudo", "residual", "holistic")}
    assert float(Dra._loss(scores, kind)) == 22 + 21 + 33 + 33
    assert [(score.tolist(), label.tolist()) for score, label in told] == [
        ([10, 12], [0, 1]),
        ([10, 11], [0, 1]),
        ([10, 11, 12], [0, 1, 1]),
        ([10, 11, 12], [1, 0, 0]),
    ]


def test_pseudo_anomalies_change_one_rectangle():
    images = textures(5, 4)
    spoiled = pseudo_anomalies(images, torch.Generator().manual_seed(0))
    assert spoiled.dtype == torch.uint8
    assert spoiled.shape == images.shape
    for before, after in zip(images, spoiled, strict=True):
        rows, columns = (before != after).any(2).nonzero(as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0 < box / SIDE**2 < 0.25  # area up to .15, up to rounding


def test_half_size_is_the_mean_of_four():
    image = torch.tensor([[0, 10], [20, 30]], dtype=torch.uint8)[None, :, :, None].repeat(
        1, 1, 1, 3
    )
    assert half_size(image).flatten().tolist() == [15, 15, 15]


def test_maps_are_averaged_on_the_finest_grid():
    coarse, fine = torch.full((1, 2, 2), 4.0), torch.full((1, 4, 4), 2.0)
    assert torch.equal(mean_on_finest([coarse, fine]), torch.full((1, 4, 4), 3.0))


def test_sampled_images_are_the_sources_own():
    images = textures(20, 0)
    source = ArraySource(images)
    got = sample_images(source, 7, torch.Generator().manual_seed(0))
    assert len(got) == 7
    assert all(any(torch.equal(g, image) for image in images) for g in got)
    assert torch.equal(sample_images(source, 99, torch.Generator().manual_seed(0)), images)
