"""The three heads on frozen maps: their features, their training, their values.

Knows maps, bridges and heads; nothing of images or files. Every rank trains the same heads on
the same bounded sample. Paper: DPDL section 4.4, eqs. 20-23.
Letters: B batch, C channels of the head map, D features of a patch, M anomalies, h w map sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl_core.config import (
    DpdlConfig,
    direction_spaces,
    patch_stages,
    quartered_stages,
    stage_numbers,
)
from dpdl_core.heads import AnomalyHead, NormalHead, ResidualHead, top_count, top_mean
from dpdl_core.losses import anomaly_head_loss, normal_head_loss, residual_head_loss
from dpdl_core.observe import Features
from dpdl_core.parts import Energies, PatchEnergy, pooled_width

_HIDDEN = 256
"""Hidden units of each network whose mean M_n is."""
_LOOK_EVERY = 5
"""Steps of the heads' training after which an image's most anomalous places are looked for again;
they hardly move, and looking is most of a step. The first steps from zero all look."""
_RIDGE = 0.05
"""Share of the mean variance that every direction of the head map's whitening is given."""


class Heads(nn.Module):
    """M_a and M_n on whitened maps of the last stages, M_r on residuals to patch prototypes.

    Whitening by the normals' patches is a fixed linear layer: with ten anomalies a head must not
    spend its few steps on the features' scales.
    """

    center: Tensor
    whitener: Tensor

    def __init__(self, stages: list[int], channels: int, patch_dims: int, networks: int) -> None:
        super().__init__()
        self.stages = stages
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("whitener", torch.eye(channels))
        self.anomaly = AnomalyHead(channels)
        self.normal = NormalHead(channels, _HIDDEN * networks)
        self.residual = ResidualHead(patch_dims)

    def join(self, maps: list[Tensor]) -> Tensor:
        """The head map (B, C, h, w): the last stages on the grid of the last."""
        return torch.cat(self._on_one_grid(maps), 1)

    def _on_one_grid(self, maps: list[Tensor]) -> list[Tensor]:
        side = maps[self.stages[-1]].shape[-1]
        own = [maps[s].float() for s in self.stages]
        return [m if m.shape[-1] == side else F.adaptive_avg_pool2d(m, side) for m in own]

    def whiten(self, joined: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape, zero mean and unit covariance over normals' places."""
        weight = self.whitener[:, :, None, None]
        return F.conv2d(joined, weight, -(self.whitener @ self.center))

    def logits(self, white: Tensor, residuals: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, side, side) -> (B, 3): M_a, minus M_n, M_r; high for anomalies."""
        anomaly, residual = self.anomaly(white).logit, self.residual(residuals).logit
        return torch.stack([anomaly, -self.normal(white), residual], 1)

    def forward(
        self, maps: list[Tensor], energy: PatchEnergy, patches: Tensor, winners: Tensor
    ) -> Tensor:
        """Maps of all stages, patches (B, L, D) and their prototypes (B, L) -> logits (B, 3).

        What logits() gives in inference, with whitening, norm and residuals folded: M_a and M_r
        are linear at each place, and M_n sees a mean.
        """
        linear = self.anomaly.classify
        weight = linear.weight[0, :, 0, 0] @ self.whitener
        places = -(weight @ self.center)
        if linear.bias is not None:
            places = places + linear.bias
        means = []
        for m in self._on_one_grid(maps):
            own, weight = weight[: m.shape[1]], weight[m.shape[1] :]
            places = places + m.permute(0, 2, 3, 1) @ own
            means.append(m.mean((2, 3)))
        mean = (torch.cat(means, 1) - self.center) @ self.whitener.T
        weight, bias = self.residual.folded()
        residual = energy.residual_logits(patches, winners, weight) + bias
        residual = top_mean(residual, self.residual.head.share)
        anomaly = top_mean(places, self.anomaly.share)
        return torch.stack([anomaly, -self.normal.of_means(mean), residual], 1)


@dataclass(frozen=True)
class HeadSample:
    """What heads learn from: joined maps (n, C, h, w) and residuals (n, D, side, side)."""

    joined: Tensor
    residuals: Tensor

    def __len__(self) -> int:
        return len(self.joined)


@torch.no_grad()
def head_sample(heads: Heads, energies: Energies, features: Features) -> HeadSample:
    """The sample of images whose features are at hand, a slice at a time."""
    part = energies.first
    joined, residuals = [], []
    for _, maps in features.batches(64):
        joined.append(heads.join(maps))
        patches = part.space(maps)
        residuals.append(part.residuals(patches, part.nearest(patches)[1]))
    if not joined:
        return HeadSample(torch.empty(0), torch.empty(0))
    return HeadSample(torch.cat(joined), torch.cat(residuals))


def fit_heads(
    heads: Heads,
    normals: HeadSample,
    anomalies: HeadSample,
    *,
    config: DpdlConfig,
    seed: int,
) -> Heads:
    """Train the heads in place on normals and seen anomalies; without anomalies they stay blank.

    Every step sees all of them, normals and anomalies with half the weight each: with ten
    anomalies the draw of a batch would be most of what differs between two trainings. No pseudo
    anomalies: on frozen features cut-paste is learnt at once and says little of defects
    (docs/accuracy.md).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads.center.copy_(normals.joined.mean((0, 2, 3)))
        heads.whitener.copy_(_whitener(normals.joined, heads.center))
        if not len(anomalies):
            return _silenced(heads)
        _reset(heads, normals.residuals)
        _descend(heads, _Places.of(heads, normals, anomalies), config)
    return heads.eval()


@dataclass(frozen=True)
class _Places:
    """What every step looks at, of n normals and then M anomalies."""

    white: Tensor
    """(n + M, h * w, C) whitened head maps."""
    residuals: Tensor
    """(n + M, side * side, D) residuals as M_r's norm leaves them."""
    label: Tensor
    """(n + M,)."""
    weight: Tensor
    """(n + M,): a half over all normals, a half over all anomalies."""

    @classmethod
    @torch.no_grad()
    def of(cls, heads: Heads, normals: HeadSample, anomalies: HeadSample) -> _Places:
        samples = (normals, anomalies)
        label = torch.cat([torch.zeros(len(normals)), torch.ones(len(anomalies))])
        return cls(
            torch.cat([_rows(heads.whiten(s.joined)) for s in samples]),
            torch.cat([_rows(heads.residual.norm(s.residuals)) for s in samples]),
            label,
            torch.cat([torch.full((len(s),), 0.5 / len(s)) for s in samples]),
        )


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2).contiguous()


