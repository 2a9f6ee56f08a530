"""The bridge's digits, gradients, invariants and limits.

The reference below is the mixture density written out in B x C x D and float64: slow, plain,
and without the centring, the products and the corrections of the code under test.
"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dpdl_core.bridge import Bridge


def reference_energy(x, means, variances, log_weights, eps):
    x, means, variances = x.double(), means.double(), variances.double()
    total = variances + eps
    norms = log_weights.double() - total.log().sum(-1) / 2
    logs = norms - ((x[:, None] - means) ** 2 / total).sum(-1) / 2
    return -eps * (logs.logsumexp(1) - norms.logsumexp(0))


def example(num_codes=7, dims=5, *, seed=0, dtype=torch.float64, shared=False):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_codes, dims, generator=generator, dtype=dtype)
    rows = 1 if shared else num_codes
    variances = 0.05 + torch.rand(rows, dims, generator=generator, dtype=dtype)
    log_weights = torch.randn(num_codes, generator=generator, dtype=dtype)
    x = torch.randn(11, dims, generator=generator, dtype=dtype)
    return means, variances, log_weights, x


# Accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0])
def test_float32_energy_near_a_prototype(distance, offset, shared, eps):
    """Within 1e-4 of the float64 value, or of eps where that is larger, even when features lie
    far from the origin and a thousand times closer to a prototype than to the others.
    The expanded product alone is off by 1e-3 of |x|^2 at the offset: 100 times the energy."""
    means, variances, log_weights, _ = example(200, 64, shared=shared)
    means = (means + offset).float()
    x = means[:50] + distance * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    want = reference_energy(x, means, variances.float(), log_weights.float(), eps)
    got = Bridge(means, variances.float(), log_weights.float(), eps).energy(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * eps)


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dims", [2, 512])
def test_float64_energy_equals_the_plain_one(eps, dims):
    means, variances, log_weights, x = example(dims=dims)
    want = reference_energy(x, means, variances, log_weights, eps)
    got = Bridge(means, variances, log_weights, eps).energy(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_shared_variances_are_equal_ones():
    means, variances, log_weights, x = example(shared=True)
    one = Bridge(means, variances, log_weights, 0.1)
    all_ = Bridge(means, variances.expand_as(means), log_weights, 0.1)
    assert one.log_ratio.shape == (1, 5)
    torch.testing.assert_close(one.energy(x), all_.energy(x))
    torch.testing.assert_close(one.log_normalizer(x), all_.log_normalizer(x))
    torch.testing.assert_close(one.drift(x, 0.4), all_.drift(x, 0.4))
    for mine, theirs in zip(one.plan(x), all_.plan(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(one.transport(x)[0], all_.transport(x)[0])


def test_variances_are_represented_exactly():
    means, variances, log_weights, _ = example()
    for scale in (1e-6, 1.0, 1e6):  # S from 1e-7 to 1 - 1e-7: nothing is clamped
        got = Bridge(means, scale * variances, log_weights, 0.1).variances
        torch.testing.assert_close(got, scale * variances, rtol=1e-13, atol=0)


# Extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-4, 1.0, 10.0])
@pytest.mark.parametrize(("dims", "num_codes"), [(2, 3), (100_352, 3)])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e18, 3e38])
def test_values_and_gradients_stay_finite(eps, dims, num_codes, size):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(num_codes, dims, generator=generator)
    it = Bridge(means, torch.full((num_codes, dims), 1e-3), torch.zeros(num_codes), eps)
    it.project_()
    x = (size * (2 * torch.rand(4, dims, generator=generator) - 1)).requires_grad_()
    calls = {
        "energy": it.energy,
        "log_normalizer": it.log_normalizer,
        "log_potential": it.log_potential,
        "log_density": lambda x: it.log_density(x, means[:1].expand_as(x)),
        "transport": lambda x: it.transport(x)[0],
        "residual": lambda x: it.residual(x, it.nearest(x)[1]),
        "drift": lambda x: it.drift(x, 0.5),
        "drift at the end": lambda x: it.drift(x, 1.0),
    }
    for name, call in calls.items():
        it.zero_grad()
        x.grad = None
        value = call(x)
        assert value.isfinite().all(), name
        (value / value.numel()).sum().backward()
        for tensor in (x, *it.parameters()):
            assert tensor.grad is None or tensor.grad.isfinite().all(), name


def test_energy_grows_with_distance_until_it_saturates():
    means, variances, log_weights, _ = example(dtype=torch.float32)
    it = Bridge(means, variances, log_weights, 1e-4)
    far = torch.tensor([1.0, 1e3, 1e6, 1e12, 1e20, 1e38])[:, None] * torch.ones(5)
    energy = it.energy(far)
    assert (energy.diff() >= 0).all()
    assert (energy[:4].diff() > 0).all()


def test_energy_is_never_negative_and_zero_on_a_lone_prototype():
    means, variances, log_weights, _ = example(50, 16, dtype=torch.float32)
    assert (Bridge(means, variances, log_weights, 10.0).energy(means) >= 0).all()
    lone = Bridge(means[:1], variances[:1], log_weights[:1], 0.1)
    assert lone.energy(means[:1]).item() == 0


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("shared", [False, True])
def test_the_hot_path_never_holds_every_difference(shared):
    """B = 300, C = 200, D = 100: nothing as large as B x C x D, in scoring or in training."""
    means, variances, log_weights, _ = example(200, 100, shared=shared)
    it = Bridge(means, variances, log_weights, 0.1)
    x = torch.randn(300, 100, dtype=torch.float64, requires_grad=True)
    with LargestTensor() as seen:
        y, _ = it.transport(x)
        (it.energy(x) - it.log_density(x, y) + it.log_normalizer(x)).sum().backward()
        it.sample(x)
        it.drift(x, 0.5)
    assert 0 < seen.numel <= max(300 * 200, 300 * 2 * 100, 200 * 2 * 100)


def test_autocast_does_not_reach_the_costs():
    means, variances, log_weights, x = example(dtype=torch.float32)
    it = Bridge(means, variances, log_weights, 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = it.energy(x)
        weights = it.plan(x).log_weights
    assert torch.equal(inside, it.energy(x))
    assert torch.equal(weights, it.plan(x).log_weights)


def test_half_features_are_scored_in_float32_and_double_ones_in_float64():
    means, variances, log_weights, x = example(dtype=torch.float32)
    it = Bridge(means, variances, log_weights, 0.1)
    assert it.energy(x.bfloat16()).dtype == torch.float32
    assert it.energy(x.double()).dtype == torch.float64
    want = reference_energy(x, means, variances, log_weights, 0.1)
    torch.testing.assert_close(it.energy(x.double()), want, rtol=1e-6, atol=0)


# Gradients ----------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "log_normalizer": lambda it, x: it.log_normalizer(x),
    "log_potential": lambda it, x: it.log_potential(x),
    "log_density": lambda it, x: it.log_density(x, x.flip(0)),
    "energy": lambda it, x: it.energy(x),
    "transport": lambda it, x: it.transport(x)[0],
    "residual": lambda it, x: it.residual(x, it.nearest(x)[1]),
    "drift": lambda it, x: it.drift(x, torch.linspace(0, 1, len(x))),
    "plan": lambda it, x: it.plan(x).log_weights,
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_by_finite_differences(name, shared):
    means, variances, log_weights, x = example(3, 2, shared=shared)
    it = Bridge(means, variances, log_weights, 0.3)

    def value(x, means, log_ratio, log_weights):
        parameters = {"means": means, "log_ratio": log_ratio, "log_weights": log_weights}
        return torch.func.functional_call(_Call(it, name), parameters, (x,))

    inputs = (x[:3], it.means, it.log_ratio, it.log_weights)
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(value, inputs)


class _Call(torch.nn.Module):
    """A Bridge whose forward is one of its methods, for functional_call."""

    def __init__(self, it, name):
        super().__init__()
        self.it, self.name = it, name
        self.means, self.log_ratio, self.log_weights = it.parameters()

    def forward(self, x):
        bridge = object.__new__(Bridge)
        bridge.__dict__ = dict(self.it.__dict__)
        bridge._parameters = dict(self._parameters)
        return DIFFERENTIABLE[self.name](bridge, x)


def test_coinciding_prototypes_share_the_gradient():
    """Two copies of one prototype must be pulled alike, whichever wins by rounding."""
    means = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-3.0, 0.0]])
    it = Bridge(means, torch.ones(3, 2), torch.zeros(3), 0.1)
    it.energy(torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).sum().backward()
    torch.testing.assert_close(it.means.grad[0], it.means.grad[1], rtol=1e-4, atol=1e-5)


# Invariants and limits ----------------------------------------------------------------------


def test_order_of_the_prototypes_does_not_matter():
    means, variances, log_weights, x = example()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    it = Bridge(means, variances, log_weights, 0.1)
    other = Bridge(means[order], variances[order], log_weights[order], 0.1)
    torch.testing.assert_close(it.energy(x), other.energy(x))
    torch.testing.assert_close(it.drift(x, 0.3), other.drift(x, 0.3))
    y, chosen = it.transport(x)
    moved, moved_chosen = other.transport(x)
    torch.testing.assert_close(y, moved)
    assert torch.equal(chosen, order[moved_chosen])


def test_one_by_one_or_together():
    """Batch 1, 64 and several chunks score alike to float32 rounding."""
    means, variances, log_weights, _ = example(600, 24, dtype=torch.float32)
    it = Bridge(means, variances, log_weights, 1e-2)
    x = torch.randn(1100, 24, generator=torch.Generator().manual_seed(2))
    together = it.energy(x)
    torch.testing.assert_close(
        torch.cat([it.energy(row) for row in x[:64].split(1)]), together[:64], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(it.energy(x[:64]), together[:64], rtol=1e-5, atol=1e-6)


def test_moving_everything_moves_nothing():
    means, variances, log_weights, x = example()
    it = Bridge(means, variances, log_weights, 0.1)
    moved = Bridge(means + 3.0, variances, log_weights, 0.1)
    torch.testing.assert_close(it.energy(x), moved.energy(x + 3.0))
    torch.testing.assert_close(it.drift(x, 0.7), moved.drift(x + 3.0, 0.7))


def test_total_weight_enters_the_normaliser_only():
    means, variances, log_weights, x = example()
    it = Bridge(means, variances, log_weights, 0.1)
    heavier = Bridge(means, variances, log_weights + 2.0, 0.1)
    torch.testing.assert_close(heavier.energy(x), it.energy(x))
    torch.testing.assert_close(heavier.log_density(x, x.flip(0)), it.log_density(x, x.flip(0)))
    torch.testing.assert_close(heavier.log_normalizer(x), it.log_normalizer(x) + 2.0)


def test_limits_in_eps():
    """eps to 0 at fixed Gam: the plan stays at x. eps to infinity: it forgets x and is v."""
    means, variances, log_weights, x = example()
    still, _ = Bridge(means, variances, log_weights, 1e-9).transport(x)
    torch.testing.assert_close(still, x, atol=1e-6, rtol=0)
    wide = Bridge(means, variances, log_weights, 1e9)
    log_weights_given_x, plan_means, plan_variances = wide.plan(x)
    torch.testing.assert_close(
        log_weights_given_x, log_weights.log_softmax(0).expand(11, 7), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(plan_means, means.expand(11, 7, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan_variances, variances, atol=1e-6, rtol=0)


def test_drift_takes_a_time_for_each_row():
    means, variances, log_weights, x = example()
    it = Bridge(means, variances, log_weights, 0.1)
    t = torch.tensor([0.0, 0.2, 0.2, 1.0] * 3)[: len(x)]
    each = torch.cat([it.drift(row[None], float(moment)) for row, moment in zip(x, t, strict=True)])
    torch.testing.assert_close(it.drift(x, t), each)


def test_draws_repeat_with_their_generator():
    means, variances, log_weights, x = example()
    it = Bridge(means, variances, log_weights, 0.1)
    one = it.trajectory(x, 4, generator=torch.Generator().manual_seed(5))
    again = it.trajectory(x, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, again)


def test_projection_keeps_s_in_its_range():
    it = Bridge(torch.zeros(2, 2), torch.tensor([[1e-9, 1.0], [1e9, 0.5]]), torch.zeros(2), 1.0)
    it.project_()
    want = torch.tensor([[1e-3, 0.5], [0.95, 1 / 3]])
    torch.testing.assert_close(it.shrink.detach(), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variances": torch.zeros(7, 5)}, "above 0"),
        ({"variances": torch.ones(5)}, r"want \(7, 5\)"),
        ({"log_weights": torch.zeros(3)}, r"want \(7,\)"),
        ({"means": torch.full((7, 5), math.nan)}, "NaN"),
        ({"means": torch.zeros(7)}, r"want \(C, D\)"),
        ({"eps": 0.0}, "above 0"),
    ],
)
def test_what_is_no_mixture_is_refused(change, message):
    means, variances, log_weights, _ = example()
    given = {"means": means, "variances": variances, "log_weights": log_weights, "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        Bridge(**(given | change))


def test_what_is_no_batch_is_refused():
    it = Bridge(*example()[:3], 0.1)
    with pytest.raises(ValueError, match=r"want \(B, 5\)"):
        it.energy(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="leaves"):
        it.drift(torch.zeros(3, 5), 1.5)
    with pytest.raises(ValueError, match="one per row"):
        it.drift(torch.zeros(3, 5), torch.zeros(2))
    with pytest.raises(ValueError, match="at least 1"):
        it.trajectory(torch.zeros(3, 5), 0)


def test_training_it_fits_a_plan():
    """A check of the whole: on pairs (x, y) of a known plan, -log density falls to its own."""
    true = Bridge(*example(2, 2, seed=4)[:3], 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = true.sample(x, generator=generator)
        floor = -true.log_density(x, y).mean()
    it = Bridge(true.means + 0.5, torch.full((2, 2), 1.0), torch.zeros(2), 0.5).double()
    optimizer = torch.optim.Adam(it.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -it.log_density(x, y).mean()
        loss.backward()
        optimizer.step()
    assert np.isclose(loss.item(), floor.item(), atol=0.01)


def test_plan_weights_of_a_hundred_thousand_dimensions():
    """Prototypes of own variances, balanced so that every share counts. Oracle: float64 by hand."""
    dims, eps = 100_352, 0.1
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, dims, generator=generator) / math.sqrt(dims)
    variances = eps * (0.5 + torch.rand(6, dims, generator=generator))
    x = torch.zeros(1, dims)
    total = variances.double() + eps
    logs = -(total.log() + means.double().square() / total).sum(1) / 2
    bridge = Bridge(means, variances, -logs.float(), eps)  # about one sixth each
    want = (logs - logs.float().double()).softmax(0)
    got = bridge.plan(x).log_weights.exp()[0].double()
    torch.testing.assert_close(got, want, rtol=2e-4, atol=0)


def test_a_small_variance_is_drawn_as_it_is():
    generator = torch.Generator().manual_seed(0)
    bridge = Bridge(torch.zeros(1, 4), torch.full((1, 4), 1e-6), torch.zeros(1), eps=10.0)
    drawn = bridge.sample(torch.zeros(20_000, 4), generator=generator).detach()
    assert float(drawn.var()) == pytest.approx(1e-6, rel=0.03)
