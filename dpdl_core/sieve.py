"""New normals under the present model: which look like anomalies, how far the others lie, and
their features, which a renewal learns from without reading the images again.

Knows models, image sources and ranks; nothing of where images come from.
Letters: n new images of this rank, m of them with maps kept, P pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.stats import betabinom
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.config import DpdlConfig
from dpdl_core.estimate import map_stages
from dpdl_core.features import Trunk
from dpdl_core.images import ImageSource
from dpdl_core.model import Dpdl
from dpdl_core.observe import Features, Normals, check_images, join, keep, thumbnails
from dpdl_core.parts import pool

LIMIT_QUANTILE = 0.995
"""What model.energy_limit is of the energies of normals that it has not seen (fit.py)."""
CHANCE = 0.99
"""Of so many batches without poison all is kept for thresholds that the sieve sets aside."""


@dataclass(frozen=True)
class Seen:
    """Features of n images; maps of at most so many as were wanted, spread evenly."""

    pooled: Tensor
    """(n, P)."""
    mapped: Tensor
    """(m,) rows of `features`, ascending."""
    features: Features
    """Of m images."""
    thumbnails: Tensor
    """(m, SIDE, SIDE)."""


@dataclass(frozen=True)
class Looked:
    """What the present model says of the new normals."""

    beyond: Tensor
    """(n,) energy beyond the limit in units of its tail: above 0 it looks like an anomaly."""
    shift: float
    """Of the others, over all ranks; see look_over()."""
    seen: Seen

    @property
    def aside(self) -> Tensor:
        """(n,) bool: not to be learnt from."""
        return self.beyond > 0


def set_aside(model: Dpdl, unseen: ImageSource, limit_from: int) -> Tensor:
    """Which of the new normals that nothing learns no threshold is to be set on, (n,) bool.

    What look_over() sets aside, but for what chance puts beyond its limit: normals cut off at the
    top support no false-alarm rate. Of n, chance puts none further than log(n / (1 - CHANCE)), as
    tails are exponential (Tails), and of a limit that is the order statistic of rank r of N normals
    it puts a beta-binomial number beyond. Up to its quantile CHANCE all are kept; where there are
    more, there is poison, and as many as come on average are kept, the least anomalous ones.
    limit_from: N, the normals that model.energy_limit comes from, or fewer.
    """
    beyond = look_over(model, unseen, max_maps=0).beyond
    rank = 1 + LIMIT_QUANTILE * (limit_from - 1)
    number = betabinom(len(beyond), limit_from + 1 - rank, rank)
    aside = beyond > 0
    near = aside & (beyond < math.log(max(1, len(beyond)) / (1 - CHANCE)))
    count = int(near.sum())
    kept = count if count <= number.ppf(CHANCE) else int(number.mean())
    aside[beyond.masked_fill(~near, torch.inf).argsort()[:kept]] = False
    return aside


@torch.no_grad()
def look_over(model: Dpdl, new: ImageSource, *, max_maps: int) -> Looked:
    """Which of this rank's new normals not to learn from, the others' shift, and all features.

    Aside go those whose energy under the present model is beyond what it finds in normals it has
    not seen, and beyond the bulk of the new ones: if all have drifted, drift is what is to be
    learnt; if some stand out, they are taken for anomalies that slipped in. Median and deviation
    from it, so that up to half of the new may be poison.
    The shift is the mean of -log of the energies' tail probabilities, which is 1 for normals like
    those that the model learnt from, minus 1.
    """
    names = model.parts.energies.names
    found = [torch.zeros(0, 2)]

    def judge(maps: list[Tensor]) -> None:
        scores = model.judge(pool(maps), maps)
        tail = torch.stack([scores.parts[name] for name in names]).mean(0)
        found.append(torch.stack([scores.energy, tail], 1).cpu())

    seen = see(model.config, model.trunk, new, max_maps, judge)
    mine = torch.cat(found)
    everyone = distributed.gather_rows(mine)
    if not len(everyone):
        return Looked(torch.zeros(0), 0.0, seen)
    energies = everyone[:, 0]
    median = energies.median()
    spread = 1.4826 * (energies - median).abs().median()
    limit = torch.maximum(model.energy_limit.cpu(), median + 3.5 * spread)
    # An energy is a weighted sum of exponential tails, at widest when all rise together.
    scale = torch.maximum(model.weights[: len(names)].sum().cpu(), spread)
    shift = float(everyone[energies <= limit, 1].mean() - 1)
    return Looked((mine[:, 0] - limit) / scale, shift, seen)


@torch.no_grad()
def see(
    config: DpdlConfig,
    trunk: Trunk,
    images: ImageSource,
    max_maps: int,
    meanwhile: Callable[[list[Tensor]], None] = lambda maps: None,
) -> Seen:
    """Features of this rank's images, read once; `meanwhile` is given every batch's maps."""
    stages, step = map_stages(config), max(1, -(-images.num_images // max(1, max_maps)))
    pooled: list[Tensor] = []
    mapped: list[int] = []
    kept: list[Features] = []
    small = [thumbnails(())]
    at = 0
    for batch in images.batches(config.batch_size):
        check_images(batch, config.image_size, "new normals")
        maps = trunk(batch.to(trunk.mean_255.device))
        meanwhile(maps)
        found = keep(maps, stages)
        every = (at + torch.arange(len(batch))) % step == 0
        rows = every.nonzero().squeeze(1)[: max_maps - len(mapped)]
        pooled.append(found.pooled)
        kept.append(found.take(rows))
        small.append(thumbnails(batch[rows]))
        mapped += (at + rows).tolist()
        at += len(batch)
    dims = 2 * sum(trunk.channels) + 4 * trunk.channels[-1]
    nothing = Features(torch.zeros(0, dims), [])
    return Seen(
        torch.cat([nothing.pooled, *pooled]),
        torch.tensor(mapped, dtype=torch.long),
        join(kept) if kept else nothing,
        torch.cat(small),
    )


def with_new(old: Normals, new: Seen, learn: Tensor) -> Normals:
    """Old normals and those of this rank's new ones that are to be learnt, (n,) bool. Collective.

    The new ones' numbers follow all the old ones'.
    """
    numbers = len(old.pooled) + _before(learn.sum()) + learn.cumsum(0) - 1
    wanted = learn[new.mapped]
    mine = numbers[new.mapped[wanted]]
    features = old.features
    small = distributed.gather_rows(new.thumbnails[wanted])
    if len(mine):
        some = new.features.take(wanted.nonzero().squeeze(1))
        features = join([features, some]) if len(features) else some
    places = len(old.kept) + _before(torch.tensor(len(mine))) + torch.arange(len(mine))
    return replace(
        old,
        pooled=torch.cat([old.pooled, distributed.gather_rows(new.pooled[learn])]),
        kept=torch.cat([old.kept, distributed.gather_rows(mine)]),
        mine=torch.cat([old.mine, places]),
        features=features,
        thumbnails=torch.cat([old.thumbnails, small]),
    )


def _before(count: Tensor) -> int:
    """The sum of a count over the ranks before this one."""
    return int(distributed.gather_rows(count.view(1))[: distributed.rank()].sum())
