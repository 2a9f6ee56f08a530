"""Normals and a few anomalies to a fitted model; old and new normals to a renewed one.

Knows the method and torch.distributed; nothing of files, Ray, or where images come from.
Runs in one process, or on every rank with its shard of the normals and all anomalies: trunk
passes and patches stay where the images are, sums and bounded samples travel, and every rank
ends with the same model.

Held in memory: pooled vectors of at most observe.MAX_POOLED normals (11 kB each in Lite0), the maps
of at most config.max_maps of them (half precision: 188 kB each in `edge`, 1.4 MB in `paper`), the
anomalies. Never the normals' pixels.
Letters: N normals, K of them with maps kept, M anomalies, P pooled features, V parts.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpdl_core import calibrate, distributed
from dpdl_core.config import DpdlConfig, untuned
from dpdl_core.estimate import check_spaces, fit_energies, renew_energies
from dpdl_core.features import Trunk
from dpdl_core.images import ImageSource
from dpdl_core.learn import blank_heads
from dpdl_core.model import Dpdl
from dpdl_core.observe import Features, Normals, check_images, look_at_all, observe
from dpdl_core.parts import Energies
from dpdl_core.shard import Shard
from dpdl_core.sieve import LIMIT_QUANTILE, look_over, see, with_new
from dpdl_core.tune import Keeper, tune

Progress = Callable[[str, float, dict[str, Any]], None]
"""progress(stage, share done 0..1, figures)."""
MIN_NORMALS = 10
SHIFT_LIMIT = 0.25
"""Shift of new normals beyond which a renewal learns anew what the anomalies taught. At .25 a
threshold for one false alarm in a hundred gives about one in seventy."""
LLOYD, LLOYD_MOVED = 2, 5
"""Steps from the present prototypes, without and with such a shift; ten find nothing better."""
SHIFT_SAMPLE = 128
"""Normals of each rank, or some more, that the shift of scores is told by."""
RETUNE_SHARE = 0.1
"""Of its training's epochs that a tuned trunk is tuned again after such a shift."""


@dataclass(frozen=True)
class RenewReport:
    """What a refresh did."""

    new_normals: int
    set_aside: list[int]
    """Places in new_normals (all ranks', in rank order) not learnt from: too anomalous."""
    prototypes: int
    kept: int
    replaced: int
    revived: int
    input_shift: float
    """How far the new normals lie from what the present model knows: the mean of -log of their
    tail probabilities, which is 1 for normals like those it learnt from, minus 1."""
    relearnt: bool
    """Whether directions, heads and their tails were learnt anew, as a shift demands."""
    score_shift: float
    """Mean change of the score of the normals, in units of its deviation there."""
    seconds: float


