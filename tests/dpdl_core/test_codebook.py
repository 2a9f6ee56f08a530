"""k-means, matching, refresh and the moving codebook against scikit-learn, brute force and hand."""

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from dpdl_core import codebook
from dpdl_core.codebook import Codebook, EmaCodebook, assign, kmeans, refresh, reset_moments

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(num_blobs=6, per_blob=40, dims=4, *, spread=0.1, seed=0, dtype=torch.float64):
    """Well separated normal blobs, in order: (num_blobs * per_blob, dims) and their centers."""
    generator = seeded(seed)
    centers = 5 * torch.randn(num_blobs, dims, generator=generator, dtype=dtype)
    noise = torch.randn(num_blobs, per_blob, dims, generator=generator, dtype=dtype)
    return (centers[:, None] + spread * noise).flatten(0, 1), centers


# k-means ------------------------------------------------------------------------------------


@check
def lloyd_is_scikit_learns(module: ModuleType):
    """Same start, run to the end: same means, members and inertia."""
    x = torch.randn(500, 6, generator=seeded(), dtype=torch.float64)
    init = x[:20].clone()
    want = KMeans(20, init=init.numpy(), n_init=1, tol=0, max_iter=300).fit(x.numpy())
    got = module.kmeans(x, 20, init=init, iterations=300, tolerance=0)
    np.testing.assert_allclose(got.means.numpy(), want.cluster_centers_, atol=1e-12)
    assert got.counts.tolist() == np.bincount(want.labels_).tolist()
    assert got.inertia == pytest.approx(want.inertia_, rel=1e-12)


@check
def counts_and_variances_are_the_members(module: ModuleType):
    x, _ = blobs(spread=2.0)
    book = module.kmeans(x, 6, iterations=300, tolerance=0, generator=seeded())
    label = cdist(x, book.means).argmin(1)
    for code in range(6):
        members = x.numpy()[label == code]
        assert book.counts[code] == len(members)
        np.testing.assert_allclose(book.means[code], members.mean(0), atol=1e-12)
        np.testing.assert_allclose(book.variances[code], members.var(0), atol=1e-12)


@check
def assignment_is_to_the_nearest(module: ModuleType):
    """float32, a thousand spreads away from the origin, against float64 distances."""
    generator = seeded(1)
    codes = 1000 + torch.randn(50, 8, generator=generator)
    x = 1000 + torch.randn(400, 8, generator=generator)
    squared = cdist(x.double(), codes.double()) ** 2
    index, distance = module.assign(x, codes)
    np.testing.assert_allclose(squared[np.arange(400), index], squared.min(1), rtol=1e-4)
    np.testing.assert_allclose(distance, squared.min(1), rtol=1e-4)


@pytest.mark.parametrize("num_codes", [6, 20, 300])
def test_seeds_are_as_good_as_scikit_learns(num_codes):
    x, _ = blobs(30, 40, spread=0.5)
    want = KMeans(num_codes, n_init=3, random_state=0).fit(x.numpy()).inertia_
    assert kmeans(x, num_codes, restarts=3, generator=seeded()).inertia < 1.05 * want


def test_seeding_finds_every_blob():
    """Uniform seeds would miss some of 30 far blobs almost surely; D^2 seeds do not."""
    x, centers = blobs(30, 40)
    book = kmeans(x, 30, restarts=1, generator=seeded())
    assert cdist(centers, book.means).min(1).max() < 0.1


def test_the_same_generator_gives_the_same_codes():
    x, _ = blobs(spread=1.0)
    one, again, other = (kmeans(x, 9, restarts=1, generator=seeded(s)).means for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_no_code_ends_unused():
    """Starts far from all data, and copies of one start."""
    x, _ = blobs(5, 20)
    init = torch.full((40, 4), 1e3, dtype=torch.float64)
    assert kmeans(x, 40, init=init).counts.min() >= 1


def test_as_many_codes_as_vectors():
    x = torch.randn(12, 3, generator=seeded())
    book = kmeans(x.repeat(3, 1), 12, generator=seeded())
    assert book.inertia == pytest.approx(0, abs=1e-9)
    assert book.counts.tolist() == [3] * 12
    assert (book.shrunk_variances() > 0).all()


def test_more_codes_than_distinct_vectors_are_refused():
    x = torch.randn(12, 3, generator=seeded())
    x[0, 0], x[1] = 0.0, x[0]
    x[1, 0] = -0.0  # the same vector as x[0]
    with pytest.raises(ValueError, match="num_codes=12 but only 11 distinct vectors"):
        kmeans(x.repeat(4, 1), 12)


def test_a_refresh_on_fewer_distinct_vectors_than_prototypes_moves_none():
    x = torch.randn(5, 3, generator=seeded()).repeat(20, 1)
    means, variances = torch.randn(6, 3, generator=seeded()), torch.rand(6, 3, generator=seeded())
    weights = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).log()
    found = refresh(x, means, variances, weights + 3)
    assert torch.equal(found.means, means)
    assert torch.equal(found.variances, variances)
    torch.testing.assert_close(found.log_weights, weights)
    assert found.kept.all()
    assert not (found.replaced | found.revived).any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((5, 2), torch.nan), "NaN"),
        (torch.zeros(5, 2, dtype=torch.long), "float32 or 64"),
        (torch.zeros(5), "float32 or 64"),
    ],
)
def test_what_is_no_feature_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, 1)


