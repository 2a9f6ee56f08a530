"""Multi-Gaussian prototypes and the Schroedinger bridge to them, in exact closed form.

Knows tensors only. Used by parts.py, estimate.py, losses.py and the tuning.
Papers: DPDL (eqs. 3, 8-14); Light Schroedinger Bridge, arXiv:2310.01174v3 (eqs. 8-11).
Letters: B batch, C prototypes, D features. Natural logs; eps in squared feature units.

The prior is dX = sqrt(eps) dW. The potential itself is the prototype mixture,

    v(y) = sum_c b_c N(y; p_c, Gam_c),    S_c = Gam_c / (Gam_c + eps) in (0, 1),

not the phi1 = v exp(-|y|^2 / 2 eps) of eq. 10: so p_c is where mass lands, a plan's mean
m_c(x) = p_c + S_c (x - p_c) contracts to it, and the most probable prototype is the nearest
one in its own metric. With the codes in the means of phi1, as printed, the choice is a maximum
inner product and few prototypes are ever used.

Numerics. All is made of costs k_c'(x - p_c)^2 / 2 - log pi_c. Those of all prototypes come from
one matrix product with (x, x^2), never from a B x C x D tensor; that form cancels, so features
are centred first, and the winner's cost, which is what an energy is made of, is computed anew
from the difference x - p. See `_costs` for the bound this gives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

SHRINK_RANGE = (1e-3, 0.95)
"""Where `project_` keeps S: below, targets become points; above, the plan forgets prototypes."""
_CHUNK_COSTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Entries of the B x C cost matrix in work at a time: 2 MB stay in a CPU's cache."""


class Plan(NamedTuple):
    """The conditional plan pi(y given x): a Gaussian mixture with diagonal covariances."""

    log_weights: Tensor
    """(B, C), sum to one under exp."""
    means: Tensor
    """(B, C, D)."""
    variances: Tensor
    """(C, D), the same for every x."""


