"""How much each part is worth: cross-fitted values, cut-paste on held-out normals, weights.

Knows features and energies; nothing of files or the trunk's training.
Letters: K kept normals over all ranks, M seen anomalies, E energies, V parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.config import DpdlConfig
from dpdl_core.estimate import fit_energies
from dpdl_core.observe import Features, Normals, Spoil
from dpdl_core.parts import Energies, whitening

LEVELS = ((0.02, 0.15, 1.0), (0.005, 0.04, 0.6), (0.002, 0.01, 0.6))
"""Cut-paste from plain to faint: least and largest share of the image's area, and opacity."""


def make_spoilers(seed: int) -> list[Spoil]:
    """One cut-paste per level; what it does to an image depends on its number alone."""
    return [_Spoiler(level, seed) for level in range(len(LEVELS))]


@dataclass(frozen=True)
class _Spoiler:
    level: int
    seed: int

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        return torch.stack(
            [
                self._one(image, torch.Generator().manual_seed(self._seed_of(int(number))))
                for image, number in zip(images, numbers, strict=True)
            ]
        )

    def _seed_of(self, number: int) -> int:
        return (self.seed * 1_000_003 + number) * len(LEVELS) + self.level

    def _one(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One rectangle of an image (S, S, 3), its colours jittered, pasted elsewhere in it."""
        low, high, opacity = LEVELS[self.level]
        u = torch.rand(8, generator=generator).tolist()
        side = image.shape[0]
        area = (low + u[0] * (high - low)) * side**2
        aspect = math.exp((2 * u[1] - 1) * math.log(1 / 0.3))
        height = min(side - 1, max(2, round(math.sqrt(area * aspect))))
        width = min(side - 1, max(2, round(math.sqrt(area / aspect))))
        top, left = int(u[2] * (side - height)), int(u[3] * (side - width))
        to_top, to_left = int(u[4] * (side - height)), int(u[5] * (side - width))
        patch = image[top : top + height, left : left + width].float()
        patch = patch * (0.9 + 0.2 * u[6]) + 25.6 * (u[7] - 0.5)
        spoiled = image.clone()
        place = spoiled[to_top : to_top + height, to_left : to_left + width]
        mixed = (1 - opacity) * place.float() + opacity * patch
        place.copy_(mixed.round().clamp(0, 255).to(torch.uint8))
        return spoiled


@dataclass(frozen=True)
class CrossFit:
    """Values of images under fits that have not seen them; the same on every rank."""

    normals: Tensor
    """(K, V)."""
    spoiled: list[Tensor]
    """Per level, (K', V)."""
    seen_left_out: Tensor
    """(M,) the seen part of every anomaly under a direction from the others; empty for M < 2."""


def fold_numbers(num: int, folds: int, generator: torch.Generator) -> Tensor:
    """A fold for each of `num` normals, (num,), sizes within one of each other."""
    return distributed.broadcast(torch.randperm(num, generator=generator) % min(folds, num))


def cross_fit(
    config: DpdlConfig,
    channels: list[int],
    normals: Normals,
    seen: Features,
    full: Energies,
    *,
    generator: torch.Generator,
) -> CrossFit:
    """Every kept normal, spoiled normal and seen anomaly under a fit without it."""
    kept = len(normals.kept)
    fold_of = fold_numbers(kept, config.folds, generator)
    num_parts = len(full.names) + 1
    mine = fold_of[normals.mine]
    values = torch.zeros(len(mine), num_parts)
    spoiled = [torch.zeros(len(level), num_parts) for level in normals.spoiled]
    spoiled_fold = mine[normals.spoiled_rows]
    left_out = torch.zeros(len(seen) if len(seen) > 1 else 0)
    folds = int(fold_of.max()) + 1
    for fold in range(folds):
        inside = torch.ones(len(normals.pooled), dtype=torch.bool)
        inside[normals.kept[fold_of == fold]] = False
        pooled = normals.pooled[inside]
        energies = fit_energies(
            config,
            channels,
            pooled,
            normals.features.take((mine != fold).nonzero().squeeze(1)),
            generator=generator,
            start=full,
            iterations=2,
        )
        directions = Directions(pooled, seen.pooled)
        held = (mine == fold).nonzero().squeeze(1)
        values[held] = part_values(energies, directions.all(), normals.features.take(held))
        held = (spoiled_fold == fold).nonzero().squeeze(1)
        for level, found in zip(spoiled, normals.spoiled, strict=True):
            level[held] = part_values(energies, directions.all(), found.take(held))
        left_out += directions.left_out() / folds
    return CrossFit(
        _in_order(values, normals.mine),
        [distributed.gather_rows(level) for level in spoiled],
        left_out,
    )


def _in_order(values: Tensor, mine: Tensor) -> Tensor:
    """All ranks' rows by place."""
    places = distributed.gather_rows(mine)
    return distributed.gather_rows(values)[places.argsort()]


@torch.no_grad()
def part_values(energies: Energies, direction: Tensor, features: Features) -> Tensor:
    """(n, V) raw values of all parts."""
    rows = [torch.zeros(0, len(energies.names) + 1)]
    for pooled, maps in features.batches(128):
        values, _ = energies(pooled, maps)
        rows.append(torch.cat([values, (pooled @ direction).unsqueeze(1)], 1))
    return torch.cat(rows)


class Directions:
    """The mean of seen anomalies in the normals' whitened space, as weights on pooled features.

    MATH.md 7.1's s: <z(x), mean of z(anomalies)> with z = W (x - mean), up to a constant that
    tails do not see. Whitening by the normals makes it Fisher's direction.
    """

    def __init__(self, pooled: Tensor, seen: Tensor) -> None:
        self.mean, self.whitener = whitening(pooled)
        self.white = (seen.double() - self.mean) @ self.whitener

    def all(self) -> Tensor:
        """(P,) float32; zeros without anomalies."""
        if not len(self.white):
            return torch.zeros(len(self.mean))
        return (self.whitener @ self.white.mean(0)).float()

    def left_out(self) -> Tensor:
        """(M,) each anomaly on the direction of the others, minus the normals' mean, 0."""
        count = len(self.white)
        if count < 2:
            return torch.zeros(0)
        others = (self.white.sum(0) - self.white) / (count - 1)
        return (self.white * others).sum(1).float()


def weigh(cross: CrossFit, num_energies: int) -> Tensor:
    """(V,) weights of the parts' tails."""
    weights = torch.zeros(cross.normals.shape[1])
    separation = torch.stack(
        [
            torch.stack([_auroc(cross.normals[:, v], level[:, v]) for v in range(num_energies)])
            for level in cross.spoiled
        ]
    )
    level = int((separation.mean(1) - 0.8).abs().argmin())
    gain = (2 * separation[level] - 1).clamp_min(0.05)
    weights[:num_energies] = gain / gain.mean()
    return weights


def _auroc(normal: Tensor, anomalous: Tensor) -> Tensor:
    ordered = normal.sort().values
    below = torch.searchsorted(ordered, anomalous.contiguous())
    upto = torch.searchsorted(ordered, anomalous.contiguous(), right=True)
    return (below + upto).double().mean() / (2 * len(normal))
