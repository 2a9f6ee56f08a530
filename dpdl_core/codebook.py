"""Vector quantisation of normal features: k-means, a moving codebook, and its refresh.

Knows tensors and ranks only (distributed.py). Used by estimate.py, and in tuning by tune.py,
tune_network.py and renewal.py. Paper: DPDL eq. 15 and section 4.2.
Letters: N vectors (this rank's shard), C codes, D features; distances are squared Euclidean.

Every function is collective under torch.distributed: ranks pass their own rows and end with the
same codes. Sums and counts are all-reduced; what is drawn at random is drawn from rank 0's
generator. The result does not depend on the number of ranks beyond rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dpdl_core.distributed import all_sum, broadcast, gather_rows, rank, row_counts, world_size
from dpdl_core.seeding import bounded_sample, count_distinct, seed

DEAD_SHARE = 0.1
"""A code used less than this share of an even use is dead."""
TOLERANCE = 3e-4
"""Share of its inertia by which Lloyd must still get better to go on."""
_CHUNK_COSTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Entries of the N x C distance matrix in memory at a time."""


@dataclass(frozen=True)
class Codebook:
    """C codes with what k-means knows of their members."""

    means: Tensor
    """(C, D)."""
    counts: Tensor
    """(C,), members over all ranks."""
    variances: Tensor
    """(C, D), mean squared deviation of the members; 0 for a lone member."""
    inertia: float
    """Sum of squared distances to the nearest code."""

    @property
    def log_weights(self) -> Tensor:
        """(C,), log shares of use, smoothed by one member each so that none is -inf."""
        counts = self.counts.to(self.means.dtype)
        return ((counts + 1) / (counts.sum() + len(counts))).log()

    def shrunk_variances(self, prior_members: float = 10.0) -> Tensor:
        """(C, D), above 0: each code's variance drawn to the pooled one, as if the pool had
        contributed `prior_members` members. A code of three members says little of its own."""
        counts = self.counts.to(self.means.dtype).unsqueeze(1)
        pooled = (counts * self.variances).sum(0) / counts.sum()
        between = self.means.var(0, correction=0).mean()
        floor = 1e-6 * torch.where(pooled.mean() > 0, pooled.mean(), between)
        pooled = pooled.clamp_min(floor.clamp_min(1e-12))
        return (counts * self.variances + prior_members * pooled) / (counts + prior_members)


def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    restarts: int = 3,
    iterations: int = 50,
    tolerance: float = TOLERANCE,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
) -> Codebook:
    """Lloyd's k-means from the best of `restarts` k-means++ seeds, or from `init` (C, D).

    Seeds are drawn, refined and compared on a sample; the best goes on to all vectors, where
    a pass is dear and few are left to do.

    x (N, D): this rank's rows; ranks' rows in rank order are the data. Stops when no vector
    changes its code or inertia falls by less than `tolerance` of itself. No code ends unused:
    an empty one moves to the vector farthest from its own code.

    Raises ValueError if x has fewer distinct vectors than num_codes, or is not finite.
    """
    _check_vectors(x, num_codes)
    center = _mean(x)
    if init is None:
        sample = bounded_sample(x, num_codes, generator) - center
        share = sample.tensor_split(world_size())[rank()]
        seeds = [seed(sample, num_codes, generator) for _ in range(max(1, restarts))]
        runs = [
            _lloyd(share, 0 * center, broadcast(start), iterations, tolerance) for start in seeds
        ]
        start = min(runs, key=lambda run: run.inertia).codes
    elif init.shape != (num_codes, x.shape[1]):
        raise ValueError(f"init is {tuple(init.shape)}: want ({num_codes}, {x.shape[1]})")
    else:
        start = init.to(x) - center
    # Empty codes may need more rounds: two can land on copies of one vector.
    return _describe(x, center, _lloyd(x, center, start, iterations, tolerance, num_codes))


