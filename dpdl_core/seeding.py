"""Seeds for k-means: k-means++ on a bounded sample, and the count of distinct vectors.

Knows tensors and ranks only. Used by codebook.py. Paper: Arthur and Vassilvitskii 2007 (D^2
seeding); greedy draws as in scikit-learn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpdl_core.distributed import broadcast, gather_rows, rank, row_counts

SEED_SAMPLE = 50_000
"""Most vectors that k-means++ looks at; Lloyd's iterations see all of them."""
_SAMPLE_PER_CODE = 16
_SAMPLE_LEAST = 8192
_SEED_ROUNDS = 256
"""Up to so many codes are seeded one by one; of more, some at a time."""


def seed(sample: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each seed is drawn with probability proportional to its squared distance.

    One by one, a seed is the best of a few draws (greedy k-means++). For a thousand codes and
    more, a block of draws per round costs a fraction and Lloyd evens it out.
    """
    norms = sample.square().sum(1)
    block = max(1, num_codes // _SEED_ROUNDS)
    draws = 2 + int(math.log(num_codes)) if block == 1 else block
    chosen = torch.randint(len(sample), (1,), generator=generator, device=_device(generator))
    seeds = [chosen.to(sample.device)]
    nearest = _distances(sample, norms, seeds[0]).squeeze(0)
    while (left := num_codes - sum(map(len, seeds))) > 0:
        odds = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        odds = odds.to(_device(generator))
        wanted = min(draws, int((odds > 0).sum()))
        drawn = torch.multinomial(odds, wanted, generator=generator).to(sample.device)
        distances = torch.minimum(nearest, _distances(sample, norms, drawn))
        if block == 1:
            best = distances.sum(1).argmin()
            drawn, distances = drawn[best : best + 1], distances[best : best + 1]
        seeds.append(drawn[:left])
        nearest = distances[:left].amin(0)
    return sample[torch.cat(seeds)]


def _distances(sample: Tensor, norms: Tensor, drawn: Tensor) -> Tensor:
    """Squared distances of the drawn rows to all of the sample, (draws, sample)."""
    squared = norms[drawn].unsqueeze(1) + norms - 2 * sample[drawn] @ sample.T
    squared.clamp_(min=0)
    squared[torch.arange(len(drawn), device=drawn.device), drawn] = 0
    return squared


def bounded_sample(x: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Rows enough to seed from: the same on every rank, whatever the number of ranks."""
    counts = row_counts(x)
    total, start = sum(counts), sum(counts[: rank()])
    size = min(SEED_SAMPLE, max(_SAMPLE_LEAST, _SAMPLE_PER_CODE * num_codes))
    if total <= size:
        return gather_rows(x)
    order = torch.randperm(total, generator=generator, device=_device(generator))
    picked = broadcast(order[:size].sort().values.to(x.device))
    mine = picked[(picked >= start) & (picked < start + len(x))] - start
    return gather_rows(x[mine])


def count_distinct(x: Tensor, limit: int) -> int:
    """Number of distinct rows over all ranks, exact below `limit`; float32 or float64.

    Rows are compared by a 64-bit hash of their bits (exact integer arithmetic; a random dot
    product in floating point could differ for equal rows).
    """
    bits = torch.int32 if x.dtype == torch.float32 else torch.int64
    drawn = torch.Generator().manual_seed(0)
    salt = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=drawn).to(x.device)
    hashes = [  # + 0.0 makes one of the two zeros
        ((rows + 0.0).view(bits).long() * salt).sum(1) for rows in torch.split(x, 1 << 14)
    ]
    mine = torch.unique(torch.cat(hashes))[:limit]
    return len(torch.unique(gather_rows(mine)))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
