"""The losses against the paper's and DRA's formulas worked by hand, and planted faults."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from dpdl_core import losses
from dpdl_core.bridge import Bridge
from dpdl_core.losses import (
    LossTerms,
    RunningMargin,
    dispersion_loss,
    target_deviation,
    targets,
)

CHECKS = {}
EPS = 0.4
P, GAM, B = [-1.0, 0.8], [0.3, 0.7], [0.6, 0.9]


def check(function):
    CHECKS[function.__name__] = function
    return function


def bridge():
    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731
    return Bridge(column(P), column(GAM), column(B)[:, 0].log(), EPS)


def phi1(y):
    mixture = sum(b * norm.pdf(y, p, g**0.5) for b, p, g in zip(B, P, GAM, strict=True))
    return mixture * math.exp(-(y**2) / (2 * EPS))


def log_varpi(x):
    return math.log(quad(lambda y: math.exp(x * y / EPS) * phi1(y), -12, 12, limit=200)[0])


# Bridge -------------------------------------------------------------------------------------


@check
def transport_is_equation_16_by_quadrature(module: ModuleType):
    """eps * mean[log varpi(x_i) - log phi1(y_i)] - mean <x_i, y_i>."""
    x, y = [-1.3, 0.2, 1.0], [-1.0, -1.0, 0.8]
    terms = [log_varpi(a) - math.log(phi1(b)) for a, b in zip(x, y, strict=True)]
    want = EPS * np.mean(terms) - np.mean(np.multiply(x, y))
    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731
    got = module.transport_loss(bridge(), column(x), column(y))
    assert got.item() == pytest.approx(want, abs=1e-9)


@check
def literal_losses_are_16_and_17_by_quadrature(module: ModuleType):
    x = [-1.3, 0.2, 1.0]
    want = EPS * (np.mean([log_varpi(a) for a in x]) - np.mean([math.log(phi1(p)) for p in P]))
    column = torch.tensor(x, dtype=torch.float64)[:, None]
    assert module.literal_normal_loss(bridge(), column).item() == pytest.approx(want, abs=1e-9)
    assert module.literal_anomaly_loss(bridge(), column).item() == pytest.approx(-want, abs=1e-9)
    assert module.literal_normal_loss(bridge(), column * 1e3).item() == 10.0
    assert module.literal_anomaly_loss(bridge(), column * 1e3, bound=7.0).item() == -7.0


@check
def margin_by_hand(module: ModuleType):
    """relu(2 - 0.5), relu(2 - 1.5), relu(2 - 9): mean of 1.5, 0.5, 0."""
    got = module.margin_loss(torch.tensor([0.5, 1.5, 9.0]), 2.0)
    assert got.item() == pytest.approx(2 / 3)


@check
def running_margin_by_hand(module: ModuleType):
    """Energies 0..100: median 50, 95th percentile 95, slack .5: 95 + .5 * 45. Then 100..200
    enters with 1 - decay = .25: median 75, 95th 120: 120 + .5 * 45."""
    margin = module.RunningMargin(slack=0.5, decay=0.75)
    assert margin.update(torch.arange(101.0)).item() == pytest.approx(117.5)
    assert margin.update(100 + torch.arange(101.0)).item() == pytest.approx(142.5)
    assert margin.margin.item() == pytest.approx(142.5)


@check
def pulling_normals_in_and_pushing_anomalies_out(module: ModuleType):
    """The signs that eqs. 16 and 17, as printed, get wrong on features: a step down the normal
    loss lowers a normal's energy; a step down the anomaly loss raises an anomaly's."""
    it = bridge()
    x = torch.tensor([[2.5]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.8]], dtype=torch.float64)
    (pull,) = torch.autograd.grad(module.transport_loss(it, x, y), x)
    assert it.energy(x - 0.01 * pull) < it.energy(x)
    (push,) = torch.autograd.grad(module.margin_loss(it.energy(x), 100.0), x)
    assert it.energy(x - 0.01 * push) > it.energy(x)


def test_transport_keeps_its_digits_at_the_papers_eps():
    """float32, unit vectors, eps = .001: the three terms are of order 500 nats, their sum is
    not; within 1e-4 of float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(32, 512, generator=generator), dim=1)
    x = torch.nn.functional.normalize(codes[:20] + 0.02 * torch.randn(20, 512), dim=1)
    it = Bridge(codes, torch.full((32, 512), 7.4e-4), torch.zeros(32), 1e-3)
    got = losses.transport_loss(it, x, codes[:20])
    want = losses.transport_loss(it.double(), x.double(), codes[:20].double())
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_targets_are_fixed_samples():
    codes = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    deviation = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    noise = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 10.0]])
    found = targets(codes, torch.tensor([1, 0, 1]), deviation, noise)
    torch.testing.assert_close(found, torch.tensor([[3.3, 3.6], [1.2, 2.0], [3.0, 8.0]]))
    assert not found.requires_grad