def assign(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code (N,) and the squared distance to it (N,) of each of this rank's rows."""
    step = _pass(x, codes.mean(0), codes - codes.mean(0))
    return step.nearest, step.distances


def match(old: Tensor, new: Tensor, num_codes: int) -> Tensor:
    """Which new code continues each old one: (C,), new_of_old, a permutation.

    old, new (N,): codes of the same vectors before and after. Maximises the number of vectors
    that keep company (Hungarian on co-assignment counts over all ranks); distances between
    centroids would confuse identities once features drift.
    """
    together = _together(old, new, num_codes)
    _, new_of_old = linear_sum_assignment(together.cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(new_of_old)).to(old.device)


# Refresh ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refreshed:
    """Prototypes after a refresh, in the old ones' order, and what became of each."""

    means: Tensor
    """(C, D)."""
    variances: Tensor
    """(C, D), or (1, D) where shared ones were given."""
    log_weights: Tensor
    """(C,), sum to one under exp."""
    overlap: Tensor
    """(C,), the share of a prototype's present members that were its own before, in [0, 1].
    What it lost does not count: strangers may have stood nearest to it for want of another."""
    kept: Tensor
    """(C,) bool: overlap above `min_overlap`."""
    replaced: Tensor
    """(C,) bool: not kept; a new thing under an old number. Its optimiser moments are void."""
    revived: Tensor
    """(C,) bool: dead before, used now; a part of `replaced`."""


def refresh(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    log_weights: Tensor,
    *,
    blend: float = 0.7,
    usage_mix: float = 0.5,
    min_overlap: float = 0.5,
    iterations: int = 25,
) -> Refreshed:
    """Renew prototypes on features of old and new normals, taken with the present trunk.

    Lloyd from the present means; identities by `match`; a kept prototype moves by `blend` of
    the way to its code and keeps its variances, a replaced one takes its code's place and
    variances. Weights mix `usage_mix` of the smoothed present use into the old. Where x has fewer
    distinct vectors than there are prototypes, it is too little to place them by: all stay.
    Shapes as in Bridge; x (N, D) is this rank's shard.
    """
    if not 0 < blend <= 1:
        raise ValueError(f"blend={blend}: want a share in (0, 1]")
    num_codes = len(means)
    means = means.detach().to(x)
    _check_finite(x)
    if count_distinct(x, num_codes) < num_codes:
        all_of_them = torch.ones(num_codes, dtype=torch.bool, device=x.device)
        return Refreshed(
            means=means,
            variances=variances.detach().to(x),
            log_weights=log_weights.detach().to(x).log_softmax(0),
            overlap=all_of_them.to(x),
            kept=all_of_them,
            replaced=~all_of_them,
            revived=~all_of_them,
        )
    center = _mean(x)
    run = _lloyd(x, center, means - center, iterations, TOLERANCE, num_codes)
    book, old, new = _describe(x, center, run), run.first, run.nearest

    together = _together(old, new, num_codes)
    order = match(old, new, num_codes)
    old_counts, new_counts = together.sum(1), book.counts[order]
    shared = together[torch.arange(num_codes, device=x.device), order]
    overlap = shared / new_counts.clamp_min(1)
    kept = overlap > min_overlap
    dead_below = DEAD_SHARE * old_counts.sum() / num_codes

    found = book.means[order]
    keep = kept.unsqueeze(1)
    if len(variances) == num_codes:
        fresh = book.shrunk_variances()[order]
        variances = torch.where(keep, variances.detach().to(x), fresh)
    used = book.log_weights[order].exp()
    before = log_weights.detach().to(x).softmax(0)
    weights = torch.where(kept, (1 - usage_mix) * before + usage_mix * used, used)
    return Refreshed(
        means=torch.where(keep, means + blend * (found - means), found),
        variances=variances,
        log_weights=(weights / weights.sum()).log(),
        overlap=overlap,
        kept=kept,
        replaced=~kept,
        revived=~kept & (old_counts < dead_below) & (new_counts >= dead_below),
    )


def reset_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Tensor) -> None:
    """Zero the optimiser's memory of the given rows (mask or indices) of one parameter.

    Moments of a replaced prototype pull its successor to where the old one was going; those of
    the others must stay, or the whole codebook takes a cold step.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows.to(value.device)] = 0


# Moving codebook ----------------------------------------------------------------------------


class EmaCodebook(nn.Module):
    """Codes that follow the features of a trunk in training, by moving averages, not gradients.

    Buffers: means (C, D); share (C,), the moving share of vectors per code. The moving sum of
    a code is means * share by construction: it starts at e * n and cannot fall out of step.
    Shares instead of counts make the threshold of death follow the size of the batch.
    """

    means: Tensor
    share: Tensor

    def __init__(self, codebook: Codebook, *, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", codebook.means.detach().clone())
        counts = codebook.counts.to(codebook.means.dtype)
        self.register_buffer("share", counts / counts.sum())

    @torch.no_grad()
    def update(self, x: Tensor, energy: Tensor | None = None) -> Tensor:
        """One step on a batch of normal vectors (N, D), normals only. Returns replaced, (C,) bool.

        A code whose share fell below DEAD_SHARE / C is set on the batch's vector of largest
        energy (N,); without energies, the one farthest from its code.
        """
        x = x.detach().to(self.means)
        step = _pass(x, self.means.mean(0), self.means - self.means.mean(0))
        counts, sums = all_sum(step.counts), all_sum(step.sums)
        total = counts.sum().clamp_min(1)
        self.share.mul_(self.decay).add_((1 - self.decay) * (counts / total).to(self.share))
        used = counts > 0
        pace = (1 - self.decay) * (counts / total).to(self.share) / self.share
        batch_means = (sums / counts.clamp_min(1).unsqueeze(1)).to(x) + self.means.mean(0)
        moved = self.means + pace.unsqueeze(1) * (batch_means - self.means)
        self.means.copy_(torch.where(used.unsqueeze(1), moved, self.means))

        replaced = self.share < DEAD_SHARE / len(self.share)
        rows = _largest(x, step.distances if energy is None else energy.detach(), replaced.sum())
        indices = replaced.nonzero().squeeze(1)[: len(rows)]
        replaced = torch.zeros_like(replaced).index_fill_(0, indices, True)
        self.means[indices] = rows
        self.share[indices] = 1 / len(self.share)
        return replaced


# Inside -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One look at this rank's rows; sums, like codes, are relative to a center."""

    nearest: Tensor
    distances: Tensor
    sums: Tensor
    """(C, D), float64."""
    counts: Tensor
    """(C,), int64."""


