"""What every baseline is: fitted on normals and a few anomalies, then a judge of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpdl_core.images import ImageSource

Progress = Callable[[float], None]
"""progress(share done, 0..1)."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of B images, on the CPU."""

    score: Tensor
    """(B,); higher is more anomalous."""
    maps: Tensor | None
    """(B, h, w) heat maps, or None where a method looks at the whole image only."""


class Baseline(Protocol):
    def fit(
        self, normals: ImageSource, anomalies: Tensor, *, seed: int, progress: Progress
    ) -> None:
        """anomalies uint8 (M, S, S, 3). Raises ValueError when a method needs more of them."""
        ...

    def score(self, images: Tensor) -> Judgement:
        """uint8 (B, S, S, 3) -> Judgement."""
        ...


def sample_images(source: ImageSource, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` images of a source, drawn without replacement: uint8 (n, S, S, 3)."""
    chosen = torch.randperm(source.num_images, generator=generator)[:limit].sort().values
    taken: list[Tensor] = []
    start = 0
    for batch in source.batches(64):
        inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        taken.append(batch[inside])
        start += len(batch)
    return torch.cat(taken)
