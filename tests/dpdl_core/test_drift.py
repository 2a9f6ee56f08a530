"""Drift: PSI by its formula, no alarm without drift, and what a version keeps of its normals."""

import json

import numpy as np
import pytest

from dpdl_core import drift
from dpdl_core.drift import ENOUGH, WINDOW, Drift, psi, reference

PROTOTYPES, PATCHES = 64, 49


def normals(rng, count, *, shift=0.0, first=0):
    """Energies and winners of `count` images; `first` moves patches on to other prototypes."""
    energy = rng.gamma(4.0, 1.0, count) + shift
    winners = (rng.geometric(0.1, (count, PATCHES)) - 1 + first) % PROTOTYPES
    return energy, winners


def kept(rng, count=400, cameras=None):
    energy, winners = normals(rng, count)
    made = reference(energy, winners, cameras or [""] * count, PROTOTYPES)
    return json.loads(json.dumps(made))


def test_psi_by_hand():
    """Oracle: the sum of Kullback-Leibler both ways (SciPy), on counts too large for smoothing."""
    from scipy.stats import entropy

    p, q = np.array([10_000, 30_000, 60_000]), np.array([50_000, 25_000, 25_000])
    want = entropy(p, q) + entropy(q, p)
    assert psi(p, q) == pytest.approx(want, rel=1e-3)
    assert psi(p, p) == 0
    assert psi(p, q) == pytest.approx(psi(q, p))


def test_an_empty_bin_is_finite():
    assert 0 < psi(np.array([0, 200]), np.array([100, 100])) < 10


@pytest.mark.parametrize("seed", range(5))
def test_the_same_distribution_is_no_drift(seed):
    rng = np.random.default_rng(seed)
    watched = Drift(kept(rng))
    for _ in range(10):
        watched.add(["a"] * 50, *normals(rng, 50))
    found = watched.psi()["a"]
    assert found["energy"].value < 0.1
    assert all(each.value < each.bound for each in found.values())


@pytest.mark.parametrize(
    ("moved", "of"), [({"shift": 1.5}, "energy"), ({"first": 3}, "prototypes")]
)
def test_what_has_moved_is_seen_and_what_has_not_is_not(moved, of):
    rng = np.random.default_rng(0)
    watched = Drift(kept(rng))
    watched.add(["a"] * 500, *normals(rng, 500, **moved))
    found = watched.psi()["a"]
    other = {"energy": "prototypes", "prototypes": "energy"}[of]
    assert found[of].value > found[of].bound
    assert found[other].value < found[other].bound