class Bridge(nn.Module):
    """The bridge from features to v(y) = sum_c exp(log_weights_c) N(y; means_c, variances_c).

    means (C, D); variances (C, D), or (1, D) shared by all prototypes, which saves one of two
    matrix products and stays shared in training; log_weights (C,), taken as given: they need
    not sum to one. Energies, plans and losses do not see their sum, so no softmax is needed.

    Computes in float32 or wider, the wider of its parameters' and x's type, outside autocast.
    Finite features whose norm's square would overflow are drawn in along their ray to a norm whose
    costs are finite: values saturate there, choices keep their direction. Others give NaN.
    """

    def __init__(self, means: Tensor, variances: Tensor, log_weights: Tensor, eps: float) -> None:
        super().__init__()
        _check(means, variances, log_weights, eps)
        self.eps = float(eps)
        self.means = nn.Parameter(means.detach().clone())
        # S = sigmoid(log_ratio) exactly, for any positive variance: nothing is clamped here.
        self.log_ratio = nn.Parameter(variances.detach().log() - math.log(eps))
        self.log_weights = nn.Parameter(log_weights.detach().clone())

    @property
    def num_prototypes(self) -> int:
        return self.means.shape[0]

    @property
    def variances(self) -> Tensor:
        """Gam, (C, D)."""
        return (self.eps * self.log_ratio.exp()).expand_as(self.means)

    @property
    def shrink(self) -> Tensor:
        """S = Gam / (Gam + eps), (C, D): how much of x - p_c a plan keeps."""
        return self.log_ratio.sigmoid().expand_as(self.means)

    @torch.no_grad()
    def project_(self) -> None:
        """Bring S back into SHRINK_RANGE; call it after an optimiser's step.

        A projection, not a clamp in the forward pass, which would stop the gradient for good.
        """
        low, high = (math.log(s / (1 - s)) for s in SHRINK_RANGE)
        self.log_ratio.clamp_(low, high)

    # Eq. 12 and its kin ---------------------------------------------------------------------

    def log_normalizer(self, x: Tensor) -> Tensor:
        """log varpi(x) = log of the integral of exp(<x,y>/eps) phi1(y) dy, (B, D) -> (B,).

        Eq. 12 with the 1/eps it lacks; equals |x|^2 / (2 eps) + (D/2) log(2 pi eps)
        + log sum_c b_c N(x; p_c, Gam_c + eps), constants included.
        """
        x = self._admit(x)
        form = self._form(0.0, x.dtype)
        soft, _ = _softmin(x, form)
        return x.square().sum(-1) / (2 * self.eps) - soft + form.log_mass

    def log_potential(self, y: Tensor) -> Tensor:
        """log v(y) = log phi1(y) + |y|^2 / (2 eps), eq. 10, (B, D) -> (B,)."""
        y = self._admit(y)
        form = self._form(1.0, y.dtype)
        soft, _ = _softmin(y, form)
        return form.log_mass - soft - y.shape[1] / 2 * math.log(2 * math.pi * self.eps)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log pi(y given x), eq. 12, (B, D), (B, D) -> (B,): one y for each x.

        <x,y>/eps + log phi1(y) - log varpi(x); its terms of order |x|^2 / eps are combined to
        -|x - y|^2 / (2 eps) by hand, which loses no digits.
        """
        x, y = self._admit(x), self._admit(y)
        soft, _ = _softmin(x, form := self._form(0.0, x.dtype))
        far = (x - y).square().sum(1) / (2 * self.eps)
        return self.log_potential(y) - far + soft - form.log_mass

    def plan(self, x: Tensor) -> Plan:
        """pi(y given x), eq. 13, (B, D) -> log weights (B, C), means (B, C, D), variances (C, D).

        Writes the means out: for inspection and tests. Scoring uses `nearest` and `transport`.
        """
        x = self._admit(x)
        log_weights = _log_weights(x, self._form(0.0, x.dtype))
        shrink, means = self.shrink.to(x.dtype), self.means.to(x.dtype)
        return Plan(log_weights, means + shrink * (x[:, None] - means), self.eps * shrink)

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = soft-min over c of (x-p_c)'(1-S_c)(x-p_c)/2, (B, D) -> (B,), never negative.

        E(x) = |x|^2/2 - eps log varpi(x) + const, the constant eps log sum_c pi_c, so that E is
        a soft-min with weights that sum to one: zero on a lone prototype. Squared feature units.
        """
        return self.nearest(x)[0]

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy (B,) and most probable prototype c* (B,), from one pass over the prototypes."""
        x = self._admit(x)
        soft, winner = _softmin(x, self._form(0.0, x.dtype))
        # A difference of rounded logs may fall below zero by an ulp; the energy may not.
        return self.eps * soft.clamp_min(0.0), winner

    def transport(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean path of the most probable prototype, (B, D) -> y (B, D), c (B,).

        Differentiable in x, means and variances; the choice of c is not. No noise, so that
        what is built on it is deterministic.
        """
        x = self._admit(x)
        with torch.no_grad():
            _, winner = _softmin(x, self._form(0.0, x.dtype))
        means, shrink = self._chosen(winner, x.dtype)
        return means + shrink * (x - means), winner

    def residual(self, x: Tensor, winner: Tensor) -> Tensor:
        """(m_c(x) - p_c) / sqrt(Gam_c) for the given prototypes, (B, D), (B,) -> (B, D).

        Eq. 22, centred: as printed, psi(x) - mu_c = S_c x holds nothing of the prototype.
        """
        x = self._admit(x)
        means, shrink = self._chosen(winner, x.dtype)
        deviation = _rows((self.log_ratio / 2).exp(), winner).to(x.dtype) * math.sqrt(self.eps)
        return shrink * (x - means) / deviation

    # The process, eq. 14 --------------------------------------------------------------------

    def sample(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One y from pi(y given x) for each x, (B, D) -> (B, D)."""
        return self._draw_end(self._admit(x), 0.0, generator)

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """g(x, t) = eps grad log sum_c b_c N(x; p_c, Gam_c + (1-t) eps), (B, D) -> (B, D).

        Eq. 14 mended: the sum over prototypes stands inside the log. t in [0, 1], a float or
        (B,); regular at both ends.
        """
        x = self._admit(x, order=3)
        moments = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        if moments.dim() and moments.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(moments.shape)}: give a float or one per row")
        if not ((moments >= 0) & (moments <= 1)).all():
            raise ValueError("t leaves [0, 1]: the bridge starts at 0 and ends at 1")
        if not moments.dim():
            return self._drift_at(x, float(moments))
        # Stiffness depends on t: one pass per distinct t instead of a B x C x D tensor.
        out = torch.empty_like(x)
        for moment in torch.unique(moments).tolist():
            rows = moments == moment
            out[rows] = self._drift_at(x[rows], moment)
        return out

    def trajectory(
        self, x: Tensor, steps: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Paths of dX = g dt + sqrt(eps) dW from x, (B, D) -> (steps + 1, B, D).

        Exact in law at every time for any number of steps: given X_t, an end is drawn from the
        plan that is left and X_{t+h} from the Brownian bridge to it. Euler-Maruyama on g has
        the same law only for h far below S, the inverse of the stiffness near t = 1.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: need at least 1")
        path = [self._admit(x)]
        for step in range(steps):
            here, left = path[-1], (steps - step) / steps
            end = self._draw_end(here, step / steps, generator)
            share = 1 / (steps - step)  # h / (1 - t)
            noise = math.sqrt(self.eps * left * share * (1 - share))
            path.append(here + share * (end - here) + noise * _normal_like(here, generator))
        return torch.stack(path)

    def _drift_at(self, x: Tensor, t: float) -> Tensor:
        form = self._form(t, x.dtype)
        weights = _log_weights(x, form).exp()
        rate = self.eps * form.stiffness.expand_as(form.points)
        return weights @ (rate * form.points) - (x - form.center) * (weights @ rate)

    def _draw_end(self, x: Tensor, t: float, generator: torch.Generator | None) -> Tensor:
        """y ~ law of X_1 given X_t = x, t < 1: N(p_c + s_c (x - p_c), (1-t) eps s_c) with
        s_c = Gam_c / (Gam_c + (1-t) eps)."""
        weights = _log_weights(x, self._form(t, x.dtype)).exp()
        drawn = torch.multinomial(_on(weights, generator), 1, generator=generator)
        chosen = drawn.squeeze(1).to(x.device)
        # Not as 1 - (1-t) eps k_c, of which a small variance would leave no digit.
        kept = (_rows(self.log_ratio, chosen).to(x.dtype) - math.log1p(-t)).sigmoid()
        spread = ((1 - t) * self.eps * kept).sqrt()
        means = _rows(self.means, chosen).to(x.dtype)
        return means + kept * (x - means) + spread * _normal_like(x, generator)

    # Inside ---------------------------------------------------------------------------------

    def _form(self, t: float, dtype: torch.dtype) -> _Form:
        """The costs at time t: b_c N(x; p_c, Gam_c + (1-t) eps) in the terms of _Form.

        k_c = 1 / (Gam_c + (1-t) eps), so eps k = 1 - S at t = 0 and eps / Gam at t = 1, and
        log pi_c = log b_c + sum log(eps k_c) / 2; (2 pi eps)^(-D/2) is left out.
        """
        log_ratio, means = self.log_ratio.to(dtype), self.means.to(dtype)
        if t <= 0:
            log_rate = -nn.functional.softplus(log_ratio)
        elif t >= 1:
            log_rate = -log_ratio
        else:
            log_rate = -torch.logaddexp(log_ratio, log_ratio.new_tensor(math.log1p(-t)))
        # Of a hundred thousand dimensions the sum is of order 1e5, the differences of order 1.
        log_pi = self.log_weights.double() + log_rate.sum(-1, dtype=torch.float64) / 2
        center = means.detach().mean(0)
        return _Form(
            self.eps,
            center,
            means - center,
            log_rate.exp() / self.eps,
            log_pi.log_softmax(0).to(dtype),
            log_pi.logsumexp(0).to(dtype),
        )

    def _admit(self, x: Tensor, order: int = 2) -> Tensor:
        """x, checked, in the type computed in, and drawn in along its ray if it is too long.

        The bound keeps costs, |x|^2 / eps, and their gradients finite when summed over a batch
        (order 2), or a drift's gradient, which is of order |x|^3 / eps: in float32 with
        eps = 1e-4 norms up to 1.8e14 sqrt(Gam / eps) are left alone. Scaling by the largest
        coordinate cannot overflow itself.
        """
        if x.dim() != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"features have shape {tuple(x.shape)}: want (B, {self.means.shape[1]}), "
                "one row per vector"
            )
        wider = torch.promote_types(x.dtype, self.means.dtype)
        x = x.to(torch.promote_types(wider, torch.float32))
        limit = 1e-3 * (torch.finfo(x.dtype).max * min(self.eps, 1.0)) ** (1 / order)
        softest = self.log_ratio.detach().amin().clamp_max(0.0)  # log min(Gam / eps, 1)
        peak = torch.linalg.vector_norm(x.detach(), ord=math.inf, dim=1, keepdim=True)
        share = limit / math.sqrt(x.shape[1]) * (softest * (order - 1) / order).exp() / peak
        admitted: Tensor = x * share.clamp_max(1.0)
        return admitted

    def _chosen(self, winner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """p and S of the given prototypes."""
        shrink = _rows(self.log_ratio, winner).to(dtype).sigmoid()
        return _rows(self.means, winner).to(dtype), shrink

    def extra_repr(self) -> str:
        prototypes, dims = self.means.shape
        shared = ", shared variances" if self.log_ratio.shape[0] == 1 else ""
        return f"{prototypes} prototypes of {dims} features, eps={self.eps}{shared}"


class _Form(NamedTuple):
    """Costs in nats: k_c'(x - p_c)^2 / 2 - log pi_c, with sum_c pi_c = 1."""

    eps: float
    center: Tensor
    """(D,), the prototypes' mean: distances from it, not from the origin, lose digits."""
    points: Tensor
    """(C, D), p_c - center."""
    stiffness: Tensor
    """(C, D) or shared (1, D), k_c."""
    log_pi: Tensor
    """(C,)."""
    log_mass: Tensor
    """(), what normalising pi took away."""

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weights (L, C) and offset (C,): costs are linear in `lift(x)`."""
        weighted = self.stiffness * self.points
        offset = (weighted * self.points).sum(-1) / 2 - self.log_pi
        if self.stiffness.shape[0] == 1:
            squares = weighted.new_ones(len(weighted), 1)
        else:
            squares = self.stiffness / 2
        return torch.cat([-weighted, squares], 1).T, offset

    def lift(self, x: Tensor) -> Tensor:
        """(x, x^2), or with shared stiffness (x, k'x^2 / 2), for centred x: (B, L)."""
        shared = self.stiffness.shape[0] == 1
        squares = x.square() @ (self.stiffness / 2).T if shared else x.square()
        return torch.cat([x, squares], 1)


def _costs(
    x: Tensor, form: _Form, weights: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs (B, C), the least of each row (B, 1) and its index (B,), for centred x.

    The winner's cost is exact to a few ulp of itself. The others err by some ulp of
    k'(x - center)^2: nothing where they matter in practice. Where they would undercut the
    winner by rounding they are raised to it, so a soft-min errs by log C nats at most.
    """
    costs = torch.addmm(offset, form.lift(x), weights)
    winner = costs.detach().argmin(1)
    gap = x - form.points[winner]
    least = (gap.square() * _rows(form.stiffness, winner)).sum(1) / 2 - form.log_pi[winner]
    least = least.unsqueeze(1)
    costs.scatter_(1, winner.unsqueeze(1), least)
    with torch.no_grad():  # values only: the gradients stay each prototype's own
        costs.clamp_(min=least)
    return costs, least, winner


def _softmin(x: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
    """-log sum_c exp(-cost_c), (B,), and the most probable prototype, (B,)."""
    soft, winners = [], []
    with torch.autocast(x.device.type, enabled=False):
        weights, offset = form.linear()
        centred = x - form.center
        entries = _CHUNK_COSTS.get(x.device.type, 1 << 19)
        for rows in torch.split(centred, max(1, entries // len(offset))):
            costs, least, winner = _costs(rows, form, weights, offset)
            soft.append(least.squeeze(1) - (least - costs).exp().sum(1).log())
            winners.append(winner)
    return torch.cat(soft), torch.cat(winners)


def _log_weights(x: Tensor, form: _Form) -> Tensor:
    """log w_c(x), the prototypes' shares in the plan, (B, D) -> (B, C)."""
    with torch.autocast(x.device.type, enabled=False):
        costs, least, _ = _costs(x - form.center, form, *form.linear())
        return (least - costs).log_softmax(1)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a (C, D) table, or a shared (1, D) one as it is: it broadcasts."""
    return table if table.shape[0] == 1 else table[rows]


def _check(means: Tensor, variances: Tensor, log_weights: Tensor, eps: float) -> None:
    if means.dim() != 2 or 0 in means.shape:
        raise ValueError(f"means have shape {tuple(means.shape)}: want (C, D), at least (1, 1)")
    if variances.shape not in (means.shape, (1, means.shape[1])):
        raise ValueError(
            f"variances have shape {tuple(variances.shape)}: want {tuple(means.shape)}, "
            f"or (1, {means.shape[1]}) to share them"
        )
    if log_weights.shape != means.shape[:1]:
        raise ValueError(
            f"log_weights have shape {tuple(log_weights.shape)}: want ({means.shape[0]},)"
        )
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps}: want a finite number above 0")
    if not (means.isfinite().all() and log_weights.isfinite().all()):
        raise ValueError("means or log_weights hold NaN or infinity: want finite numbers")
    if not (variances.isfinite().all() and (variances > 0).all()):
        raise ValueError(
            f"variances reach {variances.min().item():g}: want finite numbers above 0. "
            "Codebook.shrunk_variances() gives such"
        )


def _on(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """The tensor where the generator draws: a CPU generator gives a GPU the same numbers."""
    return tensor if generator is None else tensor.to(generator.device)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
