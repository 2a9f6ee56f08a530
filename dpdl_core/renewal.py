"""Prototypes re-initialised in the middle of a training, MATH.md section 4.

Knows the network of tune_network.py, shards and ranks. Collective: features stay where the images
are, Lloyd's sums and counts travel, and every rank ends with the same prototypes, the ones that a
single rank would have found, to rounding.
Letters: n images of this rank, C prototypes, F features of a patch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpdl_core import distributed
from dpdl_core.codebook import Refreshed, refresh, reset_moments
from dpdl_core.losses import target_deviation
from dpdl_core.shard import Shard
from dpdl_core.tune_network import TuneNetwork


@dataclass(frozen=True)
class Renewal:
    """What a renewal did; the same on every rank."""

    new_normals: int
    set_aside: Tensor
    """Numbers of new normals that look anomalous to the present prototypes: not learnt from."""
    prototypes: int
    kept: int
    replaced: int
    revived: int
    score_shift: float
    """Mean change of the held-out normals' energies, in units of their deviation before."""
    seconds: float

    def figures(self) -> dict[str, Any]:
        return {
            "new_normals": self.new_normals,
            "set_aside": len(self.set_aside),
            "prototypes": self.prototypes,
            "kept": self.kept,
            "replaced": self.replaced,
            "revived": self.revived,
            "score_shift": self.score_shift,
            "seconds": self.seconds,
        }


@torch.no_grad()
def renew_prototypes(
    network: TuneNetwork,
    optimizer: torch.optim.Optimizer,
    normals: Shard,
    new: Shard | None,
    held_out: Tensor,
    vouched: Tensor | None = None,
    *,
    max_images: int,
    batch_size: int,
) -> Renewal:
    """Distributed VQ on the present features of old and new normals; the optimiser goes on.

    Of the old normals, and of the new, at most `max_images` spread over all are looked at.
    held_out: this rank's images (n, S, S, 3), in neither, which the shift is measured on.
    vouched: numbers of new normals that a person has called normal, which are never set aside.
    Moments of replaced prototypes become zero; kept ones keep theirs, and their variances.
    """
    started = time.perf_counter()
    before = _energies(network, held_out, batch_size)
    old = normals.only(_spread(normals, max_images))
    patches, energy = _look(network, old, old.numbers, batch_size)
    rows = patches.flatten(0, 1)
    count, aside = 0, torch.zeros(0, dtype=torch.long)
    if new is not None:
        # All of the new ones are looked at, none joins unseen; patches are kept of some.
        count = sum(distributed.row_counts(new.numbers))
        some = _spread(new, max_images)
        fresh, unlike = _look(network, new, some, batch_size)
        strange = stand_out(unlike, energy)
        if vouched is not None:
            strange &= ~torch.isin(new.numbers, vouched).to(strange.device)
        aside = distributed.gather_rows(new.numbers[strange.cpu()])
        wanted = ~strange[torch.isin(new.numbers, some).to(strange.device)]
        rows = torch.cat([rows, fresh[wanted].flatten(0, 1)])
    bridge = network.bridge
    done = refresh(rows, bridge.means, bridge.variances, bridge.log_weights)
    _take_over(network, optimizer, done)
    after = _energies(network, held_out, batch_size)
    return Renewal(
        new_normals=count,
        set_aside=aside,
        prototypes=len(done.kept),
        kept=int(done.kept.sum()),
        replaced=int(done.replaced.sum()),
        revived=int(done.revived.sum()),
        score_shift=float((after - before).mean() / before.std().clamp_min(1e-12)),
        seconds=time.perf_counter() - started,
    )


def _take_over(network: TuneNetwork, optimizer: torch.optim.Optimizer, done: Refreshed) -> None:
    bridge, codebook = network.bridge, network.codebook
    bridge.means.copy_(done.means)
    bridge.log_ratio.copy_((done.variances / bridge.eps).log())
    bridge.log_weights.copy_(done.log_weights)
    bridge.project_()
    network.deviation.copy_(target_deviation(bridge))
    for parameter in (bridge.means, bridge.log_ratio, bridge.log_weights):
        reset_moments(optimizer, parameter, done.replaced)
    codebook.means.copy_(done.means)
    codebook.share.copy_(done.log_weights.exp())


def _spread(images: Shard, at_most: int) -> Tensor:
    """Numbers of at most so many images, spread evenly over all ranks'."""
    everyone, _ = images.everyone()
    return everyone[:: max(1, -(-len(everyone) // at_most))]


def _look(
    network: TuneNetwork, images: Shard, keep: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Unit patches (k, places, F) of those images whose numbers are in `keep`, and the energies
    (n,) of all, on the device."""
    device, channels = network.bridge.means.device, network.bridge.means.shape[1]
    kept = torch.isin(images.numbers, keep).to(device)
    patches, energies = [], [torch.zeros(0, device=device)]
    at = 0
    for batch in images.batches(batch_size):
        rows, energy = network.look(batch.to(device))
        patches.append(rows[kept[at : at + len(batch)]])
        energies.append(energy)
        at += len(batch)
    # A rank without a share still takes part in every sum.
    found = torch.cat(patches) if patches else torch.zeros(0, 1, channels, device=device)
    return found, torch.cat(energies)


def stand_out(new: Tensor, old: Tensor) -> Tensor:
    """Which of this rank's new energies are beyond the old normals' and the bulk of the new, (n,).

    As a refresh does (fit.py): if all have drifted, drift is to be learnt; if some stand out, they
    are taken for anomalies. Median and deviation from it: up to half may be poison.
    """
    limit = distributed.gather_rows(old).quantile(0.995)
    everyone = distributed.gather_rows(new)
    median = everyone.median()
    spread = 1.4826 * (everyone - median).abs().median()
    return new > torch.maximum(limit, median + 3.5 * spread)


def _energies(network: TuneNetwork, images: Tensor, batch_size: int) -> Tensor:
    """Of all ranks' images."""
    device = network.bridge.means.device
    found = [
        network.look(batch.to(device))[1] for batch in torch.split(images, batch_size) if len(batch)
    ]
    return distributed.gather_rows(torch.cat([torch.zeros(0, device=device), *found]))
