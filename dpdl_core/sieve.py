"""New normals under the present model: which look like anomalies, how far the others lie, and
their features, which a renewal learns from without reading the images again.

Knows models, image sources and ranks; nothing of where images come from.
Letters: n new images of this rank, m of them with maps kept, P pooled features.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import betabinom
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.config import DpdlConfig, quartered_stages
from dpdl_core.features import Trunk
from dpdl_core.images import ImageSource
from dpdl_core.model import Dpdl
from dpdl_core.observe import Features, Normals, check_images, join, keep, thumbnails
from dpdl_core.parts import pooled_width

LIMIT_QUANTILE = 0.995
"""What model.energy_limit is of the energies of normals that it has not seen (fit.py)."""
CHANCE = 0.99
"""Of so many batches without poison all is kept for thresholds that the sieve sets aside."""
OF_ONE_CAMERA = 9
"""New normals of one camera that show where the bulk of them lies."""


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
    cameras: Tensor
    """(n,) which it is of, -1 of no camera that has enough for a limit of its own."""
    seen: Seen

    @property
    def aside(self) -> Tensor:
        """(n,) bool: not to be learnt from."""
        return self.beyond > 0


def set_aside(
    model: Dpdl,
    unseen: ImageSource,
    limit_from: int,
    *,
    cameras: Sequence[str] = (),
    vouched: Sequence[bool] = (),
) -> Tensor:
    """Which of the new normals that nothing learns no threshold is to be set on, (n,) bool.

    What look_over() sets aside, and no person vouches for, but for what chance puts beyond its
    limit: normals cut off at the top support no false-alarm rate. Of n, chance puts none further
    than log(n / (1 - CHANCE)), as tails are exponential (Tails), and of a limit that is the order
    statistic of rank r of N normals it puts a beta-binomial number beyond. Up to its quantile
    CHANCE all are kept; where there are more, there is poison, and as many as come on average are
    kept, the least anomalous ones: of each camera, then of all.
    limit_from: N, the normals that model.energy_limit comes from, or fewer.
    """
    looked = look_over(model, unseen, cameras, max_maps=0)
    doubtful = torch.ones(len(looked.beyond), dtype=torch.bool)
    if len(vouched):
        doubtful &= ~torch.as_tensor(vouched)
    count = int(doubtful.sum())
    aside = doubtful & looked.aside
    kept = aside & (looked.beyond < math.log(max(1, count) / (1 - CHANCE)))
    rank = 1 + LIMIT_QUANTILE * (limit_from - 1)
    of_each = [looked.cameras == camera for camera in set(looked.cameras.tolist())]
    for some in [*of_each, torch.ones_like(doubtful)]:
        chance = betabinom(int((doubtful & some).sum()), limit_from + 1 - rank, rank)
        mine = (kept & some).nonzero().flatten()
        if len(mine) > chance.ppf(CHANCE):
            kept[mine[looked.beyond[mine].argsort()[int(chance.mean()) :]]] = False
    return aside & ~kept


@torch.no_grad()
def look_over(
    model: Dpdl, new: ImageSource, cameras: Sequence[str] = (), *, max_maps: int
) -> Looked:
    """Which of this rank's new normals not to learn from, the others' shift, and all features.

    Aside go those whose energy under the present model is beyond what it finds in normals it has
    not seen, and beyond the bulk of the new ones: if all have drifted, drift is what is to be
    learnt; if some stand out, they are taken for anomalies that slipped in. Median and deviation
    from it, so that up to half of the new may be poison. The bulk is that of the image's camera
    where OF_ONE_CAMERA or more are of it, and of all where not, or where its camera is "".
    The shift is the mean of -log of the energies' tail probabilities, which is 1 for normals like
    those that the model learnt from, minus 1.
    """
    names = model.parts.energies.names
    found = [torch.zeros(0, 2)]

    def judge(maps: list[Tensor]) -> None:
        scores = model.judge(model.pool(maps), maps)
        tail = torch.stack([scores.parts[name] for name in names]).mean(0)
        found.append(torch.stack([scores.energy, tail], 1).cpu())

    seen = see(model.config, model.trunk, new, max_maps, judge)
    mine = torch.cat(found)
    everyone = distributed.gather_rows(mine)
    # Numbers that all ranks give alike.
    numbers = [zlib.crc32(name.encode()) if name else -1 for name in cameras]
    of = distributed.gather_rows(torch.tensor(numbers or [-1] * len(mine), dtype=torch.long))
    if not len(everyone):
        return Looked(torch.zeros(0), 0.0, of, seen)
    # An energy is a weighted sum of exponential tails, at widest when all rise together.
    least = torch.stack([model.energy_limit, model.weights[: len(names)].sum()]).cpu()
    limits = torch.maximum(_bulk(everyone[:, 0]), least).repeat(len(everyone), 1)
    for camera in set(of.tolist()) - {-1}:
        some = of == camera
        if some.sum() < OF_ONE_CAMERA:
            of[some] = -1
        else:
            limits[some] = torch.maximum(_bulk(everyone[some, 0]), least)
    beyond = (everyone[:, 0] - limits[:, 0]) / limits[:, 1]
    start = _before(torch.tensor(len(mine)))
    here = slice(start, start + len(mine))
    return Looked(beyond[here], float(everyone[beyond <= 0, 1].mean() - 1), of[here], seen)


def _bulk(energies: Tensor) -> Tensor:
    """(n,) -> (2,): beyond what they stand out, and their spread."""
    median = energies.median()
    spread = 1.4826 * (energies - median).abs().median()
    return torch.stack([median + 3.5 * spread, spread])


@torch.no_grad()
def see(
    config: DpdlConfig,
    trunk: Trunk,
    images: ImageSource,
    max_maps: int,
    meanwhile: Callable[[list[Tensor]], None] = lambda maps: None,
) -> Seen:
    """Features of this rank's images, read once; `meanwhile` is given every batch's maps."""
    step = max(1, -(-images.num_images // max(1, max_maps)))
    pooled: list[Tensor] = []
    mapped: list[int] = []
    kept: list[Features] = []
    small = [thumbnails(())]
    at = 0
    for batch in images.batches(config.batch_size):
        check_images(batch, config.image_size, "new normals")
        maps = trunk(batch.to(trunk.mean_255.device))
        meanwhile(maps)
        found = keep(maps, config)
        every = (at + torch.arange(len(batch))) % step == 0
        rows = every.nonzero().squeeze(1)[: max_maps - len(mapped)]
        pooled.append(found.pooled)
        kept.append(found.take(rows))
        small.append(thumbnails(batch[rows]))
        mapped += (at + rows).tolist()
        at += len(batch)
    nothing = Features(torch.zeros(0, pooled_width(trunk.channels, quartered_stages(config))), [])
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
