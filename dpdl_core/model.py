"""DPDL: frozen or tuned trunk, prototypes reached by bridges, heads, and one calibrated score.

Knows tensors; made by fit.py, kept by artifact.py.
Paper: DPDL, eqs. 12-14, 20-24; what was mended is in bridge.py, losses.py and heads.py.
Letters: B batch, S image side, V parts, h w map sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl_core.config import DpdlConfig, direction_spaces, pooled_stages, quartered_stages
from dpdl_core.features import Trunk
from dpdl_core.learn import Parts
from dpdl_core.parts import Tails, evidence, pool


@dataclass(frozen=True)
class Scores:
    """What a model says of B images; float32, on the model's device."""

    score: Tensor
    """(B,) weighted sum of every part's log odds against normality; 0 for the most normal."""
    energy: Tensor
    """(B,) the share of the score that the bridges' energies have, without any head."""
    maps: Tensor
    """(B, h, w) heat map on the patch grid: 0 is as normal as the median normal patch."""
    parts: dict[str, Tensor]
    """(B,) -log tail probability of every part, before weights."""
    winners: Tensor
    """(B, L) nearest prototype of each patch in the first patch space; for drift.py."""


def part_groups(config: DpdlConfig) -> dict[str, list[str]]:
    """Names of the parts that a model of this config will have, by kind, in their order."""
    patches = [f"patch {space}" for space in config.patch_spaces]
    return {
        "prototypes": [*(f"pooled {space}" for space in config.pooled_spaces), *patches],
        "directions": [f"seen {space}" for space in direction_spaces(config)],
        "heads": ["head anomaly", "head normal", "head residual"],
    }


class Dpdl(nn.Module):
    """A fitted model. Make one with fit() or artifact.load(), not by hand."""

    weights: Tensor
    map_median: Tensor
    map_scale: Tensor
    energy_limit: Tensor

    def __init__(self, config: DpdlConfig, trunk: Trunk, parts: Parts) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.parts = parts
        self._pooled_stages = pooled_stages(config)
        self._quartered_stages = quartered_stages(config)
        self.tails = Tails(len(self.part_names))
        self.register_buffer("weights", torch.ones(len(self.part_names)))
        spaces = len(config.patch_spaces)
        self.register_buffer("map_median", torch.zeros(spaces))
        self.register_buffer("map_scale", torch.ones(spaces))
        # Scores.energy that one normal in two hundred exceeds when the model has not seen it.
        self.register_buffer("energy_limit", torch.zeros(()))

    @property
    def part_names(self) -> list[str]:
        """Names of the V parts; the energies come first."""
        return self.parts.names

    @torch.inference_mode()
    def score(self, images: Tensor) -> Scores:
        """uint8 (B, H, W, 3) RGB -> Scores. Any H and W: resized on the device when not S.

        Deterministic; a batch gives what its images give alone, to float tolerance. Raises
        ValueError for anything but uint8 RGB.
        """
        if images.dim() != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}: need uint8 (B, H, W, 3) RGB"
            )
        images = images.to(self.weights.device)
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            images = resize(images, size)
        maps = self.trunk(images)
        return self.judge(self.pool(maps), maps)

    def pool(self, maps: list[Tensor]) -> Tensor:
        """The trunk's maps -> (B, P), parts.pool() of the stages that this model looks at."""
        return pool(maps, self._pooled_stages, self._quartered_stages)

    def judge(self, pooled: Tensor, maps: list[Tensor]) -> Scores:
        """Scores of images whose features are at hand: pool()'s (B, P) and the trunk's maps."""
        values, grids, winners = self.parts(pooled, maps)
        tails = self.tails(values)
        weighted = self.weigh(tails)
        num_energies = len(self.parts.energies.names)
        heat = (grids - self.map_median[:, None, None]) / self.map_scale[:, None, None]
        return Scores(
            score=weighted.sum(1),
            energy=weighted[:, :num_energies].sum(1),
            maps=heat.mean(1).clamp_min(0),
            parts=dict(zip(self.part_names, tails.unbind(1), strict=True)),
            winners=winners,
        )

    def weigh(self, tails: Tensor) -> Tensor:
        """(B, V) -log tail probabilities -> every part's share of the score."""
        return evidence(tails, len(self.parts.energies.names)) * self.weights


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, size, size, 3), antialiased, without crop."""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
