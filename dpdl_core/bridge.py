"""Multi-Gaussian prototypes and the Schroedinger bridge to them, in exact closed form.

Knows tensors only. Used by losses.py and model.py.
Papers: DPDL (eqs. 3, 8-14); Light Schroedinger Bridge, arXiv:2310.01174v3 (eqs. 8-11).
Letters: B batch, C prototypes, D features. Natural logs; eps in squared feature units.

The prior is dX = sqrt(eps) dW. The potential itself is the prototype mixture,

    v(y) = sum_c b_c N(y; p_c, Gam_c),    S_c = Gam_c / (Gam_c + eps) in (0, 1),

not the phi1 = v exp(-|y|^2 / 2 eps) of eq. 10: so p_c is where mass lands, a plan's mean
m_c(x) = p_c + S_c (x - p_c) contracts to it, and the most probable prototype is the nearest
one in its own metric. With the codes in the means of phi1, as printed, the choice is a maximum
inner product and few prototypes are ever used.

Numerics. Everything is a cost of the form k'(x - p_c)^2 / 2 - eps log pi_c in units of eps, so
that nothing of order 1/eps is summed. Costs of all prototypes come from matrix products
(x^2 @ k', x @ (k p)'), never from a B x C x D tensor; that form cancels, so features are
centred first, and the winner's cost, which is what an energy is made of, is recomputed from the
difference x - p. See `_costs` for the bound this gives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

SHRINK_RANGE = (1e-3, 0.95)
"""Where `project_` keeps S: below, targets become points; above, the plan forgets prototypes."""
_CHUNK_COSTS = 1 << 21
"""Entries of the B x C cost matrix worked on at a time (8 MB): stays in a CPU's cache."""


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
    Features whose norm's square would overflow are drawn in along their ray to a norm whose
    costs are still finite: values saturate there, choices of prototype keep their direction.
    """

    def __init__(self, means: Tensor, variances: Tensor, log_weights: Tensor, eps: float) -> None:
        super().__init__()
        _check(means, variances, log_weights, eps)
        self.eps = float(eps)
        self.means = nn.Parameter(means.detach().clone())
        # S = sigmoid(log_ratio) exactly, for any positive variance: nothing is clamped here.
        self.log_ratio = nn.Parameter((variances.detach() / eps).log())
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
        x = self._cast(x)
        stiffness, log_pi = self._at(0.0, x.dtype)
        soft, _ = self._softmin(x, stiffness, log_pi)
        bounded = _bounded(x, self.eps, stiffness)
        return (bounded.square().sum(-1) / 2 - soft) / self.eps

    def log_potential(self, y: Tensor) -> Tensor:
        """log v(y) = log phi1(y) + |y|^2 / (2 eps), eq. 10, (B, D) -> (B,)."""
        y = self._cast(y)
        stiffness, log_pi = self._at(1.0, y.dtype)
        soft, _ = self._softmin(y, stiffness, log_pi)
        dims = y.shape[-1]
        return -soft / self.eps - dims / 2 * math.log(2 * math.pi * self.eps)

    def plan(self, x: Tensor) -> Plan:
        """pi(y given x), eq. 13, (B, D) -> log weights (B, C), means (B, C, D), variances (C, D).

        Writes the means out: for inspection and tests. Scoring uses `nearest` and `transport`.
        """
        x = self._cast(x)
        log_weights = self._log_weights(x, 0.0)
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
        x = self._cast(x)
        stiffness, log_pi = self._at(0.0, x.dtype)
        soft, winner = self._softmin(x, stiffness, log_pi.log_softmax(0))
        # A difference of rounded logs may fall below zero by an ulp; the energy may not.
        return soft.clamp_min(0.0), winner

    def transport(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean path of the most probable prototype, (B, D) -> y (B, D), c (B,).

        Differentiable in x, means and variances; the choice of c is not. No noise, so that
        what is built on it is deterministic.
        """
        _, winner = self.nearest(x)
        x = self._cast(x)
        means, shrink = self._rows(winner, x.dtype)
        return means + shrink * (x - means), winner

    def residual(self, x: Tensor, winner: Tensor) -> Tensor:
        """(m_c(x) - p_c) / sqrt(Gam_c) for the given prototypes, (B, D), (B,) -> (B, D).

        Eq. 22, centred: as printed, psi(x) - mu_c = S_c x holds nothing of the prototype.
        """
        x = self._cast(x)
        means, shrink = self._rows(winner, x.dtype)
        scale = self._pick((-self.log_ratio / 2).exp() / math.sqrt(self.eps), winner, x.dtype)
        return shrink * (x - means) * scale

    # The process, eq. 14 --------------------------------------------------------------------

    def sample(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One y from pi(y given x) for each x, (B, D) -> (B, D)."""
        return self._draw_end(self._cast(x), 0.0, generator)

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """g(x, t) = eps grad log sum_c b_c N(x; p_c, Gam_c + (1-t) eps), (B, D) -> (B, D).

        Eq. 14 mended: the density sum stands inside the log. t in [0, 1], a float or (B,);
        regular at both ends.
        """
        x = self._cast(x)
        if not isinstance(t, Tensor) or t.dim() == 0:
            return self._drift_at(x, float(t))
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}: give a float or one t per row of x")
        out = torch.empty_like(x)
        # The stiffness depends on t: one pass per distinct t instead of a B x C x D tensor.
        for moment in torch.unique(t).tolist():
            rows = t == moment
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
        path = [self._cast(x)]
        for step in range(steps):
            here, left = path[-1], (steps - step) / steps
            end = self._draw_end(here, step / steps, generator)
            share = 1 / (steps - step)  # h / (1 - t)
            noise = math.sqrt(self.eps * left * share * (1 - share))
            path.append(here + share * (end - here) + noise * _normal_like(here, generator))
        return torch.stack(path)

    def _drift_at(self, x: Tensor, t: float) -> Tensor:
        weights = self._log_weights(x, t).exp()
        stiffness, _ = self._at(t, x.dtype)
        means = self.means.to(x.dtype)
        center = means.detach().mean(0)
        pull = weights @ (stiffness * (means - center))
        return pull - (x - center) * (weights @ stiffness.expand_as(means))

    def _draw_end(self, x: Tensor, t: float, generator: torch.Generator | None) -> Tensor:
        """y ~ law of X_1 given X_t = x: N(x - (1-t) k_c (x - p_c), (1-t) eps (1 - (1-t) k_c))."""
        weights = self._log_weights(x, t).exp()
        chosen = torch.multinomial(_on(weights, generator), 1, generator=generator)
        chosen = chosen.squeeze(1).to(x.device)
        stiffness, _ = self._at(t, x.dtype)
        pull = (1 - t) * self._pick(stiffness, chosen, x.dtype)
        spread = ((1 - t) * self.eps * (1 - pull)).clamp_min(0).sqrt()
        means = self._pick(self.means, chosen, x.dtype)
        return means + (1 - pull) * (x - means) + spread * _normal_like(x, generator)

    # Costs ----------------------------------------------------------------------------------

    def _at(self, t: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Stiffness k = eps / (Gam + (1-t) eps), (C or 1, D), and log pi (C,), for time t.

        b_c N(x; p_c, Gam_c + (1-t) eps) = (2 pi eps)^(-D/2) pi_c exp(-k_c'(x-p_c)^2 / (2 eps)).
        At t = 0, k = 1 - S; at t = 1, k = eps / Gam.
        """
        log_ratio = self.log_ratio.to(dtype)
        if t <= 0:
            log_k = -nn.functional.softplus(log_ratio)
        elif t >= 1:
            log_k = -log_ratio
        else:
            log_k = -torch.logaddexp(log_ratio, log_ratio.new_tensor(math.log1p(-t)))
        return log_k.exp(), self.log_weights.to(dtype) + log_k.sum(-1) / 2

    def _costs(self, x: Tensor, stiffness: Tensor, log_pi: Tensor) -> tuple[Tensor, Tensor]:
        """Costs k_c'(x-p_c)^2 / 2 - eps log pi_c, (B, C), and the index of the least, (B,).

        The winner's cost is exact to a few ulp of itself. The others carry an error of some
        ulp of |x - center|^2: far below eps wherever they matter in practice, and where they
        would undercut the winner by rounding they are raised to it, so a soft-min is wrong by
        at most eps log C even then.
        """
        means = self.means.to(x.dtype)
        center = means.detach().mean(0)
        x, shifted = x - center, means - center
        weighted = stiffness * shifted
        offset = (weighted * shifted).sum(-1) / 2 - self.eps * log_pi
        costs = torch.addmm(offset, x, weighted.T, alpha=-1)
        costs = costs + x.square() @ (stiffness / 2).T
        winner = costs.detach().argmin(-1)
        gap = x - shifted[winner]
        tied = stiffness.shape[0] == 1
        best = (gap.square() * (stiffness if tied else stiffness[winner])).sum(-1) / 2
        best = (best - self.eps * log_pi[winner]).unsqueeze(-1)
        costs.scatter_(1, winner.unsqueeze(-1), best)
        with torch.no_grad():  # values only: gradients stay each prototype's own
            costs.clamp_(min=best)
        return costs, winner

    def _softmin(self, x: Tensor, stiffness: Tensor, log_pi: Tensor) -> tuple[Tensor, Tensor]:
        """-eps log sum_c exp(-cost_c / eps), (B,), and the most probable prototype, (B,)."""
        x = _bounded(x, self.eps, stiffness)
        parts = []
        with torch.autocast(x.device.type, enabled=False):
            for rows in torch.split(x, max(1, _CHUNK_COSTS // self.num_prototypes)):
                costs, winner = self._costs(rows, stiffness, log_pi)
                best = costs.gather(1, winner.unsqueeze(-1))
                crowd = ((best - costs) / self.eps).exp().sum(-1).log()
                parts.append((best.squeeze(-1) - self.eps * crowd, winner))
        soft, winners = zip(*parts, strict=True)
        return torch.cat(soft), torch.cat(winners)

    def _log_weights(self, x: Tensor, t: float) -> Tensor:
        """log w_c(x, t): the most probable prototype's share and the others', (B, D) -> (B, C)."""
        stiffness, log_pi = self._at(t, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            costs, winner = self._costs(_bounded(x, self.eps, stiffness), stiffness, log_pi)
            best = costs.gather(1, winner.unsqueeze(-1))
            return ((best - costs) / self.eps).log_softmax(-1)

    def _cast(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"features have shape {tuple(x.shape)}: want (B, {self.means.shape[1]}), "
                "one row per vector"
            )
        return x.to(
            torch.promote_types(torch.promote_types(x.dtype, self.means.dtype), torch.float32)
        )

    def _pick(self, table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a (C, D) table, or of a shared (1, D) one, which broadcasts."""
        return (table if table.shape[0] == 1 else table[rows]).to(dtype)

    def _rows(self, winner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shrink = self._pick(self.log_ratio, winner, dtype).sigmoid()
        return self._pick(self.means, winner, dtype), shrink

    def extra_repr(self) -> str:
        prototypes, dims = self.means.shape
        shared = ", shared variances" if self.log_ratio.shape[0] == 1 else ""
        return f"{prototypes} prototypes of {dims} features, eps={self.eps}{shared}"


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


def _bounded(x: Tensor, eps: float, stiffness: Tensor) -> Tensor:
    """x, or where its costs in nats, summed over a batch, could overflow, a shorter x.

    The bound is 1e-3 sqrt(max min(eps, 1) / max k) on the norm; in float32 with eps = 1e-4 and
    k <= 1 that is 1.8e14. Scaling by the largest coordinate cannot overflow itself.
    """
    limit = 1e-3 * math.sqrt(torch.finfo(x.dtype).max * min(eps, 1.0) / x.shape[-1])
    allowed = limit / stiffness.detach().amax().clamp_min(1.0).sqrt()
    peak = torch.linalg.vector_norm(x.detach(), ord=math.inf, dim=-1, keepdim=True)
    return x * (allowed / peak).clamp_max(1.0)


def _on(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """The tensor where the generator draws: a CPU generator gives a GPU the same numbers."""
    return tensor if generator is None else tensor.to(generator.device)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
