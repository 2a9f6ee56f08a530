"""What parts are worth and by which images: nothing is judged by a fit that knows it, weights
worked by hand, planted faults."""

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dpdl_core import calibrate
from dpdl_core.config import DpdlConfig
from dpdl_core.estimate import fit_energies
from dpdl_core.observe import Features, Normals
from dpdl_core.parts import pool

CHECKS = {}
CHANNELS = [4, 6]
CONFIG = DpdlConfig(
    pooled_spaces=("2q", "1-2"),
    patch_spaces=("1-2", "2s"),
    patch_prototypes=6,
    patch_dims=5,
    patch_side=4,
    patch_worst=0.2,
    head_stages="1-2",
    head_iterations=5,
    folds=3,
)
COUNT, SEEN, SPOILED = 24, 6, 12


def check(function):
    CHECKS[function.__name__] = function
    return function


def features(count, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.rand(count, c, s, s, generator=generator)
        for c, s in zip(CHANNELS, (8, 4), strict=True)
    ]
    return Features(pool(maps, range(2), [1]), [m.half() for m in maps])


def without(found, row):
    """The same but for one image, which is another one."""
    other = features(1, seed=99)
    rows = [torch.cat([t[:row], o, t[row + 1 :]]) for t, o in pairs(found, other)]
    return Features(rows[0], rows[1:])


def pairs(one, two):
    return zip([one.pooled, *one.maps], [two.pooled, *two.maps], strict=True)


def crossed(module, normals, seen):
    """Cross-fitted values, and the fold of every normal."""
    generator = torch.Generator().manual_seed(0)
    first = features(COUNT, 1)
    full = fit_energies(
        CONFIG,
        CHANNELS,
        first.pooled,
        first,
        generator=torch.Generator().manual_seed(1),
    )
    rows = torch.arange(COUNT)
    small = torch.randint(256, (COUNT, 32, 32), generator=torch.Generator().manual_seed(2)).byte()
    kept = Normals(
        normals.pooled, rows, rows, normals, [features(SPOILED, 3)], torch.arange(SPOILED), small
    )
    fold_of = calibrate.deal_folds(small, CONFIG.folds, torch.Generator().manual_seed(0))
    return module.cross_fit(CONFIG, CHANNELS, kept, seen, full, generator=generator), fold_of


@check
def nothing_is_judged_by_a_fit_that_knows_it(module: ModuleType):
    """Another image in place of one normal, or of one anomaly, changes what other folds are
    judged by, and nothing in its own fold but itself."""
    normals, seen = features(COUNT, 1), features(SEEN, 2)
    before, fold_of = crossed(module, normals, seen)
    row = 7
    after, _ = crossed(module, without(normals, row), seen)
    beside = (fold_of == fold_of[row]).nonzero().squeeze(1)
    beside = beside[beside != row]
    assert len(beside) > 2
    assert torch.equal(before.normals[beside], after.normals[beside])
    mine = fold_of[:SPOILED] == fold_of[row]
    assert torch.equal(before.spoiled[0][mine], after.spoiled[0][mine])
    elsewhere = fold_of != fold_of[row]
    assert bool((before.normals[elsewhere] != after.normals[elsewhere]).any(1).all())

    after, _ = crossed(module, normals, without(seen, 1))
    seen_fold = torch.arange(SEEN) % CONFIG.folds
    assert torch.equal(before.seen[4], after.seen[4])  # fold of 1, too
    taught = slice(4, None)  # energies know no anomaly
    assert torch.equal(before.seen[:1, :4], after.seen[:1, :4])
    others = seen_fold != seen_fold[1]
    assert bool((before.seen[others, taught] != after.seen[others, taught]).any(1).all())
    same = fold_of == seen_fold[1]  # the anomaly is left out there, too
    assert torch.equal(before.normals[same], after.normals[same])


def column(separation):
    """Ten normals' values 0..9 and ten others' so that the AUROC is `separation`, in tenths."""
    return torch.full((10,), round(10 * separation) - 0.5)


def cross(levels, seen):
    """AUROC of every energy at every level of cut-paste, and of every part on the seen."""
    normals = torch.arange(10.0)[:, None].expand(-1, len(seen)).contiguous()

    def table(values):
        return torch.stack([column(v) for v in values], 1)

    spoiled = [table([*level, *[0.5] * (len(seen) - len(level))]) for level in levels]
    return calibrate.CrossFit(normals, spoiled, table(seen))


@check
def energies_weigh_what_faint_cut_paste_says(module: ModuleType):
    """Of levels with means .95, .8 and .6 the second: gains .8 and .4, over their mean."""
    found = module.weigh(cross([(1.0, 0.9), (0.9, 0.7), (0.6, 0.6)], [0.8] * 7), 0, 2, 10)
    assert found[:2].tolist() == pytest.approx([0.8 / 0.6, 0.4 / 0.6])


