"""Mahalanobis distance of pooled features to the normals: seconds, no training, no anomalies."""

from __future__ import annotations

import torch
from torch import Tensor

from dpdl_core.baselines.base import Judgement, Progress
from dpdl_core.baselines.distances import Whitener
from dpdl_core.baselines.frozen import FrozenTrunk, Views
from dpdl_core.images import ImageSource


class Mahalanobis:
    """On the mean of the last stage, or on mean and deviation of all stages (MATH.md 7.1)."""

    def __init__(self, trunk: FrozenTrunk, *, all_stages: bool) -> None:
        self._trunk = trunk
        self._all_stages = all_stages

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """Anomalies and seed are not used: the fit is a closed form of the normals."""
        vectors = [self._vectors(views) for views in self._trunk.look(normals)]
        self._whitener = Whitener.fit(torch.cat(vectors))
        progress(1.0)

    def _vectors(self, views: Views) -> Tensor:
        return views.pooled if self._all_stages else views.last_pooled

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        distance = self._whitener.distance(self._vectors(self._trunk.views(images)))
        return Judgement(distance.float().cpu(), None)