def _descend(heads: Heads, places: _Places, config: DpdlConfig) -> None:
    means = places.white.mean(1)
    trained = (heads.anomaly.classify, heads.residual.head.classify, heads.normal)
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.head_learning_rate, weight_decay=config.head_weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.head_iterations)
    label, weight, networks = places.label, places.weight, config.head_networks
    for step in range(config.head_iterations):
        if step < _LOOK_EVERY or step % _LOOK_EVERY == 0:
            best = _best(heads.anomaly, places.white)
            best_residuals = _best(heads.residual.head, places.residuals)
        loss = (
            anomaly_head_loss(_logit(heads.anomaly, best), label, weight)
            + normal_head_loss(heads.normal.of_means(means) / networks, label, weight)
            + residual_head_loss(_logit(heads.residual.head, best_residuals), label, weight)
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for parameter in _last(heads.normal).parameters():
            parameter.div_(networks)


@torch.no_grad()
def _best(head: AnomalyHead, places: Tensor) -> Tensor:
    """Mean (n, C) of the places (n, L, C) that the head finds most anomalous: its logit is
    linear, and there is no gradient through the others."""
    count = top_count(places.shape[1], head.share)
    top = (places @ head.classify.weight.view(-1)).topk(count, 1).indices
    return places.gather(1, top[..., None].expand(-1, -1, places.shape[2])).mean(1)


def _logit(head: AnomalyHead, best: Tensor) -> Tensor:
    logit: Tensor = head.classify(best[..., None, None]).flatten()
    return logit


def _whitener(joined: Tensor, center: Tensor) -> Tensor:
    """(C, C) symmetric, from the covariance over all places of the normals."""
    rows = joined.permute(0, 2, 3, 1).flatten(0, 2) - center
    covariance = (rows.T @ rows).double() / len(rows)
    values, axes = torch.linalg.eigh(covariance)
    gain = (values.clamp_min(0) + _RIDGE * values.mean() + 1e-12).rsqrt()
    whitener: Tensor = ((axes * gain) @ axes.T).float()
    return whitener


@torch.no_grad()
def _reset(heads: Heads, residuals: Tensor) -> None:
    """Ready to learn. What a logit adds up starts at zero: ten anomalies move few directions, and
    in all others the usual random start would stay, as noise of the logit's own size.

    M_r's norm is the normals' residuals' (n, D, side, side) own mean and deviation, for good.
    """
    for module in heads.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    norm = heads.residual.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(residuals.mean((0, 2, 3)))
    norm.running_var.copy_(residuals.var((0, 2, 3), correction=0))
    heads.residual.eval()
    for layer in (heads.anomaly.classify, heads.residual.head.classify, _last(heads.normal)):
        for parameter in layer.parameters():
            parameter.zero_()


def _last(head: NormalHead) -> nn.Linear:
    last = head.classify[-1]
    assert isinstance(last, nn.Linear)
    return last


@torch.no_grad()
def _silenced(heads: Heads) -> Heads:
    for parameter in heads.parameters():
        parameter.zero_()
    return heads.eval()


def blank_heads(config: DpdlConfig, channels: list[int]) -> Heads:
    """Heads of the right shapes for a trunk with these channels, that say nothing yet."""
    stages = stage_numbers(config.head_stages)
    if stages[-1] >= len(channels):
        raise ValueError(
            f"head_stages={config.head_stages}: this trunk has stages 1-{len(channels)}"
        )
    first = stage_numbers(patch_stages(config.patch_spaces[0]))
    patch_dims = min(config.patch_dims, sum(channels[s] for s in first))
    head_channels = sum(channels[s] for s in stages)
    return _silenced(Heads(stages, head_channels, patch_dims, config.head_networks))


class Parts(nn.Module):
    """Every part of a score: energies, directions of the seen anomalies, heads."""

    seen: Tensor

    def __init__(self, config: DpdlConfig, channels: list[int], energies: Energies) -> None:
        super().__init__()
        self.energies = energies
        self.heads = blank_heads(config, channels)
        # Directions towards the seen anomalies, as weights on pool()'s columns.
        dims = pooled_width(channels, quartered_stages(config))
        self.directions = [f"seen {space}" for space in direction_spaces(config)]
        self.register_buffer("seen", torch.zeros(len(self.directions), dims))

    @property
    def names(self) -> list[str]:
        """Names of the V parts: energies, directions, heads."""
        heads = ["head anomaly", "head normal", "head residual"]
        return [*self.energies.names, *self.directions, *heads]

    def forward(self, pooled: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P) and the maps -> raw values (B, V), patch energies (B, patch spaces, h, w), and
        the nearest prototypes (B, L) of the first patch space's L places."""
        values, grids, patches, winners = self.energies(pooled, maps)
        logits = self.heads(maps, self.energies.first, patches, winners)
        return torch.cat([values, pooled @ self.seen.T, logits], 1), grids, winners