def test_shrunk_variances_by_hand():
    """Counts 30 and 10, variances 1 and 5, pooled 2, prior 10: (30 + 20) / 40, (50 + 20) / 20."""
    book = Codebook(
        torch.tensor([[0.0], [1.0]]), torch.tensor([30, 10]), torch.tensor([[1.0], [5.0]]), 0.0
    )
    torch.testing.assert_close(book.shrunk_variances(10), torch.tensor([[1.25], [3.5]]))
    torch.testing.assert_close(book.log_weights.exp(), torch.tensor([31 / 42, 11 / 42]))


# Matching -----------------------------------------------------------------------------------


@check
def matching_keeps_most_company(module: ModuleType):
    """Against all 120 permutations of five codes."""
    generator = seeded(3)
    old = torch.randint(5, (200,), generator=generator)
    new = torch.where(torch.rand(200, generator=generator) < 0.5, (old * 2 + 1) % 5, old)
    found = module.match(old, new, 5)
    best = max(
        sum(int(((old == i) & (new == j)).sum()) for i, j in enumerate(order))
        for order in itertools.permutations(range(5))
    )
    assert int((found[old] == new).sum()) == best
    assert sorted(found.tolist()) == list(range(5))


# Refresh ------------------------------------------------------------------------------------


def state(x, num_codes=6):
    book = kmeans(x, num_codes, iterations=300, tolerance=0, restarts=5, generator=seeded())
    return book.means, book.shrunk_variances(), book.log_weights


@check
def refresh_on_the_same_data_changes_nothing(module: ModuleType):
    x, _ = blobs()
    means, variances, log_weights = state(x)
    got = module.refresh(x, means, variances, log_weights)
    assert got.kept.all()
    torch.testing.assert_close(got.means, means)
    torch.testing.assert_close(got.log_weights, log_weights)
    assert torch.equal(got.variances, variances)
    assert torch.equal(got.overlap, torch.ones_like(got.overlap))


@check
def refresh_blends_what_goes_on(module: ModuleType):
    """All moves by (1, 0, 0, 0): prototypes follow by the blend and keep number and variance."""
    x, _ = blobs()
    means, variances, log_weights = state(x)
    moved = x + torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    got = module.refresh(moved, means, variances, log_weights, blend=0.7)
    assert got.kept.all()
    want = means + torch.tensor([0.7, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(got.means, want)
    assert torch.equal(got.variances, variances)


@check
def refresh_tells_kept_replaced_and_revived(module: ModuleType):
    """Five blobs stay, the sixth is gone, a new one stands elsewhere, nearest to a prototype
    that lives on: the one that is gone is revived there, in full and with new variances, and
    the one that had the newcomers for a while is still itself; weights follow use."""
    x, _ = blobs(per_blob=40)
    means, variances, log_weights = state(x)
    gone = int(cdist(x[:1], means).argmin())
    far = 60 + 3 * torch.randn(30, 4, generator=seeded(9), dtype=torch.float64)
    assert gone not in assign(far, means)[0]
    got = module.refresh(torch.cat([x[40:], far]), means, variances, log_weights, usage_mix=0.5)
    assert got.replaced.nonzero().flatten().tolist() == [gone]
    assert torch.equal(got.kept, ~got.replaced)
    assert torch.equal(got.revived, got.replaced)
    torch.testing.assert_close(got.means[gone], far.mean(0))
    others = got.kept
    torch.testing.assert_close(got.means[others], means[others])
    assert torch.equal(got.variances[others], variances[others])
    assert got.variances[gone].mean() > 10 * variances[gone].mean()
    # Before 40 of 240 each; now 30 of 230 for the new one and 40 of 230 for the others.
    old, new, fresh = 41 / 246, 41 / 236, 31 / 236
    want = torch.full((6,), (old + new) / 2, dtype=torch.float64)
    want[gone] = fresh
    torch.testing.assert_close(got.log_weights.exp(), want / want.sum())


@check
def refresh_keeps_identities_under_large_drift(module: ModuleType):
    """A line of blobs drifts by more than their distance and the codes come back shuffled: who
    keeps company says who is who, where the nearest centroid would shift everyone by one."""
    line = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.0]])
    noise = torch.randn(6, 30, 2, generator=seeded(), dtype=torch.float64)
    x = (line[:, None] + 0.05 * noise).flatten(0, 1)
    drift, shuffled = torch.tensor([1.3, 0.0]), torch.tensor([4, 2, 0, 5, 1, 3])
    before, _ = module.assign(x, line)
    after, _ = module.assign(x + drift, line + drift)
    assert cdist(line + drift, line).argmin(1).tolist() == [1, 2, 3, 4, 5, 5]
    assert module.match(before, shuffled[after], 6).tolist() == shuffled.tolist()


