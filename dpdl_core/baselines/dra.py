"""DRA: four heads for seen, pseudo, residual and holistic abnormality (Ding et al., CVPR 2022).

The score is seen + pseudo + residual - holistic, the last trained to be high for normals
(MATH.md 5). A step draws 48 images, each normal, pseudo (cut-paste) or seen with equal odds;
30 epochs of 20 steps, two scales.
Letters: R reference normals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpdl_core.augment import cut_paste
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

EPOCHS = 30
NUM_REFERENCES = 5


class Heads(nn.Module):
    """The four heads on one scale's maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.seen = TopKHead(channels)
        self.pseudo = TopKHead(channels)
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            TopKHead(channels),
        )
        self.holistic = nn.Sequential(
            nn.Linear(channels, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 1)
        )

    def forward(self, features: Tensor, references: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B, c, h, w), (R, c, h, w) -> scores (B,) by head, all >= 0, and a map (B, h, w)."""
        seen, seen_map = self.seen(features)
        pseudo, pseudo_map = self.pseudo(features)
        residual, residual_map = self.residual(features - references.mean(0))
        holistic = self.holistic(features.mean((2, 3))).squeeze(1).abs()
        scores = {"seen": seen, "pseudo": pseudo, "residual": residual, "holistic": holistic}
        return scores, seen_map + pseudo_map + residual_map


def pseudo_anomalies(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (N, S, S, 3) -> the same shape, a jittered rectangle of each pasted elsewhere in it."""
    pasted = []
    for part in torch.split(images, 64):
        x, _ = cut_paste(part.permute(0, 3, 1, 2).float() / 255, generator=generator)
        pasted.append((x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(pasted).contiguous()


class Dra:
    def __init__(self, trunk: FrozenTrunk, config: BaselineConfig) -> None:
        check_half("dra", trunk, config.image_size)
        self._trunk, self._config = trunk, config

    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """anomalies uint8 (M, S, S, 3), M >= 1."""
        check_seen("dra", len(anomalies))
        with seeded(seed) as generator:
            images = sample_images(normals, self._config.max_pool, generator)
            kinds = [
                two_scales(self._trunk, images),
                two_scales(self._trunk, pseudo_anomalies(images, generator)),
                two_scales(self._trunk, anomalies),
            ]
            normal = kinds[0]
            self._heads = Heads(normal[0].shape[1])
            chosen = torch.randperm(len(images), generator=generator)[:NUM_REFERENCES]
            self._references = rows(normal, chosen)

            def loss() -> Tensor:
                kind = torch.randint(3, (BATCH,), generator=generator).sort().values
                counts = torch.bincount(kind, minlength=3).tolist()
                parts = [
                    rows(maps, draw(count, len(maps[0]), generator))
                    for maps, count in zip(kinds, counts, strict=True)
                ]
                batch = [torch.cat(scale) for scale in zip(*parts, strict=True)]
                references = rows(normal, draw(NUM_REFERENCES, len(images), generator))
                return self._loss(self._judge(batch, references)[0], kind)

            iterations = self._config.iterations or EPOCHS * STEPS_PER_EPOCH
            train(self._heads, loss, iterations, progress)

    @staticmethod
    def _loss(scores: dict[str, Tensor], kind: Tensor) -> Tensor:
        """Sum over the heads, each on the images it is for; kind 0 normal, 1 pseudo, 2 seen."""
        uses = {
            "seen": (kind != 1, kind == 2),
            "pseudo": (kind != 2, kind == 1),
            "residual": (kind >= 0, kind > 0),
            "holistic": (kind >= 0, kind == 0),
        }
        losses = [
            deviation_loss(scores[head][used], positive[used].float())
            for head, (used, positive) in uses.items()
            if bool(used.any())
        ]
        return torch.stack(losses).sum()

    def _judge(self, maps: Maps, references: Maps) -> tuple[dict[str, Tensor], list[Tensor]]:
        per_scale = [self._heads(m, r) for m, r in zip(maps, references, strict=True)]
        heads = per_scale[0][0]
        scores = {h: torch.stack([found[h] for found, _ in per_scale]).mean(0) for h in heads}
        return scores, [places for _, places in per_scale]

    @torch.inference_mode()
    def score(self, images: Tensor) -> Judgement:
        s, places = self._judge(two_scales(self._trunk, images), self._references)
        total = s["seen"] + s["pseudo"] + s["residual"] - s["holistic"]
        return Judgement(total, mean_on_finest(places))
