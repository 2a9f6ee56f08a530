"""Nearest neighbour among the normals' patches, worst tenth of an image (as in PatchCore)."""

from __future__ import annotations

from collections.abc import Iterable
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

    @classmethod
    def fit(cls, batches: Iterable[Views], num_images: int, size: int, seed: int) -> Banks:
        """From the views of num_images normals, batch by batch."""
        mid, last = PatchDraw(num_images, size, seed), PatchDraw(num_images, size, seed)
        for views in batches:
            mid.take(views.mid)
            last.take(views.last_patches)
        return cls(mid.bank(), last.bank())

    def maps(self, views: Views) -> tuple[Tensor, Tensor]:
        """Squared distances to the nearest patch, (B, h, w) of the middle and the last stage."""
        return self.mid.map(views.mid), self.last.map(views.last_patches)


class NearestPatches:
    def __init__(self, trunk: FrozenTrunk, config: BaselineConfig) -> None:
        self._trunk, self._config = trunk, config

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """Anomalies are not used; seed draws the patches that are kept."""
        views = self._trunk.look(normals)
        self._banks = Banks.fit(views, normals.num_images, self._config.bank, seed)
        progress(1.0)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        maps = self._banks.maps(self._trunk.views(images))
        score = torch.stack([top_mean(m) for m in maps]).mean(0)
        return Judgement(score.cpu(), mean_on_finest(list(maps)).cpu())