@torch.random.fork_rng(devices=[])
def fit(
    config: DpdlConfig,
    normals: ImageSource,
    anomalies: Tensor | npt.NDArray[np.uint8],
    *,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> Dpdl:
    """A model from normals and M >= 0 seen anomalies, uint8 (M, S, S, 3).

    Under torch.distributed every rank calls it with its shard of the normals and the same
    anomalies; the data set is the shards in rank order. A Shard says itself which numbers its
    images have: then tuning is the same on any number of ranks. `keeper` keeps the state of a
    tuning after every epoch and brings it new normals. Without anomalies nothing is tuned. Raises
    ValueError for too few or wrong images and for settings that the trunk cannot meet, both before
    any long work; WeightsUnavailable without a trunk.
    """
    tell = progress or _silent
    generator = torch.Generator().manual_seed(seed)
    _check_enough(sum(distributed.row_counts(_rows(normals))))
    known = _as_images(config, anomalies)
    if not len(known):
        config = untuned(config)
    torch.manual_seed(seed)  # modules draw their first weights from the global generator
    trunk = Trunk(config.trunk, config.weights, config.image_size).to(device)
    if config.tuned_stages > len(trunk.stages):
        raise ValueError(
            f"tuned_stages={config.tuned_stages}: {config.trunk} has {len(trunk.stages)} that can "
            f"be tuned apart; set {len(trunk.stages)} at most"
        )
    check_spaces(config, trunk.channels)
    blank_heads(config, trunk.channels)
    if config.tuned_stages:
        normals = tune(
            config,
            trunk,
            Shard.of(normals),
            known,
            generator=generator,
            tell=tell,
            keeper=keeper,
        )
    trunk.fuse()
    found = _observe(config, trunk, normals, seed, generator, tell)
    seen = look_at_all(trunk, known, config)
    tell("prototypes", 0.0, {})
    energies = fit_energies(
        config, trunk.channels, found.pooled, found.features, generator=generator
    )
    return _calibrated(config, trunk, energies, found, seen, generator, tell)


@torch.random.fork_rng(devices=[])
def renew(
    model: Dpdl,
    old_normals: ImageSource,
    new_normals: ImageSource,
    anomalies: Tensor | npt.NDArray[np.uint8],
    *,
    seed: int,
    vouched: Sequence[bool] = (),
    cameras: Sequence[str] = (),
    relearn: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[Dpdl, RenewReport]:
    """A model renewed on old and new normals; the given model stays as it is.

    New normals that look anomalous to the present model are not learnt from, except those that are
    `vouched` for (a person has called them normal; one flag each of this rank's); with none left
    the present model is what comes back. `cameras`, of each, "" where nobody knows: what has moved
    with the bulk of its camera is learnt (look_over). Always new: whitening, prototypes, their
    tails. What the anomalies taught (directions, heads, the tails of both) stays unless the new
    normals have shifted by more than SHIFT_LIMIT, or `relearn`; then a tuned trunk is tuned a
    little, too. How much each energy counts stays. Collective as fit().
    """
    started = time.monotonic()
    tell = progress or _silent
    model = copy.deepcopy(model).to(device)
    config, trunk = model.config, copy.deepcopy(model.trunk)
    looked = look_over(model, new_normals, cameras, max_maps=config.max_maps)
    aside, shift, seen_new = looked.aside, looked.shift, looked.seen
    if len(vouched):
        aside &= ~torch.as_tensor(vouched)
    aside_everywhere = distributed.gather_rows(aside)

    def report(changed: dict[str, int], score_shift: float, relearnt: bool) -> RenewReport:
        return RenewReport(
            new_normals=len(aside_everywhere),
            set_aside=aside_everywhere.nonzero().squeeze(1).tolist(),
            input_shift=shift,
            relearnt=relearnt,
            score_shift=score_shift,
            seconds=time.monotonic() - started,
            **changed,
        )

    if bool(aside_everywhere.all()) and not relearn:
        sizes = model.parts.energies.sizes
        prototypes = sum(sizes[f"patch {space}"] for space in config.patch_spaces)
        same = {"prototypes": prototypes, "kept": prototypes, "replaced": 0, "revived": 0}
        return model, report(same, 0.0, relearnt=False)
    model.cpu()  # where features are kept, and all but the trunk is estimated
    # The mean of -log p, of deviation 1, is off by chance: by few new images, and by few old ones
    # that the tails come from. Three deviations of both.
    counts = (int((~aside_everywhere).sum()), sum(distributed.row_counts(_rows(old_normals))))
    chance = 3 * math.sqrt(sum(1 / max(1, count) for count in counts))
    relearn = relearn or shift > max(SHIFT_LIMIT, chance)
    generator = torch.Generator().manual_seed(seed)
    known = _as_images(config, anomalies if relearn else anomalies[:0])
    if config.tuned_stages and len(known):
        source = _Joined(old_normals, new_normals, aside)
        _retune(config, trunk, source, known, generator, tell)
        seen_new = see(config, trunk, new_normals, config.max_maps)
    old = _observe(config, trunk, old_normals, seed, generator, tell, spoil=False)
    found = with_new(old, seen_new, ~aside)
    _check_enough(len(found.pooled))
    seen = look_at_all(trunk, known, config)
    tell("prototypes", 0.0, {})
    energies, changed = renew_energies(
        config,
        trunk.channels,
        found.pooled,
        found.features,
        model.parts.energies,
        # What has not moved is found where it was.
        iterations=LLOYD_MOVED if relearn else LLOYD,
        generator=generator,
    )
    renewed = _calibrated(config, trunk, energies, found, seen, generator, tell, model)
    return renewed, report(changed, _score_shift(model, renewed, found), relearnt=len(seen) > 0)


def _check_enough(total: int) -> None:
    if total < MIN_NORMALS:
        raise ValueError(f"{total} normal images: need at least {MIN_NORMALS} to fit a model")


def _rows(source: ImageSource) -> Tensor:
    return torch.empty(source.num_images, 0)


def _retune(
    config: DpdlConfig,
    trunk: Trunk,
    normals: ImageSource,
    anomalies: Tensor,
    generator: torch.Generator,
    tell: Progress,
) -> None:
    """A tenth of a training's tuning. The trunk is fused: biases stand for its batch norms."""
    epochs = max(1, round(RETUNE_SHARE * config.tune_epochs))
    tune(
        replace(config, tune_epochs=epochs),
        trunk,
        Shard.of(normals),
        anomalies,
        generator=generator,
        tell=tell,
    )


def _observe(
    config: DpdlConfig,
    trunk: Trunk,
    source: ImageSource,
    seed: int,
    generator: torch.Generator,
    tell: Progress,
    *,
    spoil: bool = True,
) -> Normals:
    started = time.monotonic()

    def report(share: float) -> None:
        rate = share * source.num_images / max(time.monotonic() - started, 1e-9)
        tell("features", share, {"images_per_second": rate})

    return observe(
        trunk,
        source,
        config,
        spoilers=calibrate.make_spoilers(seed) if spoil else [],
        generator=generator,
        tell=report,
    )


def _as_images(config: DpdlConfig, anomalies: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    images = torch.as_tensor(anomalies)
    size = config.image_size
    if len(images) == 0:
        return torch.zeros(0, size, size, 3, dtype=torch.uint8)
    check_images(images, size, "anomalies")
    return images


def _calibrated(
    config: DpdlConfig,
    trunk: Trunk,
    energies: Energies,
    normals: Normals,
    seen: Features,
    generator: torch.Generator,
    tell: Progress,
    before: Dpdl | None = None,
) -> Dpdl:
    """The whole model: parts, tails and weights from cross-fitted values."""
    tell("calibration", 0.0, {})
    keep = before.parts if before is not None else None
    cross = calibrate.cross_fit(
        config, trunk.channels, normals, seen, energies, generator=generator, keep=keep
    )
    parts = calibrate.fit_parts(
        config, trunk.channels, energies, normals.features, seen, generator, keep
    )
    model = Dpdl(config, trunk, parts)
    model.tails.fit(cross.normals)
    num_energies = len(energies.names)
    if before is None:
        model.weights.copy_(calibrate.weigh(cross, len(energies.pooled), num_energies, len(seen)))
    else:
        model.weights.copy_(before.weights)
        if len(seen):
            weights = calibrate.weigh_seen(cross, model.weights[:num_energies], len(seen))
            model.weights[num_energies:] = weights
        else:
            model.tails.take_over(before.tails, slice(num_energies, None))
    share = model.weigh(model.tails(cross.normals))[:, :num_energies].sum(1)
    model.energy_limit.copy_(share.quantile(LIMIT_QUANTILE))
    _calibrate_maps(model, normals)
    tell("calibration", 1.0, {})
    return model.eval().requires_grad_(False).to(trunk.mean_255.device)


@torch.no_grad()
def _calibrate_maps(model: Dpdl, normals: Normals) -> None:
    """Heat maps: 0 at the median patch of normals, 1 at their 99th percentile."""
    sample = normals.features.take(torch.arange(min(256, len(normals.features))))
    spaces, side = len(model.config.patch_spaces), model.config.patch_side
    grids = [torch.zeros(0, spaces, side, side)]
    grids += [model.parts(pooled, maps)[1] for pooled, maps in sample.batches(128)]
    flat = distributed.gather_rows(torch.cat(grids).transpose(0, 1).flatten(1).T.contiguous())
    ordered = flat.sort(0).values
    median, high = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    model.map_median.copy_(median)
    least = (1e-3 * median.abs()).clamp_min(1e-6)  # as in Tails
    model.map_scale.copy_(torch.maximum(high - median, least))


def _silent(stage: str, share: float, figures: dict[str, float]) -> None:
    pass


# Refresh ------------------------------------------------------------------------------------


class _Joined:
    """Old normals, then those new ones that are not set aside."""

    def __init__(self, old: ImageSource, new: ImageSource, aside: Tensor) -> None:
        self._old, self._new, self._learn = old, new, ~aside

    @property
    def num_images(self) -> int:
        return self._old.num_images + int(self._learn.sum())

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from self._old.batches(batch_size)
        at = 0
        for images in self._new.batches(batch_size):
            kept = images[self._learn[at : at + len(images)]]
            at += len(images)
            if len(kept):
                yield kept


@torch.no_grad()
def _score_shift(before: Dpdl, after: Dpdl, normals: Normals) -> float:
    """Mean change of some kept normals' scores, in deviations of theirs under `before`."""
    every = max(1, len(normals.features) // SHIFT_SAMPLE)
    some = normals.features.take(torch.arange(0, len(normals.features), every))

    def score(model: Dpdl, pooled: Tensor, maps: list[Tensor]) -> Tensor:
        device = model.weights.device
        return model.judge(pooled.to(device), [m.to(device) for m in maps]).score.cpu()

    pairs = [torch.zeros(0, 2)]
    pairs += [
        torch.stack([score(before, *batch), score(after, *batch)], 1) for batch in some.batches(128)
    ]
    old, new = distributed.gather_rows(torch.cat(pairs)).T
    return float((new - old).mean() / old.std().clamp_min(1e-12))