def test_shared_variances_stay_shared():
    x, _ = blobs()
    means, variances, log_weights = state(x)
    shared = variances.mean(0, keepdim=True)
    assert torch.equal(refresh(x, means, shared, log_weights).variances, shared)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_only_replaced_rows_lose_their_moments(make):
    """The others' next step is as if nothing had happened."""
    parameters = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2)]
    optimizers = [make([parameter]) for parameter in parameters]
    replaced = torch.tensor([False, True, False, True])
    gradients = torch.randn(4, 4, 3, generator=seeded())
    for step, gradient in enumerate(gradients):
        if step == 3:
            reset_moments(optimizers[0], parameters[0], replaced)
            (memory,) = (
                v
                for k, v in optimizers[0].state[parameters[0]].items()
                if k in ("exp_avg", "momentum_buffer")
            )
            assert (memory[replaced] == 0).all()
            assert (memory[~replaced] != 0).all()
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    reset, untouched = parameters
    assert torch.equal(reset[~replaced], untouched[~replaced])
    assert (reset[replaced] != untouched[replaced]).all()


# Moving codebook ----------------------------------------------------------------------------


def book(means, counts):
    means = torch.tensor(means, dtype=torch.float64)
    return Codebook(means, torch.tensor(counts), torch.ones_like(means), 0.0)


@check
def moving_average_by_hand(module: ModuleType):
    """Sums start at e * n: code 0 has share 3/4 at 0, code 1 has 1/4 at 10. A batch of 4 puts
    two vectors, mean 2, on code 0 and two, mean 9, on code 1. With decay 0.9:
    share 0.9 * 3/4 + 0.1 * 1/2 = .725, mean (0 + .05 * 2) / .725;
    share 0.9 * 1/4 + 0.1 * 1/2 = .275, mean (.225 * 10 + .05 * 9) / .275."""
    ema = module.EmaCodebook(book([[0.0], [10.0]], [300, 100]), decay=0.9)
    replaced = ema.update(torch.tensor([[1.0], [3.0], [8.0], [10.0]], dtype=torch.float64))
    assert not replaced.any()
    torch.testing.assert_close(ema.share, torch.tensor([0.725, 0.275], dtype=torch.float64))
    want = torch.tensor([[0.1 / 0.725], [2.7 / 0.275]], dtype=torch.float64)
    torch.testing.assert_close(ema.means, want)


@check
def dead_code_takes_the_largest_energy(module: ModuleType):
    """C = 3 dies below 1/30; code 2 has 1/60 and no vector comes to it."""
    ema = module.EmaCodebook(book([[0.0], [10.0], [99.0]], [30, 29, 1]), decay=0.99)
    x = torch.tensor([[0.1], [9.0], [10.0], [-1.5]], dtype=torch.float64)
    assert ema.update(x, torch.tensor([0.0, 0.2, 0.7, 0.1])).tolist() == [False, False, True]
    assert ema.means[2].item() == 10.0
    assert ema.share[2].item() == pytest.approx(1 / 3)
    assert ema.update(x).tolist() == [False, False, False]  # count and sum were reset too


@check
def unused_code_stays_where_it_is(module: ModuleType):
    ema = module.EmaCodebook(book([[0.0], [10.0]], [1, 1]))
    ema.update(torch.tensor([[0.0]], dtype=torch.float64))
    assert ema.means[1].item() == 10.0


def test_moving_codebook_follows_its_data():
    x, _ = blobs()
    ema = EmaCodebook(kmeans(x, 6, generator=seeded()), decay=0.9)
    for _ in range(80):
        ema.update(x + 1.0)
    want = kmeans(x + 1.0, 6, generator=seeded()).means
    assert cdist(ema.means, want).min(1).max() < 1e-2
    assert ema.share.sum().item() == pytest.approx(1)