@dataclass(frozen=True)
class _Run:
    codes: Tensor
    first: Tensor
    """(N,) nearest of the codes that it started from."""
    nearest: Tensor
    counts: Tensor
    inertia: float


def _pass(x: Tensor, center: Tensor, codes: Tensor) -> _Step:
    """Assign rows to centred codes and sum them up, a chunk of rows at a time.

    argmin of |e|^2 / 2 - x'e is one matrix product, good enough to choose by; the distance
    itself is taken from the difference, because the expanded form cancels near a code.
    """
    num_codes = len(codes)
    half_norms = codes.square().sum(1) / 2
    nearest, distances = [], []
    sums = torch.zeros(codes.shape, dtype=torch.float64, device=x.device)
    step = max(1, _CHUNK_COSTS.get(x.device.type, 1 << 20) // num_codes)
    for chunk in torch.split(x, step):
        rows = chunk - center
        index = torch.addmm(half_norms, rows, codes.T, alpha=-1).argmin(1)
        nearest.append(index)
        distances.append((rows - codes[index]).square().sum(1))
        sums += torch.zeros_like(codes).index_add_(0, index, rows)
    found = torch.cat(nearest)
    return _Step(found, torch.cat(distances), sums, found.bincount(minlength=num_codes))


def _lloyd(
    x: Tensor, center: Tensor, codes: Tensor, iterations: int, tolerance: float, rescues: int = 0
) -> _Run:
    """At most `iterations`, and up to `rescues` more while a code has no member."""
    before: Tensor | None = None
    first: Tensor | None = None
    best = float("inf")
    for iteration in range(iterations + rescues + 1):
        step = _pass(x, center, codes)
        first = step.nearest if first is None else first
        counts = all_sum(step.counts)
        inertia = float(all_sum(step.distances.sum(dtype=torch.float64)))
        empty = counts == 0
        changed = before is None or bool(all_sum((step.nearest != before).sum()) > 0)
        settled = not changed or best - inertia <= tolerance * inertia
        if not empty.any() and (settled or iteration >= iterations):
            break
        if empty.any():
            # Before any other code moves: strangers leave for the code set among them, and do
            # not drag away the one they stood nearest to.
            codes = codes.clone()
            codes[empty] = _largest(x, step.distances, empty.sum()) - center
            before, best = None, float("inf")
        else:
            codes = (all_sum(step.sums) / counts.unsqueeze(1)).to(codes)
            before, best = step.nearest, inertia
    assert first is not None
    return _Run(codes, first, step.nearest, counts, inertia)


def _describe(x: Tensor, center: Tensor, run: _Run) -> Codebook:
    """The codes that `nearest` was taken by, and the members' spread about them."""
    shape = run.codes.shape
    counts = run.counts.clamp_min(1).unsqueeze(1)
    sums = torch.zeros(shape, dtype=torch.float64, device=x.device)
    rows_per_step = _CHUNK_COSTS["cpu"] // 64
    for rows, index in zip(
        torch.split(x, rows_per_step), torch.split(run.nearest, rows_per_step), strict=True
    ):
        gaps = (rows - center - run.codes[index]).square()
        sums += torch.zeros(shape, dtype=x.dtype, device=x.device).index_add_(0, index, gaps)
    variances = (all_sum(sums) / counts).to(x)
    return Codebook(run.codes + center, run.counts, variances, run.inertia)


def _largest(x: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The rows with the largest values over all ranks, at most `wanted`, on every rank."""
    top = values.topk(min(int(wanted), len(values)))
    values, rows = gather_rows(top.values), gather_rows(x[top.indices])
    return rows[values.argsort(descending=True, stable=True)[: int(wanted)]]


def _mean(x: Tensor) -> Tensor:
    count = sum(row_counts(x))
    return (all_sum(x.sum(0, dtype=torch.float64)) / count).to(x)


def _together(old: Tensor, new: Tensor, num_codes: int) -> Tensor:
    """(C, C): how many vectors of all ranks had old code i and have new code j."""
    pairs = (old * num_codes + new).bincount(minlength=num_codes**2)
    return all_sum(pairs).view(num_codes, num_codes)


def _check_finite(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"vectors are {x.dtype} {tuple(x.shape)}: want float32 or 64, (N, D)")
    if int(all_sum((~x.isfinite()).any(1).sum())):
        raise ValueError("vectors hold NaN or infinity: want finite features")


def _check_vectors(x: Tensor, num_codes: int) -> None:
    _check_finite(x)
    if num_codes < 1:
        raise ValueError(f"num_codes={num_codes}: need at least 1")
    distinct = count_distinct(x, num_codes)
    if distinct < num_codes:
        raise ValueError(
            f"num_codes={num_codes} but only {distinct} distinct vectors: "
            f"use at most {distinct} codes, or give more images"
        )
