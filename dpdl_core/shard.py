"""This rank's images, and the numbers they have in the whole data set on any number of ranks.

Knows tensors, image sources and ranks; nothing of where images come from.
Letters: n images of this rank, N of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.images import ImageSource


class Shard:
    """An ImageSource with the number of each of its images: what is drawn by number does not
    depend on who holds the image."""

    def __init__(
        self, parts: Sequence[tuple[ImageSource, Tensor]], left_out: Tensor | None = None
    ) -> None:
        """parts: sources and their images' numbers (n,) int64, ascending over all parts and on no
        other rank. left_out: numbers of images that are passed over."""
        self._parts = list(parts)
        none = torch.zeros(0, dtype=torch.long)
        self.left_out = none if left_out is None else left_out
        self._keep = [~torch.isin(numbers, self.left_out) for _, numbers in self._parts]
        kept = [numbers[keep] for (_, numbers), keep in zip(self._parts, self._keep, strict=True)]
        self.numbers = torch.cat([none, *kept])
        """(n,), in the order of the images."""

    @classmethod
    def of(cls, source: ImageSource) -> Shard:
        """`source` itself if it is one; else the data set is the shards in rank order."""
        if isinstance(source, Shard):
            return source
        counts = distributed.row_counts(torch.empty(source.num_images, 0))
        start = sum(counts[: distributed.rank()])
        return cls([(source, torch.arange(start, start + source.num_images))])

    @property
    def num_images(self) -> int:
        return len(self.numbers)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, S, S, 3), B at most batch_size."""
        for (source, _), keep in zip(self._parts, self._keep, strict=True):
            at, end = 0, int(keep.nonzero().max()) + 1 if bool(keep.any()) else 0
            if not end:
                continue
            for images in source.batches(batch_size):
                wanted = keep[at : at + len(images)]
                at += len(images)
                if bool(wanted.all()):
                    yield images
                elif bool(wanted.any()):
                    yield images[wanted]
                if at >= end:
                    break

    def and_also(self, other: Shard) -> Shard:
        """This and then `other`, whose numbers are higher."""
        left_out = torch.cat([self.left_out, other.left_out])
        return Shard([*self._parts, *other._parts], left_out)

    def without(self, numbers: Tensor) -> Shard:
        """This but for the images of these numbers, which may be other ranks'."""
        return Shard(self._parts, torch.unique(torch.cat([self.left_out, numbers])))

    def only(self, numbers: Tensor) -> Shard:
        """Those of this rank's images that have one of these numbers."""
        return self.without(self.numbers[~torch.isin(self.numbers, numbers)])

    def everyone(self) -> tuple[Tensor, Tensor]:
        """Numbers of all ranks' images, ascending (N,), and who holds each. Collective."""
        gathered = distributed.gather_rows(self.numbers)
        counts = distributed.row_counts(self.numbers)
        holders = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        order = gathered.argsort()
        return gathered[order], holders[order]


class Reader:
    """One pass over a source, some images at a time."""

    def __init__(self, source: ImageSource, batch_size: int = 128) -> None:
        self._batches = source.batches(batch_size)
        self._held: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """The next `count` images, (count, S, S, 3); fewer only at the end."""
        parts = [] if self._held is None else [self._held]
        while sum(map(len, parts)) < count and (images := next(self._batches, None)) is not None:
            parts.append(images)
        together = torch.cat(parts) if parts else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
        self._held = together[count:].clone()  # a view would hold on to all of it
        return together[:count]
