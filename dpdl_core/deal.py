"""Which images make a training batch, and which rank brings them: the same batch on any number.

Knows shards and ranks only. Used by tune.py. MATH.md section 3: a third normals, a third normals
to spoil, a third seen anomalies.

Normals are drawn without replacement from windows of the data set's order, so that a shard is
read as a stream, and a rank holds its part of two: one to draw from, and the next, which is read
meanwhile. What is drawn follows from the seed, the pass and the window; no rank asks another.
Letters: T a third of a batch, n normals of it on this rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.shard import Reader, Shard

WINDOW = 2048
"""Images over all ranks that batches are drawn from at a time: 300 MB at 224 px."""


@dataclass(frozen=True)
class Dealt:
    """This rank's part of one batch. Places run over all ranks: 2T normals, then T anomalies."""

    normals: Tensor
    """uint8 (n, S, S, 3)."""
    normal_places: Tensor
    """(n,), of 0..2T: those below T stay as they are, the others are spoiled."""
    seen_places: Tensor
    """Of 0..T: which of the batch's seen anomalies, that all ranks hold, are this rank's work."""


def deal(normals: Shard, third: int, *, seed: int, skip: int = 0) -> Generator[Dealt]:
    """Batches for ever, the first `skip` left out. Collective once, at the first."""
    everyone, holders = normals.everyone()
    windows = torch.arange(len(everyone)).tensor_split(max(1, round(len(everyone) / WINDOW)))
    batches = [max(1, len(window) // (2 * third)) for window in windows]
    passes, skip = divmod(skip, sum(batches))
    for window in _ahead(_read(normals, holders, windows, passes)):
        drawn = list(_drawn(len(window.holders), 2 * third, [seed, *window.key]))
        for chosen in drawn[skip:]:
            yield _part(chosen, window, third)
        skip = max(0, skip - len(drawn))


@dataclass(frozen=True)
class _Window:
    key: tuple[int, int]
    """Pass and place in it."""
    holders: Tensor
    """Ranks of its images."""
    images: Tensor
    """This rank's, in order."""


def _read(
    normals: Shard, holders: Tensor, windows: Sequence[Tensor], passes: int
) -> Iterator[_Window]:
    """The windows of pass after pass."""
    for number in itertools.count(passes):
        reader = Reader(normals)
        for at, window in enumerate(windows):
            held = holders[window]
            images = reader.take(int((held == distributed.rank()).sum()))
            yield _Window((number, at), held, images)


def _ahead(windows: Iterator[_Window]) -> Iterator[_Window]:
    """Each window while the next is being read: whoever trains does not wait for the reading."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(next, windows)
        while True:
            window = coming.result()
            coming = pool.submit(next, windows)
            yield window


def _drawn(size: int, count: int, seed: list[int]) -> Iterator[Tensor]:
    """Batches of `count` of 0..size, each index once but where there are fewer than `count`."""
    generator = np.random.default_rng(seed)
    rounds = max(1, -(-count // size))
    order = np.concatenate([generator.permutation(size) for _ in range(rounds)])
    for start in range(0, max(1, size // count) * count, count):
        yield torch.from_numpy(order[start : start + count])


def _part(chosen: Tensor, window: _Window, third: int) -> Dealt:
    """This rank's part of the batch of these (2T,) places in the window."""
    rank = distributed.rank()
    at = window.holders[chosen]
    mine = (at == rank).nonzero().squeeze(1)
    position = (window.holders == rank).cumsum(0) - 1
    load = [int((at == r).sum()) for r in range(distributed.world_size())]
    seen = []
    for place in range(third):  # whoever has least to do takes the next
        idle = load.index(min(load))
        load[idle] += 1
        if idle == rank:
            seen.append(place)
    images = window.images[position[chosen[mine]]]
    return Dealt(images, mine, torch.tensor(seen, dtype=torch.long))
