"""The training-free combination of MATH.md 7.1: the floor under everything that trains.

Two Mahalanobis distances, two nearest-patch distances and, with anomalies to learn from, one
direction: each as minus the log of its tail probability under cross-fitted normals, summed.
Letters: N normals, M seen anomalies, B images, D pooled features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl_core.baselines.base import Judgement, Progress
from dpdl_core.baselines.distances import Tail, Whitener, cross_folds, mean_on_finest
from dpdl_core.baselines.frozen import BaselineConfig, FrozenTrunk, Views
from dpdl_core.baselines.knn import Banks, BanksDraw
from dpdl_core.heads import top_mean
from dpdl_core.images import ImageSource


@dataclass(frozen=True, slots=True)
class Parts:
    """One fit of all parts to some normals."""

    last: Whitener
    all_stages: Whitener
    banks: Banks
    direction: Tensor | None
    """(D,) mean of the seen anomalies in the whitened space of all stages, or None."""

    @classmethod
    def fit(cls, last: Tensor, pooled: Tensor, anomalies: Tensor | None, banks: Banks) -> Parts:
        """last (N, c) and pooled (N, D) of the normals, pooled (M, D) of the anomalies."""
        whitener = Whitener.fit(pooled)
        direction = None if anomalies is None else whitener(anomalies).mean(0)
        return cls(Whitener.fit(last), whitener, banks, direction)

    def values(self, views: Views) -> tuple[Tensor, Tensor]:
        """Raw values (B, 4 or 5), and the patches' heat map (B, h, w)."""
        maps = self.banks.maps(views)
        white = self.all_stages(views.pooled)
        columns = [
            self.last.distance(views.last_pooled),
            white.square().mean(1),
            *(top_mean(m) for m in maps),
        ]
        if self.direction is not None:
            columns.append(white @ self.direction)
        return torch.stack([c.double() for c in columns], 1).cpu(), mean_on_finest(list(maps))


class Tails:
    def __init__(self, trunk: FrozenTrunk, config: BaselineConfig) -> None:
        self._trunk, self._config = trunk, config

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """anomalies uint8 (M, S, S, 3), M >= 0; seed draws folds and patches.

        The normals pass by twice, since their maps are many GB: to fit on, and to be judged.
        """
        folds = cross_folds(normals.num_images, seed=seed)
        fitted_on = [*(rows for rows, _ in folds), torch.arange(normals.num_images)]
        draws = [BanksDraw(rows, self._config.bank, seed) for rows in fitted_on]
        last_Nc, pooled_ND = self._pooled(normals, draws)
        seen = self._trunk.views(anomalies).pooled if len(anomalies) else None
        fits = [
            Parts.fit(last_Nc[rows], pooled_ND[rows], seen, draw.banks())
            for rows, draw in zip(fitted_on, draws, strict=True)
        ]
        progress(0.5)
        self._parts = fits.pop()
        values = self._held_out(normals, [rows for _, rows in folds], fits)
        self._tails = [Tail.fit(column) for column in values.unbind(1)]
        progress(1.0)

    def _pooled(self, normals: ImageSource, draws: list[BanksDraw]) -> tuple[Tensor, Tensor]:
        """The last stage's means (N, c), all stages' moments (N, D); draws take their patches."""
        last, pooled = [], []
        for views in self._trunk.look(normals):
            last.append(views.last_pooled)
            pooled.append(views.pooled)
            for draw in draws:
                draw.take(views)
        return torch.cat(last), torch.cat(pooled)

    def _held_out(self, normals: ImageSource, folds: list[Tensor], fits: list[Parts]) -> Tensor:
        """Values (N, 4 or 5) of each normal by the fit that has not seen it."""
        fold_of = torch.empty(normals.num_images, dtype=torch.long)
        for number, rows in enumerate(folds):
            fold_of[rows] = number
        found: list[Tensor] = []
        for views in self._trunk.look(normals):
            mine = fold_of[len(found) : len(found) + len(views.pooled)]
            by_fold = [(mine == number).nonzero().squeeze(1) for number in range(len(fits))]
            parts = [
                fitted.values(views.rows(at))[0]
                for fitted, at in zip(fits, by_fold, strict=True)
                if len(at)
            ]
            found += torch.cat(parts)[torch.cat(by_fold).argsort()]
        return torch.stack(found)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        values, maps = self._parts.values(self._trunk.views(images))
        tails = [tail(v) for tail, v in zip(self._tails, values.unbind(1), strict=True)]
        return Judgement(torch.stack(tails).sum(0).float(), maps.cpu())
