"""Energies from the features of normals: whitening, patch axes, prototypes.

Knows features and parts; nothing of anomalies, scores or files. Collective: under
torch.distributed every rank calls it with its own maps and the same pooled features.
Letters: n images, P pooled features, D features of a space, C prototypes.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import Codebook, assign, kmeans, refresh
from dpdl_core.config import (
    DpdlConfig,
    is_quartered,
    moment_stages,
    patch_stages,
    patch_step,
    quartered_stages,
    stage_numbers,
)
from dpdl_core.observe import Features
from dpdl_core.parts import (
    FIRST,
    Energies,
    PatchEnergy,
    PatchSpace,
    PooledEnergy,
    quadrant_columns,
    whitening,
)
from dpdl_core.seeding import count_distinct

PATCH_SAMPLE = 40_000
"""Most patches, over all ranks, that prototypes are fitted to."""
_SLICE = 128
"""Images whose patches are written out at a time."""


def blank_energies(config: DpdlConfig, channels: list[int], sizes: dict[str, int]) -> Energies:
    """Energies of the right shapes with nothing learnt; sizes as Energies.sizes."""
    return Energies(
        {
            space: PooledEnergy(
                pooled_columns(config, channels, space),
                config.pooled_axes,
                sizes[f"pooled {space}"],
            )
            for space in config.pooled_spaces
        },
        {
            space: PatchEnergy(
                patch_space(config, channels, space),
                sizes[f"patch {space}"],
                config.eps,
                config.patch_worst,
            )
            for space in config.patch_spaces
        },
    )


def fit_energies(
    config: DpdlConfig,
    channels: list[int],
    pooled: Tensor,
    features: Features,
    *,
    generator: torch.Generator,
    start: Energies | None = None,
    iterations: int = 10,
) -> Energies:
    """Whitening, axes and prototypes from normals.

    pooled (N, P) is the same on every rank, features are this rank's. With `start`, patch axes
    are taken over and prototypes start from its, which keeps folds cheap and their energies
    comparable.
    """
    patches: dict[str, PatchEnergy] = {}
    for space in config.patch_spaces:
        before = start.patches[space] if start is not None else None
        assert before is None or isinstance(before, PatchEnergy)
        if before is None:
            axes = fit_axes(patch_space(config, channels, space), features)
        else:
            axes = before.space
        rows = sample_patches(axes, features, generator)
        book = fit_codes(
            rows,
            config.patch_prototypes,
            before.bridge.means.detach() if before is not None else None,
            iterations,
            generator,
        )
        patches[space] = PatchEnergy(axes, len(book.means), config.eps, config.patch_worst)
        patches[space].bridge = bridge_to(book, config.eps)
    return Energies(
        {s: fit_pooled(config, channels, s, pooled, generator) for s in config.pooled_spaces},
        patches,
    )


@torch.no_grad()
def leave_out(
    energy: PatchEnergy, features: Features, fold_of: Tensor, folds: int, generator: torch.Generator
) -> list[PatchEnergy]:
    """The energy as each fold's absence would leave it, for one look at the patches in all.

    One step of Lloyd from its prototypes on the patches of the other folds: those of a fold are
    taken out of the sums. A prototype of that fold's patches only is no prototype. Variances stay.
    fold_of (n,): of this rank's images.
    """
    means, dims = energy.bridge.means.detach(), energy.bridge.means.shape[1]
    rows = sample_patches(energy.space, features, generator)
    mine = fold_of.repeat_interleave(len(rows) // max(1, len(fold_of)))
    place = mine * len(means) + assign(rows, means)[0]
    size = folds * len(means)
    sums = torch.zeros(size, dims, dtype=torch.float64).index_add_(0, place, rows.double())
    sums = distributed.all_sum(sums).view(folds, len(means), dims)
    counts = distributed.all_sum(place.bincount(minlength=size)).view(folds, len(means))
    found = []
    for fold in range(folds):
        members = counts.sum(0) - counts[fold]
        left = members > 0
        codes = ((sums.sum(0) - sums[fold])[left] / members[left, None]).to(means)
        part = PatchEnergy(energy.space, len(codes), energy.bridge.eps, energy.worst)
        weights = torch.full((len(codes),), -math.log(len(codes)))
        part.bridge = Bridge(codes, energy.bridge.variances[:1], weights, energy.bridge.eps)
        found.append(part)
    return found


def fit_pooled(
    config: DpdlConfig, channels: list[int], space: str, pooled: Tensor, generator: torch.Generator
) -> PooledEnergy:
    """One pooled space: whitened by its shrunk covariance, then prototypes of unit variance."""
    columns = pooled_columns(config, channels, space)
    codes = min(config.pooled_prototypes, max(1, len(pooled) // 10))
    part = PooledEnergy(columns, config.pooled_axes, codes)
    for name, value in whitening(pooled[:, columns], config.pooled_axes)._asdict().items():
        getattr(part, name).copy_(value)
    if codes > 1:
        white = part.whiten(pooled)
        shard = white.tensor_split(distributed.world_size())[distributed.rank()]
        codes = min(codes, count_distinct(shard, codes))
        book = kmeans(shard, codes, iterations=20, generator=generator)
        part.bridge = Bridge(book.means, torch.ones(1, len(columns)), book.log_weights, eps=1.0)
    return part


def fit_axes(space: PatchSpace, features: Features) -> PatchSpace:
    """Principal axes of the joined patches, from sums over all ranks."""
    in_dims = len(space.center)
    first = torch.zeros(in_dims, dtype=torch.float64)
    second = torch.zeros(in_dims, in_dims, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for _, maps in features.batches(_SLICE):
        rows = space.join(maps).flatten(0, 1)
        first += rows.sum(0, dtype=torch.float64)
        second += (rows.T @ rows).double()
        count += len(rows)
    first, second, count = (distributed.all_sum(t) for t in (first, second, count))
    mean = first / count
    covariance = second / count - torch.outer(mean, mean)
    _, axes = torch.linalg.eigh(covariance)
    axes = axes[:, -space.axes.shape[1] :].flip(1)
    # eigh leaves signs open; fix them, so that two machines agree.
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    space.center.copy_(mean)
    space.axes.copy_(axes * signs)
    return space


def sample_patches(space: PatchSpace, features: Features, generator: torch.Generator) -> Tensor:
    """This rank's share of at most PATCH_SAMPLE patches, evenly from its images, (n, D)."""
    counts = distributed.row_counts(features.pooled)
    per_image = min(space.grid**2, max(1, PATCH_SAMPLE // max(1, sum(counts))))
    # One draw of places per image, over all ranks, so that shards do not change the sample.
    noise = torch.rand(sum(counts), space.grid**2, generator=generator)
    places = distributed.broadcast(noise.argsort(1)[:, :per_image].contiguous())
    start = sum(counts[: distributed.rank()])
    places = places[start : start + len(features)]
    parts = [torch.empty(0, space.axes.shape[1])]
    for i, (_, maps) in enumerate(features.batches(_SLICE)):
        rows = space.everywhere(maps)
        chosen = places[i * _SLICE : i * _SLICE + len(rows)]
        parts.append(rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1))
    return torch.cat(parts)


def fit_codes(
    rows: Tensor,
    num_codes: int,
    init: Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> Codebook:
    """k-means on this rank's rows; never more codes than a third of all rows, nor than distinct
    ones: a camera that saw the same picture again and again has few."""
    total = sum(distributed.row_counts(rows))
    num_codes = min(num_codes if init is None else len(init), max(1, total // 3))
    num_codes = min(num_codes, count_distinct(rows, num_codes))
    init = None if init is None else init[:num_codes]
    book = kmeans(
        rows, num_codes, restarts=1, iterations=iterations, init=init, generator=generator
    )
    if init is not None:
        return book  # in its order already
    order = distributed.broadcast(covering(book.means, book.counts, FIRST))
    return Codebook(book.means[order], book.counts[order], book.variances[order], book.inertia)


def covering(points: Tensor, weights: Tensor, first: int) -> Tensor:
    """An order (C,) of points (C, D) whose `first` stand for all: the weighted sum of squared
    distances to the nearest of them is small.

    Each of these is the one that lowers the sum most, which leaves at most 1/e of what the best
    choice would gain (Nemhauser, Wolsey, Fisher, Math. Programming 14, 1978); the others follow in
    the order they had.
    """
    far = torch.cdist(points, points).square()
    nearest = far.new_full((len(points),), float(far.max()))
    left = torch.ones(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for _ in range(min(first, len(points))):
        gain = (nearest - far).clamp_min(0) @ weights.to(far)
        pick = int(gain.masked_fill(~left, -1.0).argmax())
        chosen.append(pick)
        left[pick] = False
        nearest = torch.minimum(nearest, far[pick])
    return torch.cat([torch.tensor(chosen, device=points.device), left.nonzero().squeeze(1)])


def bridge_to(book: Codebook, eps: float) -> Bridge:
    """A bridge to the codes with the pooled variance within clusters, one for all dimensions.

    Uniform weights and one variance: what is rare among normals is as normal as what is common,
    and distances stay those of unit-norm patches; a variance per prototype or per dimension was
    worse on small sets (docs/accuracy.md).
    """
    num_codes, dims = book.means.shape
    variance = max(book.inertia / (float(book.counts.sum()) * dims), 1e-8)
    weights = torch.full((num_codes,), -math.log(num_codes))
    return Bridge(book.means, torch.full((1, dims), variance), weights, eps)


def renew_energies(
    config: DpdlConfig,
    channels: list[int],
    pooled: Tensor,
    features: Features,
    before: Energies,
    *,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Energies, dict[str, int]]:
    """Energies on the present normals, every prototype under its old number where it lives on.

    Whitening is computed anew, patch axes are kept (prototypes live in them); Lloyd takes at most
    `iterations` from the present prototypes. Also returns how many prototypes there are and how
    many were kept, replaced and revived.
    """
    counts = {"prototypes": 0, "kept": 0, "replaced": 0, "revived": 0}
    patches: dict[str, PatchEnergy] = {}
    for space in config.patch_spaces:
        old = before.patches[space]
        assert isinstance(old, PatchEnergy)
        rows = sample_patches(old.space, features, generator)
        new = refresh(
            rows,
            old.bridge.means,
            old.bridge.variances[:1],
            old.bridge.log_weights,
            blend=1.0,
            iterations=iterations,
        )
        # A copy: either model may be moved to another device by itself.
        same = copy.deepcopy(old.space)
        patches[space] = PatchEnergy(same, len(new.means), config.eps, config.patch_worst)
        patches[space].bridge = Bridge(new.means, new.variances, old.bridge.log_weights, config.eps)
        counts["prototypes"] += len(new.means)
        for name in ("kept", "replaced", "revived"):
            counts[name] += int(getattr(new, name).sum())
    pooled_parts = {
        s: fit_pooled(config, channels, s, pooled, generator) for s in config.pooled_spaces
    }
    return Energies(pooled_parts, patches), counts


def pooled_columns(config: DpdlConfig, channels: list[int], space: str) -> list[int]:
    """Where a space's features lie among the columns of pool()."""
    stages = _stages(channels, moment_stages(space))
    starts = [2 * sum(channels[:stage]) for stage in stages]
    if not is_quartered(space):
        widths = [2 * channels[stage] for stage in stages]
        return [c for start, w in zip(starts, widths, strict=True) for c in range(start, start + w)]
    quadrants = quadrant_columns(channels, quartered_stages(config))[stages[0]]
    return [*range(starts[0], starts[0] + channels[stages[0]]), *quadrants]


def patch_space(config: DpdlConfig, channels: list[int], space: str) -> PatchSpace:
    """An empty patch space of the right shapes."""
    stages = _stages(channels, patch_stages(space))
    in_dims = sum(channels[s] for s in stages)
    return PatchSpace(
        stages,
        in_dims,
        min(config.patch_dims, in_dims),
        grid=config.patch_side,
        smooth=space.endswith(("s", "h")),
        step=patch_step(space),
    )


def check_spaces(config: DpdlConfig, channels: list[int]) -> None:
    """Raises ValueError where a space asks for a stage that a trunk with these channels has not."""
    for space in config.pooled_spaces:
        _stages(channels, moment_stages(space))
    for space in config.patch_spaces:
        _stages(channels, patch_stages(space))


def _stages(channels: list[int], space: str) -> list[int]:
    stages = stage_numbers(space)
    if stages[-1] >= len(channels):
        raise ValueError(f"space {space!r}: this trunk has stages 1-{len(channels)}")
    return stages
