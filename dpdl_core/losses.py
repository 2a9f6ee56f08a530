"""The objective of DPDL, one function per equation.

Knows tensors, Bridge and ranks. Used by tune.py and learn.py.
Paper: DPDL eqs. 16-23. Deviations are mended faults, each said where it is made.
Letters: B images or vectors, U unit features, D features. Means over the batch, natural logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from dpdl_core.bridge import Bridge
from dpdl_core.distributed import gather_rows, gather_with_grad

# Bridge, anchored: eqs. 16 and 17 as they must be -------------------------------------------


def targets(codes: Tensor, nearest: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    """y_i = e_k(i) + tau_k(i) * xi_i, detached: samples of a fixed target law p1, (B, D).

    codes (C, D) of the codebook, nearest (B,) the code of each normal vector, deviation (C, D) tau,
    noise (B, D) xi, standard normal. Eq. 16 takes the mixture's own means for samples of p1, and
    then nothing anchors the mixture; without noise the codes are points, and so become the
    prototypes.
    """
    return codes.detach()[nearest] + deviation.detach()[nearest] * noise


def target_deviation(bridge: Bridge) -> Tensor:
    """tau (C, D) with which the bridge's variances stay as they are: that of its own plan's ends.

    From normals within a cluster, of variance Gam about p, the plan ends with variance
    S^2 Gam + eps S. A target law of that variance is met as it is, so S moves as clusters do, and
    not to zero as towards points.
    """
    shrink = bridge.shrink.detach()
    return (shrink.square() * bridge.variances.detach() + bridge.eps * shrink).sqrt()


def transport_loss(bridge: Bridge, x: Tensor, y: Tensor) -> Tensor:
    """Eq. 16, anchored: eps * mean[log varpi(x) - log phi1(y)] - mean <x, y>, a scalar.

    That is -eps times the mean log plan density of y given x, and computed as such.
    x (B, D) normals, y (B, D) their targets; the mean is over all ranks' rows.
    """
    return -bridge.eps * gather_with_grad(bridge.log_density(x, y)).mean()


def margin_loss(energy: Tensor, margin: Tensor | float) -> Tensor:
    """Eq. 17, anchored: mean relu(margin - E), for energies (B,) of anomalies, a scalar.

    As printed, the negative of eq. 16: unbounded, and on features it pulls anomalies in.
    """
    return torch.relu(margin - energy).mean()


class RunningMargin(nn.Module):
    """m of eq. 17: a running quantile of the normals' energies plus a margin.

    The margin is `slack` times the distance from their median to that quantile, so that it
    has the energies' own scale. Collective: quantiles are taken over all ranks' normals.
    """

    quantiles: Tensor
    started: Tensor

    def __init__(self, quantile: float = 0.95, slack: float = 0.5, decay: float = 0.9) -> None:
        super().__init__()
        if not 0.5 <= quantile < 1:
            raise ValueError(f"quantile={quantile}: want one in [0.5, 1)")
        self.quantile, self.slack, self.decay = quantile, slack, decay
        self.register_buffer("quantiles", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def update(self, energy: Tensor) -> Tensor:
        """Take in a batch of normal energies (B,); returns the margin, a scalar."""
        everyone = gather_rows(energy.detach().to(self.quantiles))
        levels = self.quantiles.new_tensor([0.5, self.quantile])
        now = torch.quantile(everyone, levels)
        blended = self.decay * self.quantiles + (1 - self.decay) * now
        self.quantiles.copy_(torch.where(self.started, blended, now))
        self.started.fill_(True)
        return self.margin

    @property
    def margin(self) -> Tensor:
        """The present margin, a scalar; 0 before the first update."""
        median, high = self.quantiles
        margin: Tensor = high + self.slack * (high - median)
        return margin


# Bridge, literal: for the ablation only -----------------------------------------------------


def literal_normal_loss(bridge: Bridge, x: Tensor, bound: float = 10.0) -> Tensor:
    """Eq. 16 with only its formulas mended: mean log varpi(x) - mean_c log phi1(p_c), in units
    of eps, clamped to +-bound. Its minimum is not a bridge; expect it to diverge."""
    return _literal(bridge, x).clamp(-bound, bound)


def literal_anomaly_loss(bridge: Bridge, x: Tensor, bound: float = 10.0) -> Tensor:
    """Eq. 17 with only its formulas mended: the negative of eq. 16 on anomalies, clamped."""
    return (-_literal(bridge, x)).clamp(-bound, bound)


def _literal(bridge: Bridge, x: Tensor) -> Tensor:
    means = bridge.means
    log_phi1 = bridge.log_potential(means) - means.square().sum(1) / (2 * bridge.eps)
    return bridge.eps * (gather_with_grad(bridge.log_normalizer(x)).mean() - log_phi1.mean())


# Dispersion ---------------------------------------------------------------------------------


def dispersion_loss(features: Tensor, kappa: float = 10.0) -> Tensor:
    """Eqs. 18-19: mean_i log mean_{j != i} exp(kappa cos_ij), a scalar in [-kappa, kappa].

    features (U, D) pooled, of any norm; 0 for fewer than two. The normaliser F_D(kappa) of
    eq. 18 is a constant and left out.
    """
    count = len(features)
    if count < 2:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        unit = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
        cosines = unit @ unit.T
        itself = torch.eye(count, dtype=torch.bool, device=features.device)
        others = (kappa * cosines).masked_fill(itself, -math.inf)
        return (others.logsumexp(1) - math.log(count - 1)).mean()


# Heads --------------------------------------------------------------------------------------


# Means over the batch, or sums with the images' weights (B,) where those are given.


def anomaly_head_loss(logit: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 20: BCE of M_a's logit (B,), label 1 for anomalies. The logit is signed: with |.|,
    as in deviation losses, every normal would stay at P >= 1/2."""
    return _bce(logit, label, weight)


def normal_head_loss(logit: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 21, target mended to 1 - label: M_n says normal, and is subtracted in the score."""
    return _bce(logit, 1 - label.to(logit.dtype), weight)


def residual_head_loss(logit: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 22: BCE of M_r's logit (B,) on the residual to the prototype, label 1 for anomalies."""
    return _bce(logit, label, weight)


def _bce(logit: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    return binary_cross_entropy_with_logits(
        logit.float(), target.float(), weight, reduction="mean" if weight is None else "sum"
    )


# Sum ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of eq. 23, scalars."""

    anomaly_head: Tensor
    normal_head: Tensor
    residual_head: Tensor
    transport: Tensor
    margin: Tensor
    dispersion: Tensor

    def total(self, dispersion_weight: float = 0.01) -> Tensor:
        """Eq. 23; dispersion_weight is its lambda (0.01; 1 on the two smallest data sets)."""
        heads = self.anomaly_head + self.normal_head + self.residual_head
        return heads + self.transport + self.margin + dispersion_weight * self.dispersion
