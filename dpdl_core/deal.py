"""Which images make a training batch, and which rank brings them: the same batch on any number.

Knows shards and ranks only. Used by tune.py. MATH.md section 3: a third normals, a third normals
to spoil, a third seen anomalies.

Normals are drawn without replacement from windows of the data set's order, so that a shard is
read as a stream and a rank holds its part of one window. What is drawn follows from the seed, the
pass and the window; no rank asks another.
Letters: T a third of a batch, n normals of it on this rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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


def deal(normals: Shard, third: int, *, seed: int, skip: int = 0) -> Iterator[Dealt]:
    """Batches for ever, the first `skip` left out. Collective once, at the first."""
    everyone, holders = normals.everyone()
    windows = torch.arange(len(everyone)).tensor_split(max(1, round(len(everyone) / WINDOW)))
    per_window = [max(1, len(window) // (2 * third)) for window in windows]
    for number in itertools.count():
        if skip >= sum(per_window):
            skip -= sum(per_window)
            continue
        reader = Reader(normals)
        for at, window in enumerate(windows):
            held = holders[window]
            images = reader.take(int((held == distributed.rank()).sum()))
            for chosen in _drawn(len(window), 2 * third, [seed, number, at]):
                if skip > 0:
                    skip -= 1
                    continue
                yield _part(chosen, held, images, third)


def _drawn(size: int, count: int, seed: list[int]) -> Iterator[Tensor]:
    """Batches of `count` of 0..size, each index once but where there are fewer than `count`."""
    generator = np.random.default_rng(seed)
    rounds = max(1, -(-count // size))
    order = np.concatenate([generator.permutation(size) for _ in range(rounds)])
    for start in range(0, max(1, size // count) * count, count):
        yield torch.from_numpy(order[start : start + count])


def _part(chosen: Tensor, holders: Tensor, images: Tensor, third: int) -> Dealt:
    """chosen (2T,) indices into a window; holders their ranks; images this rank's, in order."""
    rank = distributed.rank()
    mine = (holders[chosen] == rank).nonzero().squeeze(1)
    position = (holders == rank).cumsum(0) - 1
    load = [int((holders[chosen] == r).sum()) for r in range(distributed.world_size())]
    seen = []
    for place in range(third):  # whoever has least to do takes the next
        idle = load.index(min(load))
        load[idle] += 1
        if idle == rank:
            seen.append(place)
    return Dealt(images[position[chosen[mine]]], mine, torch.tensor(seen, dtype=torch.long))
