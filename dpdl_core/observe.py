"""One pass of the trunk over the images, and what is kept of it.

Knows the trunk and image sources; nothing of prototypes, heads or scores.
Letters: N normals over all ranks whose pooled features are kept, K of them with maps, B batch,
P pooled features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.config import DpdlConfig, map_stages, pooled_stages, quartered_stages
from dpdl_core.features import Trunk
from dpdl_core.images import ImageSource
from dpdl_core.parts import pool
from dpdl_core.twins import SIDE, thumbnail

Spoil = Callable[[Tensor, Tensor], Tensor]
"""uint8 images (B, S, S, 3) and their global numbers (B,) -> spoiled images."""


@dataclass(frozen=True)
class Features:
    """Pooled features (n, P) float32 and, per stage, maps (n, c, h, w) float16, of n images."""

    pooled: Tensor
    maps: list[Tensor]

    def __len__(self) -> int:
        return len(self.pooled)

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Slices of at most `size` images."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield self.pooled[rows], [m[rows] for m in self.maps]

    def take(self, rows: Tensor) -> Features:
        return Features(self.pooled[rows], [m[rows] for m in self.maps])


MAX_POOLED = 1 << 16
"""Normals whose pooled features are kept on every rank, 860 MB of Lite0's: forty for each
dimension of the largest covariance."""


@dataclass(frozen=True)
class Normals:
    """What is kept of the normals. Numbers run over all ranks' images in rank order."""

    pooled: Tensor
    """(N, P) float32 of all normals, or of MAX_POOLED of them; the same on every rank."""
    kept: Tensor
    """(K,) rows of `pooled` of the normals whose maps are kept, ascending; same on every rank."""
    mine: Tensor
    """(k,) places in `kept` of this rank's images."""
    features: Features
    """Of this rank's k kept normals."""
    spoiled: list[Features]
    """Per level of difficulty, cut-paste variants of some of `features`."""
    spoiled_rows: Tensor
    """Rows of `features` that every level's variants were made of."""
    thumbnails: Tensor
    """(K, SIDE, SIDE) uint8 of the normals whose maps are kept, the same on every rank."""


def check_images(images: Tensor, size: int, what: str) -> None:
    """Raises ValueError for anything but uint8 (n, size, size, 3)."""
    if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{what} are {images.dtype} {tuple(images.shape)}: need uint8 (n, {size}, {size}, 3)"
        )


def observe(
    trunk: Trunk,
    source: ImageSource,
    config: DpdlConfig,
    *,
    spoilers: list[Spoil],
    generator: torch.Generator,
    tell: Callable[[float], None],
) -> Normals:
    """Read this rank's shard once, of images of side S. Maps that no patch space or head looks at
    are dropped at once. Raises ValueError for images of another size or type.

    Which normals are kept and spoiled depends on N and the generator only, not on the shards.
    """
    size, max_kept = config.image_size, config.max_maps
    counts = distributed.row_counts(torch.empty(source.num_images, 0))
    total, start = sum(counts), sum(counts[: distributed.rank()])
    order = distributed.broadcast(torch.randperm(total, generator=generator))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:max_kept]] = True
    to_pool = torch.zeros(total, dtype=torch.bool)
    to_pool[order[: max(MAX_POOLED, max_kept)]] = True
    to_spoil = torch.zeros(total, dtype=torch.bool)
    to_spoil[order[: min(max_kept, config.pseudo_normals)]] = True

    # Of the right shapes also on a rank that has no image.
    one = look(trunk, torch.zeros(1, size, size, 3, dtype=torch.uint8), config)
    nothing = one.take(torch.zeros(0, dtype=torch.long))
    pooled, kept, small = [nothing.pooled], [nothing], [thumbnails(())]
    spoiled = [[nothing] for _ in spoilers] if bool(to_spoil.any()) else []
    at = start
    for images in source.batches(config.batch_size):
        check_images(images, size, "normals")
        numbers = torch.arange(at, at + len(images))
        at += len(images)
        found = look(trunk, images, config)
        pooled.append(found.pooled[to_pool[numbers]])
        rows = chosen[numbers].nonzero().squeeze(1)
        kept.append(found.take(rows))
        small.append(thumbnails(images[rows]))
        rows = to_spoil[numbers].nonzero().squeeze(1)
        if len(rows):
            for level, spoil in zip(spoiled, spoilers, strict=True):
                level.append(look(trunk, spoil(images[rows], numbers[rows]), config))
        tell((at - start) / max(1, source.num_images))
    everywhere = chosen.nonzero().squeeze(1)
    mine = ((everywhere >= start) & (everywhere < at)).nonzero().squeeze(1)
    return Normals(
        pooled=distributed.gather_rows(torch.cat(pooled)),
        kept=to_pool.cumsum(0)[everywhere] - 1,
        mine=mine,
        features=join(kept),
        spoiled=[join(level) for level in spoiled],
        spoiled_rows=to_spoil[everywhere[mine]].nonzero().squeeze(1),
        thumbnails=distributed.gather_rows(torch.cat(small)),
    )


def thumbnails(images: Iterable[Tensor]) -> Tensor:
    """uint8 (n, S, S, 3) on the CPU -> (n, SIDE, SIDE)."""
    small = [torch.from_numpy(thumbnail(image.numpy())) for image in images]
    return torch.stack(small) if small else torch.zeros(0, SIDE, SIDE, dtype=torch.uint8)


@torch.no_grad()
def look(trunk: Trunk, images: Tensor, config: DpdlConfig) -> Features:
    """Features of one batch of uint8 images (B, S, S, 3), on the CPU."""
    return keep(trunk(images.to(trunk.mean_255.device)), config)


def keep(maps: list[Tensor], config: DpdlConfig) -> Features:
    """Of one batch's maps what a fit needs: pooled features, and the maps that patch spaces and
    heads look at, by halves."""
    stages = map_stages(config)
    empty = maps[0].new_empty((len(maps[0]), 0), dtype=torch.float16).cpu()
    kept = [m.half().cpu() if i in stages else empty for i, m in enumerate(maps)]
    pooled = pool(maps, pooled_stages(config), quartered_stages(config))
    return Features(pooled.cpu(), kept)


def look_at_all(trunk: Trunk, images: Tensor, config: DpdlConfig) -> Features:
    """Features of images in memory, uint8 (M, S, S, 3)."""
    return join([look(trunk, batch, config) for batch in torch.split(images, config.batch_size)])


def join(parts: list[Features]) -> Features:
    """The images of all parts, in order."""
    return Features(
        torch.cat([p.pooled for p in parts]),
        [torch.cat(level) for level in zip(*(p.maps for p in parts), strict=True)],
    )
