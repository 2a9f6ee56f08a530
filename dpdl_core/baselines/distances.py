"""Distances to the normals that need no training: Mahalanobis, nearest patches, tails.

Used by the training-free baselines in this folder. Letters: N normals, B images, D features,
P patches of an image, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Whitener:
    """x -> L^-1 (x - mean), with L L' the Ledoit-Wolf covariance of the normals."""

    mean: Tensor
    cholesky: Tensor

    @classmethod
    def fit(cls, x_ND: Tensor) -> Whitener:
        x = x_ND.double()
        mean = x.mean(0)
        covariance, _ = ledoit_wolf((x - mean).cpu().numpy(), assume_centered=True)
        return cls(mean, torch.linalg.cholesky(torch.from_numpy(covariance).to(x)))

    def __call__(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (B, D) float64, of unit covariance over the normals."""
        centred = (x_BD.double() - self.mean).T
        white: Tensor = torch.linalg.solve_triangular(self.cholesky, centred, upper=False).T
        return white

    def distance(self, x_BD: Tensor) -> Tensor:
        """Mahalanobis distance (B,), squared over D: about 1 for a normal."""
        return self(x_BD).square().mean(1)


@dataclass(frozen=True, slots=True)
class PatchBank:
    """Unit-norm patches of normals, and the distance to the nearest of them."""

    patches: Tensor

    @classmethod
    def fit(cls, maps_NCHW: Tensor, size: int, seed: int) -> PatchBank:
        flat = maps_NCHW.permute(0, 2, 3, 1).reshape(-1, maps_NCHW.shape[1])
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(flat), generator=generator)[:size]
        return cls(flat[chosen.to(flat.device)])

    def map(self, maps_BCHW: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, h, w): squared distance, 2 - 2 cos, in [0, 4]."""
        b, c, h, w = maps_BCHW.shape
        flat = maps_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
        nearest = [(part @ self.patches.T).amax(1) for part in torch.split(flat, 4096)]
        return (2 - 2 * torch.cat(nearest)).clamp_min(0).view(b, h, w)


@dataclass(frozen=True, slots=True)
class Tail:
    """-log P(value or more | normal), from values of normals the fit had not seen.

    Empirical below the upper tenth, exponential above it: beyond the largest normal an empirical
    tail is flat, and every anomaly would tie with every other.
    """

    sorted_values: Tensor
    knee: float
    excess: float

    @classmethod
    def fit(cls, held_out: Tensor) -> Tail:
        values = held_out.double().sort().values
        above = max(1, len(values) // 10)
        knee = values[-above - 1] if len(values) > above else values[0]
        excess = (values[-above:] - knee).mean().clamp_min(1e-12)
        return cls(values, float(knee), float(excess))

    def __call__(self, value: Tensor) -> Tensor:
        v = value.double()
        n = len(self.sorted_values)
        rank = torch.searchsorted(self.sorted_values, v, side="left")
        at_knee = torch.searchsorted(self.sorted_values, torch.tensor(self.knee, dtype=v.dtype))
        empirical = -torch.log((n - rank + 1).double() / (n + 1))
        base = -torch.log((n - at_knee + 1).double() / (n + 1))
        return torch.where(v > self.knee, base + (v - self.knee) / self.excess, empirical)


def cross_fitted(
    num_normals: int, values: Callable[[Tensor, Tensor], Tensor], *, folds: int = 5, seed: int
) -> Tensor:
    """Values (N, V) of normals by fits that have not seen them.

    values(fit_rows, rows) fits on the one and returns V values of each of the other. In-sample
    values of normals look far too normal where D exceeds N (MATH.md 7.1).
    """
    order = torch.randperm(num_normals, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(min(folds, num_normals))
    held_out = [
        values(torch.cat([p for j, p in enumerate(parts) if j != i]), part)
        for i, part in enumerate(parts)
    ]
    return torch.cat(held_out)[order.argsort()]


def mean_on_finest(maps: list[Tensor]) -> Tensor:
    """Mean of (B, h, w) maps, each brought to the finest grid among them."""
    size = max((tuple(m.shape[1:]) for m in maps), key=lambda hw: hw[0] * hw[1])
    on_grid = [F.interpolate(m[:, None], size, mode="bilinear")[:, 0] for m in maps]
    return torch.stack(on_grid).mean(0)
