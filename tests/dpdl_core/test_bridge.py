"""The bridge against oracles that share neither its code nor its algebra, and planted faults.

Oracles start from the definition: phi1(y) = exp(-|y|^2 / 2 eps) v(y), plan proportional to
exp(<x,y>/eps) phi1(y), drift eps grad log of a heat integral. Integrals are Riemann sums over
grids wide and fine enough that their error (1e-12 and below for Gaussians) does not show.
"""

import itertools
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import kstest, multivariate_normal, norm

from dpdl_core import bridge

P = np.array([-0.8, 0.3, 1.1])
GAM = np.array([0.3, 0.02, 0.5])
B = np.array([0.2, 1.5, 0.7])  # do not sum to one
EPS = [0.05, 1.0, 10.0]
GRID = np.linspace(-30, 30, 20_001)
STEP = GRID[1] - GRID[0]
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def t64(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def one_dimensional(module: ModuleType, eps: float):
    return module.Bridge(t64(P)[:, None], t64(GAM)[:, None], t64(B).log(), eps)


def log_v(y):
    """log v(y) of the 1-D example, from SciPy's densities."""
    return logsumexp(
        [np.log(b) + norm.logpdf(y, p, g**0.5) for b, p, g in zip(B, P, GAM, strict=True)], axis=0
    )


def log_integrand(x, eps):
    """log exp(xy/eps) phi1(y) on the grid."""
    return x * GRID / eps - GRID**2 / (2 * eps) + log_v(GRID)


# Closed forms -------------------------------------------------------------------------------


@check
def log_normalizer_is_its_integral(module):
    for eps in EPS:
        for x in (-1.7, 0.0, 0.6, 3.0):
            want = logsumexp(log_integrand(x, eps)) + math.log(STEP)
            got = one_dimensional(module, eps).log_normalizer(t64([[x]])).item()
            assert got == pytest.approx(want, abs=1e-9)


@check
def log_normalizer_is_its_integral_in_2d(module):
    means, gam = np.array([[0.5, -1.0], [-0.4, 0.7]]), np.array([[0.2, 0.6], [0.9, 0.1]])
    eps, x, log_b = 0.4, np.array([0.3, -0.6]), np.array([-0.5, 0.4])
    axis = np.linspace(-6, 6, 401)
    y = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    log_mixture = logsumexp(
        [
            w + multivariate_normal(m, np.diag(g)).logpdf(y)
            for w, m, g in zip(log_b, means, gam, strict=True)
        ],
        axis=0,
    )
    log_values = y @ x / eps - (y**2).sum(-1) / (2 * eps) + log_mixture
    want = logsumexp(log_values) + 2 * math.log(axis[1] - axis[0])
    got = module.Bridge(t64(means), t64(gam), t64(log_b), eps).log_normalizer(t64(x[None]))
    assert got.item() == pytest.approx(want, abs=1e-9)


@check
def plan_is_the_normalised_integrand(module):
    for eps in EPS:
        x = 0.4
        log_weights, means, variances = one_dimensional(module, eps).plan(t64([[x]]))
        parts = zip(
            log_weights[0].tolist(), means[0, :, 0].tolist(), variances[:, 0].tolist(), strict=True
        )
        got = sum(math.exp(w) * norm.pdf(GRID, m, v**0.5) for w, m, v in parts)
        want = np.exp(log_integrand(x, eps) - logsumexp(log_integrand(x, eps))) / STEP
        np.testing.assert_allclose(got, want, atol=1e-9 * want.max())


@check
def log_density_is_the_normalised_integrand(module):
    for eps in EPS:
        x, where = -0.9, np.arange(9_000, 11_000, 100)
        want = log_integrand(x, eps) - logsumexp(log_integrand(x, eps)) - math.log(STEP)
        y = t64(GRID[where])[:, None]
        got = one_dimensional(module, eps).log_density(torch.full_like(y, x), y)
        np.testing.assert_allclose(got.detach().numpy(), want[where], atol=1e-8)


@check
def log_potential_is_the_mixture_density(module):
    y = np.linspace(-3, 3, 13)
    got = one_dimensional(module, 0.05).log_potential(t64(y)[:, None])
    np.testing.assert_allclose(got.detach().numpy(), log_v(y), atol=1e-12)


@check
def energy_is_the_density_below_its_peaks(module):
    """E = -eps log of sum b N(x; p, Gam + eps) over the same sum with every x on its p."""
    for eps in EPS:
        x = np.linspace(-3, 3, 13)
        widths = (GAM + eps) ** 0.5
        density = sum(b * norm.pdf(x, p, w) for b, p, w in zip(B, P, widths, strict=True))
        peak = sum(b * norm.pdf(0, 0, w) for b, w in zip(B, widths, strict=True))
        got = one_dimensional(module, eps).energy(t64(x)[:, None]).detach().numpy()
        np.testing.assert_allclose(got, -eps * np.log(density / peak), atol=1e-11)


@check
def energy_and_normalizer_differ_by_a_constant(module):
    x = t64(np.linspace(-2, 2, 9))[:, None]
    it = one_dimensional(module, 0.3)
    gap = it.energy(x) - (x.square().sum(1) / 2 - 0.3 * it.log_normalizer(x))
    assert gap.max().item() == pytest.approx(gap.min().item(), abs=1e-12)


@check
def transport_and_residual_by_hand(module):
    """Gam = 3, eps = 1: S = 3/4; from p = 2 to x = 6, y = 2 + 3 = 5, residual 3 / sqrt(3)."""
    it = module.Bridge(t64([[2.0], [-9.0]]), t64([[3.0], [3.0]]), t64([0.0, 0.0]), 1.0)
    y, chosen = it.transport(t64([[6.0]]))
    assert chosen.tolist() == [0]
    assert y.item() == pytest.approx(5.0)
    assert it.residual(t64([[6.0]]), chosen).item() == pytest.approx(3 / 3**0.5)


@check
def drift_is_the_gradient_of_the_heat_integral(module):
    """g = eps d/dx log of the integral of N(y; x, (1-t) eps) v(y), by autograd of the sum."""
    y, log_mixture = t64(GRID), t64(log_v(GRID))
    for eps in EPS:
        for t in (0.0, 0.35, 0.9):
            x = t64([-1.2, 0.1, 0.9]).requires_grad_()
            kernel = -((y - x[:, None]) ** 2) / (2 * (1 - t) * eps)
            log_integral = torch.logsumexp(kernel + log_mixture, 1)
            (want,) = torch.autograd.grad(eps * log_integral.sum(), x)
            got = one_dimensional(module, eps).drift(x.detach()[:, None], t).squeeze(1)
            torch.testing.assert_close(got.detach(), want, atol=1e-8, rtol=0)


@check
def drift_at_the_end_is_the_score_of_v(module):
    x, h = np.array([-1.2, 0.1, 0.9]), 1e-5
    want = 0.05 * (log_v(x + h) - log_v(x - h)) / (2 * h)
    got = one_dimensional(module, 0.05).drift(t64(x)[:, None], 1.0).squeeze(1)
    np.testing.assert_allclose(got.detach().numpy(), want, atol=1e-7)


# The process, by simulation; draws are seeded, so these cannot flake -------------------------


def law(x, eps):
    """CDF of the plan from the grid."""
    mass = np.exp(log_integrand(x, eps) - logsumexp(log_integrand(x, eps))).cumsum()
    return lambda y: np.interp(y, GRID, mass)


def draws(x, count=8_000):
    return torch.full((count, 1), x, dtype=torch.float64), torch.Generator().manual_seed(3)


def assert_law(sample, cdf):
    """Kolmogorov-Smirnov: 8,000 draws from a law with D > .022 fail."""
    assert kstest(sample.flatten().numpy(), cdf).pvalue > 1e-3


@check
@torch.no_grad()
def sample_has_the_plans_law(module):
    for eps in (0.05, 1.0):
        x, generator = draws(0.4)
        assert_law(one_dimensional(module, eps).sample(x, generator=generator), law(0.4, eps))


@check
@torch.no_grad()
def euler_maruyama_has_the_plans_law(module):
    eps = 0.6
    x, generator = draws(0.4)
    it = one_dimensional(module, eps)
    # Shorter steps towards the end, where the narrowest prototype pulls at 30 per unit of time.
    times = (1 - np.linspace(1, 0, 201) ** 2).tolist()
    for t, after in itertools.pairwise(times):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x + it.drift(x, t) * (after - t) + (eps * (after - t)) ** 0.5 * noise
    assert_law(x, law(0.4, eps))


@check
@torch.no_grad()
def trajectory_has_the_bridges_law_at_any_time(module):
    """X_t = (1-t) x + t y + sqrt(eps t (1-t)) xi with y from SciPy's inverse of the law."""
    eps = 0.6
    x, generator = draws(0.4)
    path = one_dimensional(module, eps).trajectory(x, 3, generator=generator)
    assert path.shape == (4, *x.shape)
    assert_law(path[3], law(0.4, eps))
    mass = np.exp(log_integrand(0.4, eps) - logsumexp(log_integrand(0.4, eps))).cumsum()
    rng = np.random.default_rng(0)
    y = np.interp(rng.uniform(size=8_000), mass, GRID)
    for step in (1, 2):
        t = step / 3
        want = (1 - t) * 0.4 + t * y + (eps * t * (1 - t)) ** 0.5 * rng.normal(size=len(y))
        assert kstest(path[step].flatten().numpy(), want).pvalue > 1e-3


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_its_oracle(name):
    CHECKS[name](bridge)


# Planted faults -----------------------------------------------------------------------------

FAULTS = {
    "1/eps missing in the normaliser": (
        "x.square().sum(-1) / (2 * self.eps) - soft",
        "x.square().sum(-1) / 2 - soft",
        ["log_normalizer_is_its_integral", "energy_and_normalizer_differ_by_a_constant"],
    ),
    "sign of the energy in the normaliser": (
        "/ (2 * self.eps) - soft + form.log_mass",
        "/ (2 * self.eps) + soft + form.log_mass",
        ["log_normalizer_is_its_integral_in_2d"],
    ),
    "constant of the normaliser lost": (
        "- soft + form.log_mass\n\n    def log_potential",
        "- soft\n\n    def log_potential",
        ["log_normalizer_is_its_integral"],
    ),
    "half of the log-determinant": (
        "log_rate.sum(-1, dtype=torch.float64) / 2",
        "log_rate.sum(-1, dtype=torch.float64)",
        [
            "log_normalizer_is_its_integral",
            "plan_is_the_normalised_integrand",
            "energy_is_the_density_below_its_peaks",
        ],
    ),
    "factor 2 in the winner's cost": (
        "_rows(form.stiffness, winner)).sum(1) / 2",
        "_rows(form.stiffness, winner)).sum(1)",
        ["energy_is_the_density_below_its_peaks", "plan_is_the_normalised_integrand"],
    ),
    "factor 2 in the others' cost": (
        "squares = self.stiffness / 2",
        "squares = self.stiffness",
        ["log_normalizer_is_its_integral", "drift_is_the_gradient_of_the_heat_integral"],
    ),
    "1/eps missing in the stiffness": (
        "log_rate.exp() / self.eps,",
        "log_rate.exp(),",
        ["log_normalizer_is_its_integral", "plan_is_the_normalised_integrand"],
    ),
    "eps missing in the energy": (
        "return self.eps * soft.clamp_min(0.0), winner",
        "return soft.clamp_min(0.0), winner",
        ["energy_is_the_density_below_its_peaks"],
    ),
    "1 - S for S": (
        "log_rate = -nn.functional.softplus(log_ratio)",
        "log_rate = -nn.functional.softplus(-log_ratio)",
        ["log_normalizer_is_its_integral", "plan_is_the_normalised_integrand"],
    ),
    "time reversed in the stiffness": (
        "log_ratio.new_tensor(math.log1p(-t))",
        "log_ratio.new_tensor(math.log(t))",
        ["drift_is_the_gradient_of_the_heat_integral", "euler_maruyama_has_the_plans_law"],
    ),
    "time reversed in what is kept": (
        "- math.log1p(-t)).sigmoid()",
        "+ math.log1p(-t)).sigmoid()",
        ["trajectory_has_the_bridges_law_at_any_time"],
    ),
    "variance for S at the end": (
        "log_rate = -log_ratio",
        "log_rate = log_ratio",
        ["drift_at_the_end_is_the_score_of_v", "log_potential_is_the_mixture_density"],
    ),
    "sign of the drift's pull": (
        "weights @ (rate * form.points) - (x - form.center)",
        "weights @ (rate * form.points) + (x - form.center)",
        ["drift_is_the_gradient_of_the_heat_integral", "euler_maruyama_has_the_plans_law"],
    ),
    "drift without its center": (
        "- (x - form.center) * (weights @ rate)",
        "- x * (weights @ rate)",
        ["drift_is_the_gradient_of_the_heat_integral"],
    ),
    "variance of the plan without eps": (
        "self.eps * shrink)",
        "shrink)",
        ["plan_is_the_normalised_integrand"],
    ),
    "expansion for contraction": (
        "means + kept * (x - means)",
        "means + (1 - kept) * (x - means)",
        ["sample_has_the_plans_law", "trajectory_has_the_bridges_law_at_any_time"],
    ),
    "noise without its root": (
        "(1 - t) * self.eps * kept).sqrt()",
        "(1 - t) * self.eps * kept)",
        ["sample_has_the_plans_law"],
    ),
    "path noise of the free motion": (
        "math.sqrt(self.eps * left * share * (1 - share))",
        "math.sqrt(self.eps * left * share)",
        ["trajectory_has_the_bridges_law_at_any_time"],
    ),
    "step from the whole time": (
        "share = 1 / (steps - step)",
        "share = 1 / steps",
        ["trajectory_has_the_bridges_law_at_any_time"],
    ),
    "transport to the code itself": (
        "return means + shrink * (x - means), winner",
        "return means, winner",
        ["transport_and_residual_by_hand"],
    ),
    "residual as printed": (
        "shrink * (x - means) / deviation",
        "shrink * x / deviation",
        ["transport_and_residual_by_hand"],
    ),
    "residual over the variance": (
        "(self.log_ratio / 2).exp()",
        "self.log_ratio.exp()",
        ["transport_and_residual_by_hand"],
    ),
    "density without its distance": (
        "self.log_potential(y) - far",
        "self.log_potential(y) + far",
        ["log_density_is_the_normalised_integrand"],
    ),
    "mixture density in D = 0": (
        "- y.shape[1] / 2 * math.log(2 * math.pi * self.eps)",
        "",
        ["log_potential_is_the_mixture_density", "log_density_is_the_normalised_integrand"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(plant, fault):
    old, new, finders = FAULTS[fault]
    faulty = plant(bridge, old, new)
    for finder in finders:
        with pytest.raises(AssertionError):
            CHECKS[finder](faulty)
