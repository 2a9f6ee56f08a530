"""Nearest neighbour among the normals' patches, worst tenth of an image (as in PatchCore)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl_core.baselines.base import Judgement, Progress
from dpdl_core.baselines.distances import PatchBank, PatchDraw, mean_on_finest
from dpdl_core.baselines.frozen import BaselineConfig, FrozenTrunk, Views
from dpdl_core.heads import top_mean
from dpdl_core.images import ImageSource


@dataclass(frozen=True, slots=True)
class Banks:
    """One bank for the middle and one for the last stage: they fail on different data."""

    mid: PatchBank
    last: PatchBank

    def maps(self, views: Views) -> tuple[Tensor, Tensor]:
        """Squared distances to the nearest patch, (B, h, w) of the middle and the last stage."""
        return self.mid.map(views.mid), self.last.map(views.last_patches)


class BanksDraw:
    """Banks of some of the normals, drawn while the views of all pass by in batches."""

    def __init__(self, rows: Tensor, size: int, seed: int) -> None:
        """As PatchDraw's."""
        self._mid, self._last = PatchDraw(rows, size, seed), PatchDraw(rows, size, seed)

    def take(self, views: Views) -> None:
        self._mid.take(views.mid)
        self._last.take(views.last_patches)

    def banks(self) -> Banks:
        return Banks(self._mid.bank(), self._last.bank())


class NearestPatches:
    def __init__(self, trunk: FrozenTrunk, config: BaselineConfig) -> None:
        self._trunk, self._config = trunk, config

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """Anomalies are not used; seed draws the patches that are kept."""
        draw = BanksDraw(torch.arange(normals.num_images), self._config.bank, seed)
        for views in self._trunk.look(normals):
            draw.take(views)
        self._banks = draw.banks()
        progress(1.0)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        maps = self._banks.maps(self._trunk.views(images))
        score = torch.stack([top_mean(m) for m in maps]).mean(0)
        return Judgement(score.cpu(), mean_on_finest(list(maps)).cpu())