@check
def of_pooled_spaces_the_best_counts(module: ModuleType):
    """Gains .8 and .6 of pooled spaces, 1 and .4 of patches: as one, the pooled weigh .8, which
    their gains' sixteenth powers share; the mean of .8, 1 and .4 is 1."""
    found = module.weigh(cross([(0.9, 0.8, 1.0, 0.7)], [0.8] * 9), 2, 4, 10)
    high, low = 0.8**16, 0.6**16
    want = [0.8 * high / (high + low), 0.8 * low / (high + low), 1.0, 0.4]
    assert found[:4].tolist() == pytest.approx([w * 3 / 2.2 for w in want], rel=1e-5)
    # M = 10: half of 3.5 times their sum of 3, were all found as well.
    assert found[4:].tolist() == pytest.approx([5.25 / 4] * 2 + [5.25 / 6] * 3)


@check
def seen_parts_weigh_by_shots_and_by_what_they_find(module: ModuleType):
    """M = 10: 3.5 * (1.2 + 2.8) * 10 / 20 = 7, half of it for two directions,
    half for three heads, each times the root of its log odds over the energies' mean log odds,
    within .6 and 1.3."""
    aurocs = [0.8, 0.7, 0.9, 0.6, 0.7, 0.8, 1.0]
    found = module.weigh_seen(cross([], aurocs), torch.tensor([1.2, 2.8]), 10)

    def odds(p):
        p = min(p, 0.98)
        return math.log(p / (1 - p))

    mean = (odds(0.8) + odds(0.7)) / 2
    worth = [min(1.3, max(0.6, math.sqrt(odds(p) / mean))) for p in aurocs[2:]]
    share = [3.5 / 2] * 2 + [3.5 / 3] * 3
    want = [s * w for s, w in zip(share, worth, strict=True)]
    assert found.tolist() == pytest.approx(want, rel=1e-4)
    assert worth[0] == 1.3
    assert worth[1] == pytest.approx(math.sqrt(odds(0.6) / mean))


@check
def one_anomaly_cannot_say_what_it_is_worth(module: ModuleType):
    """M = 1: nothing was left out, so the share alone, 3.5 * 2 / 11."""
    one = cross([], [0.8] * 7)
    one = calibrate.CrossFit(one.normals, [], torch.zeros(0, 7))
    share = 7 / 11
    want = [share / 4] * 2 + [share / 6] * 3
    assert module.weigh_seen(one, torch.ones(2), 1).tolist() == pytest.approx(want)


@check
def without_directions_the_heads_have_the_whole_share(module: ModuleType):
    """M = 1, no pooled space: two energies and the three heads, 7 / 11 in all."""
    one = calibrate.CrossFit(torch.zeros(10, 5), [], torch.zeros(0, 5))
    assert module.weigh_seen(one, torch.ones(2), 1).tolist() == pytest.approx([7 / 33] * 3)


@check
def directions_are_mean_unit_vectors_in_whitened_space(module: ModuleType):
    normals, seen = features(COUNT, 1), features(3, 2)
    generator = torch.Generator().manual_seed(1)
    energies = fit_energies(CONFIG, CHANNELS, normals.pooled, normals, generator=generator)
    towards = module.directions(CONFIG, energies, seen.pooled)
    x = features(5, 4).pooled
    for row, part in enumerate(energies.pooled.values()):
        unit = F.normalize(part.whiten(seen.pooled), dim=1)
        # Up to a constant, the mean over anomalies of <z(x), z(a) / |z(a)|>.
        want = (part.whiten(x) @ unit.T).mean(1)
        got = x @ towards[row]
        torch.testing.assert_close(got - got[0], want - want[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CHECKS)
def test_calibration(name):
    CHECKS[name](calibrate)


FAULTS = {
    "maps of the held-out fold": (
        "normals.features.take((mine != fold).nonzero().squeeze(1))",
        "normals.features",
        "nothing_is_judged_by_a_fit_that_knows_it",
    ),
    "pooled features of the held-out fold": (
        "inside[normals.kept[fold_of == fold]] = False",
        "pass",
        "nothing_is_judged_by_a_fit_that_knows_it",
    ),
    "anomalies of the held-out fold": (
        "known = (seen_fold != fold).nonzero()",
        "known = (seen_fold >= 0).nonzero()",
        "nothing_is_judged_by_a_fit_that_knows_it",
    ),
    "weights without chance": (
        "(2 * separation[level] - 1)",
        "separation[level]",
        "energies_weigh_what_faint_cut_paste_says",
    ),
    "all pooled spaces count": (
        "** CHOICE",
        "** 1",
        "of_pooled_spaces_the_best_counts",
    ),
    "the plainest level": (".argmin())", ".argmax())", "energies_weigh_what_faint_cut_paste_says"),
    "no root": (
        ").sqrt().clamp(0.6",
        ").clamp(0.6",
        "seen_parts_weigh_by_shots_and_by_what_they_find",
    ),
    "a share too large": (
        "(num_seen + HALF_SHOTS)",
        "HALF_SHOTS",
        "one_anomaly_cannot_say_what_it_is_worth",
    ),
    "a glaring anomaly is all of it": (
        "F.normalize(part.whiten(seen), dim=1)",
        "part.whiten(seen)",
        "directions_are_mean_unit_vectors_in_whitened_space",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(plant, fault):
    old, new, finder = FAULTS[fault]
    faulty = plant(calibrate, old, new)
    with pytest.raises(AssertionError):
        CHECKS[finder](faulty)
