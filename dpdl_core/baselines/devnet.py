"""DevNet: one top-K head under the deviation loss (Pang et al., arXiv:2108.00462).

24 normals and 24 seen anomalies a step, 50 epochs of 20 steps, two scales (MATH.md 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpdl_core.baselines.base import Judgement, Progress, sample_images
from dpdl_core.baselines.distances import mean_on_finest
from dpdl_core.baselines.frozen import BaselineConfig, FrozenTrunk
from dpdl_core.baselines.supervised import (
    BATCH,
    STEPS_PER_EPOCH,
    Maps,
    TopKHead,
    check_half,
    check_seen,
    deviation_loss,
    draw,
    rows,
    seeded,
    train,
    two_scales,
)
from dpdl_core.images import ImageSource

EPOCHS = 50


class DevNet:
    def __init__(self, trunk: FrozenTrunk, config: BaselineConfig) -> None:
        check_half("devnet", trunk, config.image_size)
        self._trunk, self._config = trunk, config

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """anomalies uint8 (M, S, S, 3), M >= 1."""
        check_seen("devnet", len(anomalies))
        with seeded(seed) as generator:
            pool = sample_images(normals, self._config.max_pool, generator)
            normal = two_scales(self._trunk, pool)
            seen = two_scales(self._trunk, anomalies)
            self._head = TopKHead(normal[0].shape[1])
            label = torch.tensor([0.0, 1.0]).repeat_interleave(BATCH // 2)

            def loss() -> Tensor:
                parts = (
                    rows(normal, draw(BATCH // 2, len(normal[0]), generator)),
                    rows(seen, draw(BATCH // 2, len(seen[0]), generator)),
                )
                batch = [torch.cat(scale) for scale in zip(*parts, strict=True)]
                return deviation_loss(self._judge(batch)[0], label)

            train(
                self._head,
                loss,
                self._config.iterations or EPOCHS * STEPS_PER_EPOCH,
                progress,
            )

    def _judge(self, maps: Maps) -> tuple[Tensor, list[Tensor]]:
        scores, places = zip(*(self._head(m) for m in maps), strict=True)
        return torch.stack(scores).mean(0), list(places)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        scores, places = self._judge(two_scales(self._trunk, images))
        return Judgement(scores, mean_on_finest(places))
