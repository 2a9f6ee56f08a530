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
from dpdl_core.baselines.distances import Tail, Whitener, cross_fitted, mean_on_finest
from dpdl_core.baselines.frozen import BaselineConfig, FrozenTrunk, Views
from dpdl_core.baselines.knn import Banks
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
    def fit(cls, normals: Views, anomalies: Views | None, bank: int, seed: int) -> Parts:
        whitener = Whitener.fit(normals.pooled)
        direction = None if anomalies is None else whitener(anomalies.pooled).mean(0)
        return cls(
            Whitener.fit(normals.last_pooled),
            whitener,
            Banks.fit([normals], len(normals.pooled), bank, seed),
            direction,
        )

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
        """anomalies uint8 (M, S, S, 3), M >= 0; seed draws folds and patches."""
        views = Views.cat(list(self._trunk.look(normals)))
        seen = self._trunk.views(anomalies) if len(anomalies) else None
        bank = self._config.bank
        progress(0.5)

        def held_out(fit_rows: Tensor, rows: Tensor) -> Tensor:
            parts = Parts.fit(views.rows(fit_rows), seen, bank, seed)
            return parts.values(views.rows(rows))[0]

        values = cross_fitted(normals.num_images, held_out, seed=seed)
        self._tails = [Tail.fit(column) for column in values.unbind(1)]
        self._parts = Parts.fit(views, seen, bank, seed)
        progress(1.0)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        values, maps = self._parts.values(self._trunk.views(images))
        tails = [tail(v) for tail, v in zip(self._tails, values.unbind(1), strict=True)]
        return Judgement(torch.stack(tails).sum(0).float(), maps.cpu())
