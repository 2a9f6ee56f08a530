"""What fine-tuning trains together, trunk, heads and prototypes, and its losses on a batch.

Knows the trunk, heads, bridge, losses and ranks. Used by tune.py.
Every figure of an image is gathered from all ranks before it enters a loss, and batch norms take
the whole batch's statistics, so the losses and their gradients are those of the whole batch.
Letters: B images of this rank, S image side, F channels of the last stage, C prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dpdl_core.bridge import Bridge
from dpdl_core.codebook import EmaCodebook, assign
from dpdl_core.config import DpdlConfig
from dpdl_core.distributed import gather_rows, gather_with_grad
from dpdl_core.features import Trunk
from dpdl_core.heads import AnomalyHead, NormalHead, ResidualHead, to_map, to_rows, top_mean
from dpdl_core.losses import (
    LossTerms,
    RunningMargin,
    anomaly_head_loss,
    dispersion_loss,
    literal_anomaly_loss,
    literal_normal_loss,
    margin_loss,
    normal_head_loss,
    residual_head_loss,
    target_deviation,
    targets,
    transport_loss,
)


class Step(NamedTuple):
    """What one batch gives, the same on every rank."""

    terms: LossTerms
    energy: Tensor
    """Mean energy of the normals, a scalar."""


class TuneNetwork(nn.Module):
    """Everything that a checkpoint must hold but the optimiser's memory."""

    deviation: Tensor

    def __init__(
        self, config: DpdlConfig, trunk: Trunk, bridge: Bridge, codebook: EmaCodebook
    ) -> None:
        super().__init__()
        channels = trunk.channels[-1]
        self.config = config
        self.trunk, self.bridge, self.codebook = trunk, bridge, codebook
        self.register_buffer("deviation", target_deviation(bridge))
        self.anomaly = AnomalyHead(channels)
        self.normal = NormalHead(channels)
        self.residual = ResidualHead(channels)
        self.margin = RunningMargin()

    def forward(self, images: Tensor, label: Tensor, seeds: Tensor) -> Step:
        """images (B, S, S, 3) in 0..255, label (B,) 1 for anomalies, seeds of the normals' noise
        in the loss, one each. Collective."""
        features = self.features(images)
        batch, _, height, width = features.shape
        rows = normalize(to_rows(features), dim=1)
        energy, winner = self.bridge.nearest(rows)
        residuals = to_map(self.bridge.residual(rows, winner), batch, height, width)
        normal = label == 0
        on_normal = normal.repeat_interleave(height * width)
        everyone = gather_rows(label)
        image_energy = gather_with_grad(top_mean(energy.view(batch, height, width)))
        self.margin.update(top_mean(energy.detach().view(batch, height, width))[normal])
        if self.config.literal_loss:
            transport = literal_normal_loss(self.bridge, rows[on_normal])
            margin = literal_anomaly_loss(self.bridge, rows[~on_normal])
        else:
            code, _ = assign(rows[on_normal].detach(), self.codebook.means)
            noise = _noise(seeds, height * width, rows)
            goal = targets(self.codebook.means, code, self.deviation, noise)
            transport = transport_loss(self.bridge, rows[on_normal], goal)
            margin = margin_loss(image_energy[everyone != 0], self.margin.margin)
        self.codebook.update(rows[on_normal], energy[on_normal])
        terms = LossTerms(
            anomaly_head=anomaly_head_loss(
                gather_with_grad(self.anomaly(features).logit), everyone
            ),
            normal_head=normal_head_loss(gather_with_grad(self.normal(features)), everyone),
            residual_head=residual_head_loss(
                gather_with_grad(self.residual(residuals).logit), everyone
            ),
            transport=transport,
            margin=margin,
            dispersion=dispersion_loss(gather_with_grad(features.mean((2, 3))), self.config.kappa),
        )
        return Step(terms, image_energy[everyone == 0].detach().mean())

    def features(self, images: Tensor) -> Tensor:
        return last_map(self.trunk, images)

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, S, 3) -> unit patches (B, h*w, F) and the images' energies (B,)."""
        features = self.features(images)
        batch, channels, height, width = features.shape
        rows = normalize(to_rows(features), dim=1)
        energy = self.bridge.energy(rows).view(batch, height, width)
        return rows.view(batch, height * width, channels), top_mean(energy)


def _noise(seeds: Tensor, places: int, like: Tensor) -> Tensor:
    """(n * places, F) standard normal, an image's by its own seed, whoever holds it."""
    generator = torch.Generator(like.device)
    shape, drawn = (places, like.shape[1]), [like.new_empty(0, like.shape[1])]
    for seed in seeds.tolist():
        drawn.append(torch.randn(shape, generator=generator.manual_seed(seed), device=like.device))
    return torch.cat(drawn)


def last_map(trunk: Trunk, images: Tensor) -> Tensor:
    """The last stage's map (B, F, h, w), of images (B, S, S, 3) in 0..255 on the trunk's device.

    In bfloat16 on an accelerator only: a CPU without it takes eight times as long. What follows,
    the bridge above all, is float32.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        last: Tensor = trunk(images)[-1]
    return last.float()
