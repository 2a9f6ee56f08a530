"""Features of a frozen trunk for the baselines, computed once per image.

Five seeds of one data set share most of their images,
so views are kept by content within a bound of memory.
Letters: B batch, S side in pixels, L stages, P patches, c channels, D = 2 * sum of all channels.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl_core.features import Trunk
from dpdl_core.images import ImageSource

KEPT_BYTES = 3 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """What a baseline takes over from the recipe it is held against, and its own figures."""

    trunk: str = "tf_efficientnet_lite0"
    weights: str = "package"
    image_size: int = 224
    """Side S of the square image in pixels."""
    bank: int = 10_000
    """Patches kept for a nearest-neighbour search, drawn at random over all normals."""
    iterations: int = 0
    """Training steps of devnet and dra; 0 takes the published 1000 and 600."""
    max_pool: int = 2048
    """Normals that devnet and dra draw their batches from, and pseudo anomalies of dra."""

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.bank < 1:
            raise ValueError(f"{self}: need image_size >= 32 and bank >= 1")
        if self.iterations < 0 or self.max_pool < 1:
            raise ValueError(f"{self}: need iterations >= 0 and max_pool >= 1")


@dataclass(frozen=True, slots=True)
class Views:
    """Of B images, float32 on the trunk's device."""

    pooled: Tensor
    """(B, D): per stage the mean of each channel and its standard deviation over the map."""
    mid: Tensor
    """(B, c, h, w): the middle stage after a 3x3 mean, each patch of unit norm."""
    last: Tensor
    """(B, c, h, w): the last stage as it is."""

    @property
    def last_pooled(self) -> Tensor:
        """(B, c): mean of the last stage."""
        return self.last.mean((2, 3))

    @property
    def last_patches(self) -> Tensor:
        """(B, c, h, w): the last stage, each patch of unit norm."""
        return F.normalize(self.last, dim=1)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pooled, self.mid, self.last

    @classmethod
    def cat(cls, parts: list[Views]) -> Views:
        columns = zip(*(p._tensors() for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def row(self, index: int) -> Views:
        # clone: a slice would keep the whole batch alive
        return Views(*(t[index : index + 1].clone() for t in self._tensors()))

    def rows(self, index: Tensor) -> Views:
        return Views(*(t[index] for t in self._tensors()))


class FrozenTrunk:
    """A pretrained trunk that never trains, with a memory of the images it has seen."""

    def __init__(
        self,
        name: str,
        weights: str,
        image_size: int | None = None,
        *,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        """Raises what features.Trunk raises for an unknown name, missing weights or a side S of
        the images to come that the trunk does not take."""
        self.batch_size = batch_size
        self.device = torch.device(device)
        # Batch norms folded: the trunk is only ever run forward here.
        self._trunk = Trunk(name, weights, image_size).fuse().to(self.device)
        self._kept: dict[bytes, tuple[Views, float]] = {}
        self._kept_bytes = 0
        self.saved_seconds = 0.0
        """What forward passes would have taken that the memory has spared: timings add it."""

    def try_size(self, size: int) -> None:
        """Raises ValueError where the trunk takes no images of `size` px."""
        self._trunk.try_size(size)

    def look(self, source: ImageSource) -> Iterator[Views]:
        """Views of all N images of a source, batch by batch: together their maps are many GB."""
        for batch in source.batches(self.batch_size):
            yield self.views(batch)

    def views(self, images: Tensor) -> Views:
        """uint8 (B, S, S, 3) -> Views."""
        found: list[Views | None] = []
        keys = [hashlib.blake2b(i.numpy(), digest_size=16).digest() for i in images.contiguous()]
        for key in keys:
            views, seconds = self._kept.get(key, (None, 0.0))
            found.append(views)
            self.saved_seconds += seconds
        new = [i for i, views in enumerate(found) if views is None]
        if new:
            started = time.perf_counter()
            fresh = self._forward(images[new])
            seconds = (time.perf_counter() - started) / len(new)
            for row, i in enumerate(new):
                found[i] = views = fresh.row(row)
                if self._kept_bytes + views.num_bytes <= KEPT_BYTES:
                    self._kept[keys[i]] = (views, seconds)
                    self._kept_bytes += views.num_bytes
        return Views.cat([views for views in found if views is not None])

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Views:
        maps = [m.float() for m in self._trunk(images.to(self.device))]
        pooled = [torch.cat([m.mean((2, 3)), m.std((2, 3), correction=0)], 1) for m in maps]
        mid = F.avg_pool2d(maps[middle_stage(len(maps))], 3, 1, 1, count_include_pad=False)
        return Views(
            torch.cat(pooled, 1),
            F.normalize(mid, dim=1),
            maps[-1],
        )


def middle_stage(num_stages: int) -> int:
    """Index of the stage at seven tenths of the depth: 4 of 7 (EfficientNet), 2 of 4 (ResNet)."""
    return round(0.7 * num_stages) - 1
