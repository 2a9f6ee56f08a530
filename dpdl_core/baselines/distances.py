"""Distances to the normals that need no training: Mahalanobis, nearest patches, tails.

Used by the training-free baselines in this folder. Letters: N normals, B images, D features,
P patches of an image, c channels.
"""

from __future__ import annotations

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

    def map(self, maps_BCHW: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, h, w): squared distance, 2 - 2 cos, in [0, 4]."""
        b, _, h, w = maps_BCHW.shape
        parts = torch.split(_patches(maps_BCHW), 4096)
        nearest = [(part @ self.patches.T).amax(1) for part in parts]
        return (2 - 2 * torch.cat(nearest)).clamp_min(0).view(b, h, w)


class PatchDraw:
    """A bank's patches, drawn at random over some of the normals while all pass by in batches."""

    def __init__(self, rows: Tensor, size: int, seed: int) -> None:
        """rows: which of the images to come take part, in the order that the draw counts them."""
        self._rows, self._size, self._seed = rows, size, seed
        self._chosen: Tensor | None = None
        self._taken: list[Tensor] = []
        self._passed = 0

    def take(self, maps_BCHW: Tensor) -> None:
        """The chosen ones of the next B images."""
        flat = _patches(maps_BCHW)
        if self._chosen is None:
            each = maps_BCHW.shape[2] * maps_BCHW.shape[3]
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randperm(len(self._rows) * each, generator=generator)[: self._size]
            self._chosen = self._rows[drawn // each] * each + drawn % each
        own = self._chosen - self._passed
        self._taken.append(flat[own[(own >= 0) & (own < len(flat))].to(flat.device)])
        self._passed += len(flat)

    def bank(self) -> PatchBank:
        return PatchBank(torch.cat(self._taken))


def _patches(maps_BCHW: Tensor) -> Tensor:
    """(B, c, h, w) -> (B * h * w, c)."""
    return maps_BCHW.permute(0, 2, 3, 1).reshape(-1, maps_BCHW.shape[1])


@dataclass(frozen=True, slots=True)
class Tail:
    """-log P(value or more | normal), from values of normals the fit had not seen.

    Empirical up to the largest normal; linear beyond it, in units of its distance from the
    median, since an empirical tail is flat there and every clear anomaly would tie.
    """

    sorted_values: Tensor

    @classmethod
    def fit(cls, held_out: Tensor) -> Tail:
        """From values (N,)."""
        return cls(held_out.double().sort().values)

    def __call__(self, value: Tensor) -> Tensor:
        """(B,) -> (B,) float64, >= 0."""
        v, known = value.double().contiguous(), self.sorted_values
        n, top = len(known), known[-1]
        at_least = n - torch.searchsorted(known, v, side="left")
        spread = (top - known[n // 2]).clamp_min(1e-12)
        return -torch.log((at_least + 1).double() / (n + 1)) + (v - top).clamp_min(0) / spread


def cross_folds(num_normals: int, *, folds: int = 5, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(rows to fit on, rows that this fit is to judge), each row judged once.

    In-sample values of normals look far too normal where D exceeds N (MATH.md 7.1).
    """
    order = torch.randperm(num_normals, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(min(folds, num_normals))
    return [
        (torch.cat([p for j, p in enumerate(parts) if j != i]), part)
        for i, part in enumerate(parts)
    ]


def mean_on_finest(maps: list[Tensor]) -> Tensor:
    """Mean of (B, h, w) maps, each brought to the finest grid among them."""
    size = max((tuple(m.shape[1:]) for m in maps), key=lambda hw: hw[0] * hw[1])
    on_grid = [F.interpolate(m[:, None], size, mode="bilinear")[:, 0] for m in maps]
    return torch.stack(on_grid).mean(0)