@pytest.mark.parametrize("alike", [1, 20])
def test_the_bounds_are_what_their_own_normals_rarely_exceed(alike):
    """Oracle: simulation. Patches of one image that are alike (each prototype `alike` times) make
    usage vary more from image to image, and its bound must follow."""

    def draw(count):
        energy, winners = normals(rng, count)
        return energy, winners[:, : 49 // alike + 1].repeat(alike, axis=1)[:, :49]

    rng = np.random.default_rng(1)
    exceeded = {"energy": 0, "prototypes": 0}
    for _ in range(20):
        watched = Drift(reference(*draw(300), [""] * 300, PROTOTYPES))
        for i in range(5):
            watched.add([f"{i}"] * 250, *draw(250))
        for found in watched.psi().values():
            for of, each in found.items():
                exceeded[of] += each.value > each.bound
    assert max(exceeded.values()) <= 2  # of 100
    bounds = reference(*draw(300), [""] * 300, PROTOTYPES)["default"]["bounds"]["prototypes"]
    assert bounds[0] > 1.5 * bounds[1]
    assert (bounds[0] > 0.1) == (alike > 1)


def test_between_its_two_ends_the_bound_goes_as_one_over_the_frames():
    rng = np.random.default_rng(0)
    made = kept(rng)
    at_enough, at_window = made["default"]["bounds"]["prototypes"]
    watched = Drift(made)
    watched.add(["a"] * ENOUGH, *normals(rng, ENOUGH))
    assert watched.psi()["a"]["prototypes"].bound == pytest.approx(at_enough)
    watched.add(["a"] * 100, *normals(rng, 100))
    between = at_window + (at_enough - at_window) * (1 / 300 - 1 / WINDOW) / (1 / 200 - 1 / WINDOW)
    assert watched.psi()["a"]["prototypes"].bound == pytest.approx(between)
    watched.add(["a"] * WINDOW, *normals(rng, WINDOW))
    assert watched.psi()["a"]["prototypes"].bound == pytest.approx(at_window)


def test_only_the_last_frames_count_and_few_say_nothing():
    rng = np.random.default_rng(0)
    watched = Drift(kept(rng))
    watched.add(["a"] * (ENOUGH - 1), *normals(rng, ENOUGH - 1, shift=5))
    assert watched.psi() == {}
    watched.add(["a"], *normals(rng, 1, shift=5))
    assert watched.psi()["a"]["energy"].value > 1
    watched.add(["a"] * WINDOW, *normals(rng, WINDOW))
    assert watched.psi()["a"]["energy"].value < 0.1


def test_a_camera_that_is_gone_is_not_shown_any_more_and_one_that_comes_back_is(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(drift.time, "monotonic", lambda: now_s[0])
    rng = np.random.default_rng(0)
    watched = Drift(kept(rng))
    watched.add(["gone"] * 300, *normals(rng, 300, shift=5))
    now_s[0] += 290
    watched.add(["here"] * 300, *normals(rng, 300))
    assert set(watched.psi(300)) == {"gone", "here"}
    now_s[0] += 20
    assert set(watched.psi(300)) == {"here"}
    watched.add(["gone"], *normals(rng, 1, shift=5))
    assert set(watched.psi(300)) == {"gone", "here"}


def test_a_camera_with_enough_normals_is_held_against_its_own():
    rng = np.random.default_rng(0)
    plain, odd = normals(rng, 200), normals(rng, 200, shift=4, first=20)
    energy, winners = (np.concatenate(both) for both in zip(plain, odd, strict=True))
    made = reference(energy, winners, ["plain"] * 200 + ["odd"] * 200, PROTOTYPES)
    watched = Drift(made)
    for camera in ("odd", "unknown"):
        watched.add([camera] * 400, *normals(rng, 400, shift=4, first=20))
    assert all(each.value < each.bound for each in watched.psi()["odd"].values())
    assert all(each.value > each.bound for each in watched.psi()["unknown"].values())


def test_too_few_normals_keep_nothing_and_nothing_is_followed():
    rng = np.random.default_rng(0)
    assert reference(*normals(rng, 39), [""] * 39, PROTOTYPES) == {}
    old = kept(rng)
    del old["default"]["bounds"]  # of a version that was made before there were any
    for nothing in (None, {}, old):
        watched = Drift(nothing)
        watched.add(["a"] * 300, *normals(rng, 300))
        assert watched.psi() == {}


def test_groups_share_the_mass_and_cover_every_prototype():
    rng = np.random.default_rng(0)
    made = kept(rng)
    assert len(made["groups"]) == PROTOTYPES
    usage = np.array(made["default"]["usage"])
    assert usage.sum() == 400 * PATCHES
    assert len(usage) == max(made["groups"]) + 1 <= drift.GROUPS
    assert usage.max() < 0.2 * usage.sum()
    assert sum(made["default"]["energy"]) == 400


def test_cameras_are_bounded(monkeypatch):
    monkeypatch.setattr(drift, "MAX_CAMERAS", 3)
    rng = np.random.default_rng(0)
    watched = Drift(kept(rng))
    for i in range(5):
        watched.add([f"c{i}"] * ENOUGH, *normals(rng, ENOUGH))
    assert set(watched.psi()) == {"c0", "c1", "c2"}


def test_bounds_of_many_normals_cost_no_more_and_are_about_the_same(monkeypatch):
    energy, winners = normals(np.random.default_rng(0), 6000)
    drawn = []
    real = np.random.default_rng

    class Counted:
        def __init__(self, seed):
            self._rng = real(seed)

        def multinomial(self, size, shares, draws):
            drawn.append(len(shares))
            return self._rng.multinomial(size, shares, draws)

    def bounds():
        return reference(energy, winners, [""] * 6000, PROTOTYPES)["default"]["bounds"]

    whole = drift.BOOTSTRAP_ROWS
    monkeypatch.setattr(drift, "BOOTSTRAP_ROWS", 6000)
    monkeypatch.setattr(drift, "CONVENTION", 0.0)
    monkeypatch.setattr(drift, "BOOTSTRAPS", 400)
    wanted = bounds()
    monkeypatch.setattr(drift, "BOOTSTRAP_ROWS", whole)
    monkeypatch.setattr(np.random, "default_rng", Counted)
    found = bounds()
    assert max(drawn) == whole
    for of, want in wanted.items():
        assert found[of] == pytest.approx(want, rel=0.25)