def _clusters(count, generator):
    """Normals about four codes far apart, of variance .7 eps and 2 eps by dimension."""
    eps = 0.01
    codes = 3 * torch.eye(4, 6, dtype=torch.float64)
    variances = torch.tensor([0.7, 2.0] * 3, dtype=torch.float64).expand(4, 6) * eps
    bridge = Bridge(codes, variances, torch.zeros(4, dtype=torch.float64), eps)
    code = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return bridge, codes, code, codes[code] + variances[code].sqrt() * noise


def test_targets_spread_as_the_plan_ends_from_normals():
    """Monte Carlo: x within a cluster, y drawn from the plan."""
    generator = torch.Generator().manual_seed(0)
    bridge, codes, code, x = _clusters(200_000, generator)
    ends = bridge.sample(x, generator=generator) - codes[code]
    for c in range(4):
        got = ends[code == c].var(0, correction=0)
        torch.testing.assert_close(
            got, target_deviation(bridge)[c].square().detach(), rtol=0.03, atol=0
        )


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_variances_stay_towards_spread_targets_and_vanish_towards_points(spread):
    generator = torch.Generator().manual_seed(0)
    bridge, codes, _, _ = _clusters(1, generator)
    deviation, start = spread * target_deviation(bridge), bridge.shrink.detach().clone()
    optimizer = torch.optim.Adam(bridge.parameters(), lr=0.01)
    for _ in range(600):
        _, _, code, x = _clusters(256, generator)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = losses.transport_loss(bridge, x, targets(codes, code, deviation, noise))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        bridge.project_()
    moved = bridge.shrink.detach() / start
    if spread:
        torch.testing.assert_close(moved, torch.ones_like(moved), rtol=0, atol=0.12)
    else:
        assert moved.max() < 0.4


def test_a_margin_is_kept_with_the_model():
    margin, other = RunningMargin(), RunningMargin()
    margin.update(torch.rand(50))
    other.load_state_dict(margin.state_dict())
    assert other.margin == margin.margin
    with pytest.raises(ValueError, match="quantile=95"):
        RunningMargin(quantile=95)


# Dispersion ---------------------------------------------------------------------------------


@check
def dispersion_by_loops(module: ModuleType):
    """Eq. 19 in plain loops, features of any norm."""
    x = np.random.default_rng(0).normal(size=(6, 4)) * 5
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = []
    for i in range(6):
        rows.append(np.mean([math.exp(10 * unit[i] @ unit[j]) for j in range(6) if j != i]))
    got = module.dispersion_loss(torch.from_numpy(x), kappa=10.0)
    assert got.item() == pytest.approx(np.mean(np.log(rows)), abs=1e-12)


def test_dispersion_of_one_is_nothing():
    alone = torch.randn(1, 4, requires_grad=True)
    loss = dispersion_loss(alone)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(alone.grad, torch.zeros(1, 4))


def test_dispersion_has_its_extremes():
    """kappa where all coincide; -kappa for an opposite pair; finite where exp would not be."""
    same = torch.ones(5, 3)
    assert dispersion_loss(same, 10.0).item() == pytest.approx(10)
    assert dispersion_loss(same, 1e4).item() == pytest.approx(1e4)
    assert dispersion_loss(torch.tensor([[1.0], [-1.0]]), 10.0).item() == pytest.approx(-10)


# Heads --------------------------------------------------------------------------------------

LOGITS, LABELS = torch.tensor([2.0, -1.0, -0.5]), torch.tensor([1, 0, 1])
SIGMOID = [1 / (1 + math.exp(-z)) for z in LOGITS.tolist()]


def cross_entropy(targets_):
    parts = zip(SIGMOID, targets_, strict=True)
    return -np.mean([math.log(s if target else 1 - s) for s, target in parts])