def test_death_does_not_depend_on_the_size_of_the_batch():
    x, _ = blobs()
    small, large = (EmaCodebook(kmeans(x, 6, generator=seeded())) for _ in range(2))
    small.update(x[::4])
    large.update(x[::4].repeat(8, 1))
    torch.testing.assert_close(small.share, large.share)
    torch.testing.assert_close(small.means, large.means)


def test_fewer_vectors_than_dead_codes():
    ema = EmaCodebook(book([[float(i)] for i in range(40)], [1000] + [0] * 39))
    replaced = ema.update(torch.tensor([[0.5], [0.2]], dtype=torch.float64))
    assert replaced.sum() == 2


# Planted faults -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_its_oracle(name):
    CHECKS[name](codebook)


FAULTS = {
    "farthest instead of nearest": (
        "addmm(half_norms, rows, codes.T, alpha=-1)",
        "addmm(half_norms, rows, codes.T)",
        ["assignment_is_to_the_nearest", "lloyd_is_scikit_learns"],
    ),
    "norm instead of half": (
        "half_norms = codes.square().sum(1) / 2",
        "half_norms = codes.square().sum(1)",
        ["assignment_is_to_the_nearest", "lloyd_is_scikit_learns"],
    ),
    "variance over all instead of members": (
        "variances = (all_sum(sums) / counts).to(x)",
        "variances = (all_sum(sums) / len(x)).to(x)",
        ["counts_and_variances_are_the_members"],
    ),
    "least company": (
        "maximize=True",
        "maximize=False",
        ["matching_keeps_most_company", "refresh_keeps_identities_under_large_drift"],
    ),
    "matching the wrong way round": (
        "_, new_of_old = linear_sum_assignment(together.cpu().numpy()",
        "_, new_of_old = linear_sum_assignment(together.cpu().numpy().T",
        ["matching_keeps_most_company", "refresh_keeps_identities_under_large_drift"],
    ),
    "blend reversed": (
        "means + blend * (found - means)",
        "found + blend * (means - found)",
        ["refresh_blends_what_goes_on"],
    ),
    "replaced ones blended too": (
        "means=torch.where(keep, means + blend * (found - means), found)",
        "means=means + blend * (found - means)",
        ["refresh_tells_kept_replaced_and_revived"],
    ),
    "variances of kept ones renewed": (
        "torch.where(keep, variances.detach().to(x), fresh)",
        "fresh",
        ["refresh_tells_kept_replaced_and_revived"],
    ),
    "variances of replaced ones kept": (
        "torch.where(keep, variances.detach().to(x), fresh)",
        "variances.detach().to(x)",
        ["refresh_tells_kept_replaced_and_revived"],
    ),
    "use not mixed": (
        "(1 - usage_mix) * before + usage_mix * used, used)",
        "usage_mix * before + usage_mix * before, used)",
        ["refresh_tells_kept_replaced_and_revived"],
    ),
    "revived is all replaced or none": (
        "(old_counts < dead_below)",
        "(old_counts > dead_below)",
        ["refresh_tells_kept_replaced_and_revived"],
    ),
    "decay on the wrong side": (
        "self.share.mul_(self.decay).add_((1 - self.decay) *",
        "self.share.mul_(1 - self.decay).add_(self.decay *",
        ["moving_average_by_hand"],
    ),
    "sums start at e": (
        "counts / counts.sum())",
        "torch.ones_like(counts))",
        ["moving_average_by_hand"],
    ),
    "mean of unused codes": (
        "torch.where(used.unsqueeze(1), moved, self.means)",
        "batch_means",
        ["unused_code_stays_where_it_is", "moving_average_by_hand"],
    ),
    "share of a replaced code not reset": (
        "self.share[indices] = 1 / len(self.share)",
        "pass",
        ["dead_code_takes_the_largest_energy"],
    ),
    "dead by count, not by share of even use": (
        "self.share < DEAD_SHARE / len(self.share)",
        "self.share < DEAD_SHARE / 100",
        ["dead_code_takes_the_largest_energy"],
    ),
    "smallest energy": (
        "top = values.topk(min(int(wanted), len(values)))",
        "top = values.topk(min(int(wanted), len(values)), largest=False)",
        ["dead_code_takes_the_largest_energy"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(plant, fault):
    old, new, finders = FAULTS[fault]
    faulty = plant(codebook, old, new)
    for finder in finders:
        with pytest.raises(AssertionError):
            CHECKS[finder](faulty)
