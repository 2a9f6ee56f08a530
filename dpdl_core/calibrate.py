"""How much each part is worth: cross-fitted values, cut-paste on held-out normals, weights.

Knows features and energies; nothing of files or the trunk's training.
Letters: K kept normals over all ranks, M seen anomalies, E energies, V parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.config import DpdlConfig, direction_spaces
from dpdl_core.estimate import fit_energies, fit_pooled, leave_out
from dpdl_core.learn import Parts, fit_heads, head_sample
from dpdl_core.observe import Features, Normals, Spoil
from dpdl_core.parts import Energies, PatchEnergy, PooledEnergy
from dpdl_core.twins import twins

LEVELS = ((0.02, 0.15, 1.0), (0.005, 0.04, 0.6), (0.002, 0.01, 0.6))
"""Cut-paste from plain to faint: least and largest share of the image's area, and opacity."""


def make_spoilers(seed: int) -> list[Spoil]:
    """One cut-paste per level; what it does to an image depends on its number alone."""
    return [_Spoiler(level, seed) for level in range(len(LEVELS))]


@dataclass(frozen=True)
class _Spoiler:
    level: int
    seed: int

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        return torch.stack(
            [
                self._one(image, torch.Generator().manual_seed(self._seed_of(int(number))))
                for image, number in zip(images, numbers, strict=True)
            ]
        )

    def _seed_of(self, number: int) -> int:
        return (self.seed * 1_000_003 + number) * len(LEVELS) + self.level

    def _one(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One rectangle of an image (S, S, 3), its colours jittered, pasted elsewhere in it."""
        low, high, opacity = LEVELS[self.level]
        u = torch.rand(8, generator=generator).tolist()
        side = image.shape[0]
        area = (low + u[0] * (high - low)) * side**2
        aspect = math.exp((2 * u[1] - 1) * math.log(1 / 0.3))
        height = min(side - 1, max(2, round(math.sqrt(area * aspect))))
        width = min(side - 1, max(2, round(math.sqrt(area / aspect))))
        top, left = int(u[2] * (side - height)), int(u[3] * (side - width))
        to_top, to_left = int(u[4] * (side - height)), int(u[5] * (side - width))
        patch = image[top : top + height, left : left + width].float()
        patch = patch * (0.9 + 0.2 * u[6]) + 25.6 * (u[7] - 0.5)
        spoiled = image.clone()
        place = spoiled[to_top : to_top + height, to_left : to_left + width]
        mixed = (1 - opacity) * place.float() + opacity * patch
        place.copy_(mixed.round().clamp(0, 255).to(torch.uint8))
        return spoiled


@dataclass(frozen=True)
class CrossFit:
    """Values of images under fits that have not seen them; the same on every rank."""

    normals: Tensor
    """(K, V)."""
    spoiled: list[Tensor]
    """Per level, (K', V)."""
    seen: Tensor
    """(M, V) of the seen anomalies, which the fit does not know either; empty for M < 2."""


def cross_fit(
    config: DpdlConfig,
    channels: list[int],
    normals: Normals,
    seen: Features,
    full: Energies,
    *,
    generator: torch.Generator,
    keep: Parts | None = None,
) -> CrossFit:
    """Every kept normal, spoiled normal and seen anomaly under fits without it.

    With `keep`, as in a renewal, each fold's prototypes are the full ones with its own patches
    taken out, which costs one look at the patches in all.
    """
    folds = min(config.folds, len(normals.kept))
    fold_of = deal_folds(normals.thumbnails, folds, generator)
    mine = fold_of[normals.mine]
    num_parts = len(Parts(config, channels, full).names)
    values = torch.zeros(len(mine), num_parts)
    spoiled = [torch.zeros(len(level), num_parts) for level in normals.spoiled]
    seen_fold = torch.arange(len(seen)) % folds
    seen_values = torch.zeros(len(seen) if len(seen) > 1 else 0, num_parts)
    patches = None
    if keep is not None:
        patches = _without_each(full, normals.features, mine, folds, generator)
    for fold in range(folds):
        inside = torch.ones(len(normals.pooled), dtype=torch.bool)
        inside[normals.kept[fold_of == fold]] = False
        local = normals.features.take((mine != fold).nonzero().squeeze(1))
        pooled = normals.pooled[inside]
        if patches is not None:
            spaces = config.pooled_spaces
            energies = Energies(
                {s: fit_pooled(config, channels, s, pooled, generator) for s in spaces},
                patches[fold],
            )
        else:
            energies = fit_energies(
                config, channels, pooled, local, generator=generator, start=full, iterations=2
            )
        known = (seen_fold != fold).nonzero().squeeze(1) if len(seen_values) else seen_fold
        parts = fit_parts(config, channels, energies, local, seen.take(known), generator, keep)
        held = (mine == fold).nonzero().squeeze(1)
        values[held] = part_values(parts, normals.features.take(held))
        held = (mine[normals.spoiled_rows] == fold).nonzero().squeeze(1)
        for level, found in zip(spoiled, normals.spoiled, strict=True):
            level[held] = part_values(parts, found.take(held))
        held = (seen_fold == fold).nonzero().squeeze(1)
        if len(seen_values):
            seen_values[held] = part_values(parts, seen.take(held))
    places = distributed.gather_rows(normals.mine)
    return CrossFit(
        distributed.gather_rows(values)[places.argsort()],
        [distributed.gather_rows(level) for level in spoiled],
        seen_values,
    )


def _without_each(
    full: Energies, features: Features, fold_of: Tensor, folds: int, generator: torch.Generator
) -> list[dict[str, PatchEnergy]]:
    """Per fold, the patch energies by space."""
    found: list[dict[str, PatchEnergy]] = [{} for _ in range(folds)]
    for space, part in full.patches.items():
        assert isinstance(part, PatchEnergy)
        for fold, left in enumerate(leave_out(part, features, fold_of, folds, generator)):
            found[fold][space] = left
    return found


def deal_folds(thumbnails: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold for each of the pictures (K, SIDE, SIDE), evenly, twins in one: (K,), same on every
    rank.

    Were a normal's twin in the fit that judges it, it would look far too normal.
    """
    # No more than a fold holds: a set of one picture many times must still fill all folds.
    most = -(-len(thumbnails) // folds)
    groups = twins(list(thumbnails.numpy()), thumbnails.float().mean(0).numpy(), at_most=most)
    order = torch.randperm(len(groups), generator=generator).tolist()
    fold_of, filled = torch.empty(len(thumbnails), dtype=torch.long), [0] * folds
    for group in sorted((groups[i] for i in order), key=len, reverse=True):
        together = min(filled) + len(group) <= most
        for some in [group] if together else [[each] for each in group]:
            fold = filled.index(min(filled))
            fold_of[some] = fold
            filled[fold] += len(some)
    return distributed.broadcast(fold_of)  # another processor may round another way


def fit_parts(
    config: DpdlConfig,
    channels: list[int],
    energies: Energies,
    features: Features,
    seen: Features,
    generator: torch.Generator,
    keep: Parts | None = None,
) -> Parts:
    """All parts on given energies: directions, and heads trained on a sample of the normals.

    Without anomalies, directions and heads are those of `keep`, if given, and silent otherwise.
    """
    parts = Parts(config, channels, energies)
    parts.seen.copy_(directions(config, energies, seen.pooled))
    if keep is not None and not len(seen):
        parts.seen.copy_(keep.seen)
        parts.heads.load_state_dict(keep.heads.state_dict())
    seed = int(distributed.broadcast(torch.randint(2**31, (1,), generator=generator)))
    if len(seen):
        sample = gather_some(features, config.head_normals, generator)
        fit_heads(
            parts.heads,
            head_sample(parts.heads, energies, sample),
            head_sample(parts.heads, energies, seen),
            config=config,
            seed=seed,
        )
    return parts.requires_grad_(False).eval()


def gather_some(features: Features, count: int, generator: torch.Generator) -> Features:
    """At most `count` of all ranks' images, the same on every rank."""
    counts = distributed.row_counts(features.pooled)
    total, start = sum(counts), sum(counts[: distributed.rank()])
    order = torch.randperm(total, generator=generator)
    chosen = distributed.broadcast(order[:count].sort().values)
    mine = chosen[(chosen >= start) & (chosen < start + len(features))] - start
    some = features.take(mine)
    return Features(
        distributed.gather_rows(some.pooled), [distributed.gather_rows(m) for m in some.maps]
    )


@torch.no_grad()
def part_values(parts: Parts, features: Features) -> Tensor:
    """(n, V) raw values of all parts."""
    rows = [torch.zeros(0, len(parts.names))]
    rows += [parts(pooled, maps)[0] for pooled, maps in features.batches(128)]
    return torch.cat(rows)


def directions(config: DpdlConfig, energies: Energies, seen: Tensor) -> Tensor:
    """(spaces, P) weights on pooled features, the mean direction of the seen anomalies.

    In each whitened space z: <z(x), mean of z(a) / |z(a)| over anomalies a>. Whitening by the
    normals makes it Fisher's direction; the unit length keeps one glaring anomaly from being all
    of it. Zero where nothing was seen.
    """
    spaces = direction_spaces(config)
    towards = torch.zeros(len(spaces), seen.shape[1])
    for row, space in enumerate(spaces):
        part = energies.pooled[space]
        assert isinstance(part, PooledEnergy)
        if len(seen):
            mean = F.normalize(part.whiten(seen), dim=1).mean(0)
            towards[row, part.columns] = part.sphere(mean[None])[0]
    return towards


FULL_SHARE = 3.5
"""Weight of all seen parts over that of all energies, were there anomalies without end."""
HALF_SHOTS = 10
"""Seen anomalies at which the seen parts have half of that."""
FAINT = 0.8
"""Mean AUROC that the level of cut-paste used is nearest to: not saturated, not hopeless."""


CHOICE = 16
"""Power of a pooled space's gain that its share among them goes by: a tenth less, a fifth of it."""


def weigh(cross: CrossFit, num_pooled: int, num_energies: int, num_seen: int) -> Tensor:
    """(V,) weights of the parts' evidence.

    Energies: by how well each separates faint cut-paste on held-out normals. The pooled ones look
    at the same thing in other ways, and which is the right one differs from product to product:
    together they weigh as much as the best, which has nearly all of it. The mean over what is
    left, they as one and each patch space, is 1.
    Seen parts: FULL_SHARE * M / (M + HALF_SHOTS) of the energies' sum in all, times how well they
    find left-out anomalies against how well the energies do, in log odds of the AUROC.
    """
    num_parts = cross.normals.shape[1]
    weights = torch.zeros(num_parts)
    separation = torch.stack(
        [
            torch.stack([auroc(cross.normals[:, v], level[:, v]) for v in range(num_energies)])
            for level in cross.spoiled
        ]
    )
    level = int((separation.mean(1) - FAINT).abs().argmin())
    gain = (2 * separation[level] - 1).clamp_min(0.05)
    pooled, kinds = gain[:num_pooled], gain[num_pooled:]
    if num_pooled:
        share = (pooled / pooled.max()) ** CHOICE
        pooled, kinds = pooled.max() * share / share.sum(), torch.cat([pooled.max()[None], kinds])
    weights[:num_energies] = torch.cat([pooled, gain[num_pooled:]]) / kinds.mean()
    weights[num_energies:] = weigh_seen(cross, weights[:num_energies], num_seen)
    return weights


def weigh_seen(cross: CrossFit, of_energies: Tensor, num_seen: int) -> Tensor:
    """weigh()'s weights of directions and heads, (V - E,), beside those `of_energies`, (E,)."""
    num_energies, num_heads = len(of_energies), 3
    num_directions = cross.normals.shape[1] - num_energies - num_heads
    share = FULL_SHARE * float(of_energies.sum()) * num_seen / (num_seen + HALF_SHOTS)
    weights = torch.zeros(num_directions + num_heads)
    # Directions and heads have half of it each, where there are both: they err on different
    # anomalies.
    half = share / 2 if num_directions else share
    weights[:num_directions] = half / max(1, num_directions)
    weights[num_directions:] = half / num_heads
    return weights * _worth(cross, num_energies)


def _worth(cross: CrossFit, num_energies: int) -> Tensor:
    """Log odds of the seen parts' AUROC on left-out anomalies over the energies', a square root.

    Ten anomalies measure an AUROC to some .05: the root and the bounds draw towards trust.
    """
    if not len(cross.seen):
        return torch.ones(cross.normals.shape[1] - num_energies)
    found = torch.stack(
        [auroc(cross.normals[:, v], cross.seen[:, v]) for v in range(cross.normals.shape[1])]
    )
    odds = found.clamp(0.55, 0.98).logit()
    return (odds[num_energies:] / odds[:num_energies].mean()).sqrt().clamp(0.6, 1.3).float()


def auroc(normal: Tensor, anomalous: Tensor) -> Tensor:
    """Area under the ROC curve, ties one half; a 0-d float64."""
    ordered = normal.sort().values
    below = torch.searchsorted(ordered, anomalous.contiguous())
    upto = torch.searchsorted(ordered, anomalous.contiguous(), right=True)
    return (below + upto).double().mean() / (2 * len(normal))