@check
def heads_are_cross_entropies(module: ModuleType):
    """M_a and M_r say anomaly, signed logits; M_n says normal: its target is 1 - y."""
    want = pytest.approx(cross_entropy([1, 0, 1]))
    assert module.anomaly_head_loss(LOGITS, LABELS).item() == want
    assert module.residual_head_loss(LOGITS, LABELS).item() == want
    assert module.normal_head_loss(LOGITS, LABELS).item() == pytest.approx(cross_entropy([0, 1, 0]))


@pytest.mark.parametrize("name", ["anomaly_head_loss", "normal_head_loss", "residual_head_loss"])
def test_a_weighted_head_loss_is_a_sum(name):
    """A weight of 2 is an image twice."""
    loss = getattr(losses, name)
    twice = torch.tensor([0, 1, 1, 2])
    weighted = loss(LOGITS, LABELS, torch.tensor([0.25, 0.5, 0.25]))
    torch.testing.assert_close(weighted, loss(LOGITS[twice], LABELS[twice]))


@check
def total_by_hand(module: ModuleType):
    names = ("anomaly_head", "normal_head", "residual_head", "transport", "margin", "dispersion")
    terms = {name: torch.tensor(10.0**i) for i, name in enumerate(names)}
    assert module.LossTerms(**terms).total(0.5).item() == pytest.approx(11_111 + 0.5 * 1e5)


def test_total_has_a_gradient_for_every_term():
    terms = {name: torch.ones((), requires_grad=True) for name in LossTerms.__dataclass_fields__}
    LossTerms(**terms).total(0.01).backward()
    grads = [term.grad.item() for term in terms.values()]
    assert grads == pytest.approx([1, 1, 1, 1, 1, 0.01])


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_its_oracle(name):
    CHECKS[name](losses)


FAULTS = {
    "sign of the transport": (
        "return -bridge.eps * gather_with_grad(bridge.log_density(x, y)).mean()",
        "return bridge.eps * gather_with_grad(bridge.log_density(x, y)).mean()",
        [
            "transport_is_equation_16_by_quadrature",
            "pulling_normals_in_and_pushing_anomalies_out",
        ],
    ),
    "eps missing in the transport": (
        "return -bridge.eps * gather_with_grad(bridge.log_density(x, y)).mean()",
        "return -gather_with_grad(bridge.log_density(x, y)).mean()",
        ["transport_is_equation_16_by_quadrature"],
    ),
    "hinge reversed": (
        "torch.relu(margin - energy)",
        "torch.relu(energy - margin)",
        ["margin_by_hand"],
    ),
    "decay on the wrong side": (
        "self.decay * self.quantiles + (1 - self.decay) * now",
        "(1 - self.decay) * self.quantiles + self.decay * now",
        ["running_margin_by_hand"],
    ),
    "margin below the quantile": (
        "high + self.slack * (high - median)",
        "high - self.slack * (high - median)",
        ["running_margin_by_hand"],
    ),
    "literal without 1/eps": (
        "means.square().sum(1) / (2 * bridge.eps)",
        "means.square().sum(1) / 2",
        ["literal_losses_are_16_and_17_by_quadrature"],
    ),
    "literal unclamped": (
        "return _literal(bridge, x).clamp(-bound, bound)",
        "return _literal(bridge, x)",
        ["literal_losses_are_16_and_17_by_quadrature"],
    ),
    "dispersion with itself": (
        "(kappa * cosines).masked_fill(itself, -math.inf)",
        "kappa * cosines",
        ["dispersion_by_loops"],
    ),
    "dispersion over U": ("math.log(count - 1)", "math.log(count)", ["dispersion_by_loops"]),
    "dispersion without kappa": ("(kappa * cosines)", "cosines", ["dispersion_by_loops"]),
    "M_n trained on y, as printed": (
        "_bce(logit, 1 - label.to(logit.dtype), weight)",
        "_bce(logit, label, weight)",
        ["heads_are_cross_entropies"],
    ),
    "lambda on the bridge": (
        "self.transport + self.margin + dispersion_weight * self.dispersion",
        "dispersion_weight * (self.transport + self.margin) + self.dispersion",
        ["total_by_hand"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(plant, fault):
    old, new, finders = FAULTS[fault]
    faulty = plant(losses, old, new)
    for finder in finders:
        with pytest.raises(AssertionError):
            CHECKS[finder](faulty)
