"""Fine-tuning of the trunk's last stages by the paper's objective, eqs. 16-23, on images.

Knows images, ranks and the network of tune_network.py. What it trains besides the trunk is thrown
away: fit.py learns energies and heads anew on the features it leaves. Off in the edge recipe, where
ten anomalies overfit a tuned trunk (docs/accuracy.md); the paper recipe is made of it.

Any number of ranks draws the same batches (deal.py), sees the same losses and takes the same steps,
to rounding. After each epoch the state can be kept, and a training that starts from it goes on as
if it had not been stopped.
Letters: B batch, S image side, F channels of the last stage, C prototypes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpdl_core import distributed
from dpdl_core.augment import Draws, cut_paste, dihedral, rotate
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import Codebook, EmaCodebook, kmeans
from dpdl_core.config import DpdlConfig
from dpdl_core.deal import Dealt, deal
from dpdl_core.features import Trunk
from dpdl_core.losses import LossTerms
from dpdl_core.norms import narrow_norms, widen_norms
from dpdl_core.observe import check_images
from dpdl_core.renewal import renew_prototypes
from dpdl_core.seeding import count_distinct
from dpdl_core.shard import Shard
from dpdl_core.tune_network import Step, TuneNetwork, last_map
from dpdl_core.tune_state import TuneState, capture, restore

START_IMAGES = 512
"""Of the first so many normals every eighth is held out, to measure renewals on; the prototypes
start from the others' patches."""

Tell = Callable[[str, float, dict[str, Any]], None]
"""tell(stage, share done 0..1, figures): `tuning` after every epoch, `renewal` after each."""


class Keeper(Protocol):
    """What a long training asks of whoever runs it. All ranks call, at the same moments."""

    def resume(self) -> TuneState | None:
        """Where to go on from, the same on every rank; None to start anew. The normals given to
        the training then hold those that had arrived before it."""

    def keep(self, state: TuneState, figures: dict[str, Any]) -> None:
        """An epoch is done; `state` is the same on every rank."""

    def arrivals(self, at_least: int) -> tuple[Shard, Tensor] | None:
        """This rank's share of new normals, numbered above all others, once `at_least` of them
        have landed since the last ones, and the numbers of those in it that a person has called
        normal; None before."""


def tune(
    config: DpdlConfig,
    trunk: Trunk,
    normals: Shard,
    anomalies: Tensor,
    *,
    generator: torch.Generator,
    tell: Tell,
    keeper: Keeper | None = None,
) -> Shard:
    """Fine-tune `config.tuned_stages` stages of an unfused trunk in place.

    anomalies uint8 (M, S, S, 3), M >= 1, and the generator's state are the same on every rank.
    Returns the normals learnt from: those given, and what arrived meanwhile and looked normal.
    Raises ValueError if the loss stops being finite, or for a checkpoint of another config.
    """
    training = _Training(config, trunk, normals, anomalies, generator, keeper)
    while training.epoch < config.tune_epochs:
        figures = training.run_epoch()
        tell("tuning", training.epoch / config.tune_epochs, figures)
        renewal = training.renew_if_due()
        if renewal is not None:
            tell("renewal", training.epoch / config.tune_epochs, renewal)
            figures = figures | {"renewal": renewal}
        if keeper is not None:
            keeper.keep(training.state(), figures)
    training.stream.close()
    narrow_norms(trunk)
    trunk.eval().requires_grad_(False)
    return training.normals


class _Training:
    """Network, optimiser and stream of batches, an epoch at a time."""

    def __init__(
        self,
        config: DpdlConfig,
        trunk: Trunk,
        normals: Shard,
        anomalies: Tensor,
        generator: torch.Generator,
        keeper: Keeper | None,
    ) -> None:
        self.config, self.generator, self.keeper = config, generator, keeper
        self.device = trunk.mean_255.device
        self.third = config.tune_batch // 3
        before = keeper.resume() if keeper is not None else None
        self.normals = normals
        self.epoch = self.step = self.stream_start = 0
        if before is None:
            first = normals.everyone()[0][:START_IMAGES]
            # What a renewal tells the shift of scores by; without renewals nothing is held out.
            self.held_out = first[::8] if _renews(config, keeper) else first[:0]
            start = normals.only(first).without(self.held_out)
            self.network = TuneNetwork(
                config, trunk, *_start_prototypes(config, trunk, start, generator)
            )
            self.stream_seed = int(torch.randint(2**31, (1,), generator=generator))
        else:
            self.network = TuneNetwork(config, trunk, *_blank_prototypes(config, before))
        widen_norms(self.network)
        self._choose_parameters()
        self.network.to(self.device)
        if self.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = _optimizer(self.network, config)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.tune_epochs * config.tune_iterations
        )
        if before is not None:
            self._restore(before)
        self.model: nn.Module = self.network
        if distributed.is_distributed():
            # It copies rank 0's weights to the others, and averages gradients while they come.
            self.model = nn.parallel.DistributedDataParallel(
                self.network, forward_sync_buffers=False
            )
        self.anomalies = anomalies.to(self.device)
        self.held_images = _all_of(self.normals.only(self.held_out), config)
        self._begin_stream()

    # An epoch ---------------------------------------------------------------------------------

    def run_epoch(self) -> dict[str, Any]:
        """`tune_iterations` steps; their mean losses and how they went."""
        self._train_mode()
        started, waited = time.perf_counter(), 0.0
        rate = self.schedule.get_last_lr()[0]
        names = [field.name for field in fields(LossTerms)]
        sums = torch.zeros(len(names) + 2, device=self.device)
        for _ in range(self.config.tune_iterations):
            found, loss = self._take_step()
            parts = [getattr(found.terms, name) for name in names]
            sums += torch.stack([loss, found.energy, *parts]).detach()
            # The next batch is fetched while an accelerator works on this one; only then is the
            # loss looked at, for which the accelerator is waited for.
            waited += self._fetch()
            self._check_finite(loss)
        self.epoch += 1
        seconds = time.perf_counter() - started
        means = (sums / self.config.tune_iterations).tolist()
        return {
            "epoch": self.epoch,
            "steps": self.step,
            "lr": rate,
            **dict(zip(["loss", "energy_of_normals", *names], means, strict=True)),
            "seconds": seconds,
            "data_wait_share": waited / seconds,
        }

    def _take_step(self) -> tuple[Step, Tensor]:
        found: Step = self.model(*self._augmented(self.batch))
        loss = found.terms.total(self.config.dispersion_weight)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.network.bridge.project_()
        self.step += 1
        return found, loss

    def _check_finite(self, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.step}: lower tune_learning_rate "
                f"({self.config.tune_learning_rate}), or set literal_loss=false"
            )

    def _train_mode(self) -> None:
        self.network.train()
        stages = list(self.network.trunk.stages)
        for stage in stages[: len(stages) - self.config.tuned_stages]:
            stage.eval()  # statistics of frozen stages stay frozen too

    def _choose_parameters(self) -> None:
        trunk, side = self.network.trunk, self.config.image_size
        chosen = list(trunk.requires_grad_(False).tuned_parameters(self.config.tuned_stages))
        for parameter in chosen:
            parameter.requires_grad_(True)
        # timm's feature levels leave the classifier out, whose gradient ranks would wait for.
        reached = torch.autograd.grad(
            last_map(trunk, torch.zeros(1, side, side, 3, device=self.device)).sum(),
            chosen,
            allow_unused=True,
        )
        for parameter, gradient in zip(chosen, reached, strict=True):
            parameter.requires_grad_(gradient is not None)

    # Batches ----------------------------------------------------------------------------------

    def _begin_stream(self) -> None:
        self.stream = deal(
            self.normals.without(self.held_out),
            self.third,
            seed=self.stream_seed,
            skip=self.step - self.stream_start,
        )
        self._fetch()

    def _fetch(self) -> float:
        """The next batch, on its way to the device; seconds that the device waited for it."""
        started = time.perf_counter()
        dealt = next(self.stream)
        images = dealt.normals
        if not len(images):  # read from nothing, they have no size
            images = images.new_empty((0, *self.anomalies.shape[1:]))
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        self.batch = Dealt(images, dealt.normal_places, dealt.seen_places)
        waited = time.perf_counter() - started
        if self.device.type == "cuda" and not torch.cuda.current_stream().query():
            return 0.0  # it had work all the while
        return waited

    def _augmented(self, part: Dealt) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's images, augmented, (B, S, S, 3) float in 0..255, their labels (B,), and a
        seed for each of the normals among them."""
        third, generator = self.third, self.generator
        picked = torch.randint(len(self.anomalies), (third,), generator=generator)
        seen = self.anomalies[picked[part.seen_places].to(self.device)]
        plain = torch.cat([part.normals, seen]).permute(0, 3, 1, 2).float() / 255
        spoil = part.normal_places >= third
        clean, to_spoil = plain[: len(spoil)][~spoil], plain[: len(spoil)][spoil]
        pseudo_places = part.normal_places[spoil]
        seeds = torch.randint(2**62, (third,), generator=generator)
        draws = Draws(generator, third, pseudo_places - third)
        pseudo, _ = cut_paste(to_spoil, generator=draws)
        together = torch.cat([clean, pseudo, plain[len(spoil) :]])
        places = torch.cat(
            [part.normal_places[~spoil], pseudo_places, 2 * third + part.seen_places]
        )
        draws = Draws(generator, 3 * third, places)
        images = together
        if self.config.rotate:
            images = rotate(dihedral(together, generator=draws), generator=draws)
        label = (places >= third).float().to(self.device)
        return images.permute(0, 2, 3, 1) * 255, label, seeds[part.normal_places[~spoil]]

    # Renewal and state ------------------------------------------------------------------------

    def renew_if_due(self) -> dict[str, Any] | None:
        """Re-initialise the prototypes when the time has come or enough has arrived."""
        config = self.config
        if self.epoch >= config.tune_epochs:
            return None  # no step would follow it
        new, vouched = None, None
        if self.keeper is not None and config.renew_min_new:
            new, vouched = self.keeper.arrivals(config.renew_min_new) or (None, None)
        every = config.renew_every_epochs
        if new is None and not (every and self.epoch % every == 0):
            return None
        self.network.eval()
        done = renew_prototypes(
            self.network,
            self.optimizer,
            self.normals.without(self.held_out),
            new,
            self.held_images,
            vouched,
            max_images=config.max_maps,
            batch_size=config.batch_size,
        )
        if new is not None:
            self.normals = self.normals.and_also(new).without(done.set_aside)
            self.stream_start, self.stream_seed = self.step, self.stream_seed + 1
            self.stream.close()
            self._begin_stream()
        return {"epoch": self.epoch, **done.figures()}

    def state(self) -> TuneState:
        return capture(
            self.network,
            self.optimizer,
            self.schedule,
            self.generator,
            {"held_out": self.held_out, "left_out": self.normals.left_out},
            {name: getattr(self, name) for name in _COUNTERS},
        )

    def _restore(self, state: TuneState) -> None:
        restore(state, self.network, self.optimizer, self.schedule, self.generator)
        self.held_out = state.tensors["held_out"]
        self.normals = self.normals.without(state.tensors["left_out"])
        for name in _COUNTERS:
            setattr(self, name, state.facts[name])


def _renews(config: DpdlConfig, keeper: Keeper | None) -> bool:
    arrivals = keeper is not None and config.renew_min_new > 0
    return arrivals or config.renew_every_epochs > 0


_COUNTERS = ("epoch", "step", "stream_start", "stream_seed")


def _optimizer(net: TuneNetwork, config: DpdlConfig) -> torch.optim.Optimizer:
    """AdamW; prototypes and their S faster and without decay: they follow a moving trunk."""
    prototypes = list(net.bridge.parameters())
    known = {id(p) for p in prototypes}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    fast = 10 * config.tune_learning_rate
    return torch.optim.AdamW(
        [
            {"params": rest, "lr": config.tune_learning_rate, "weight_decay": 1e-5},
            {"params": prototypes, "lr": fast, "weight_decay": 0.0},
        ]
    )


def _start_prototypes(
    config: DpdlConfig, trunk: Trunk, images: Shard, generator: torch.Generator
) -> tuple[Bridge, EmaCodebook]:
    """k-means of unit-norm patches of the last stage; variances from within the clusters."""
    rows = _in_order(_patches(config, trunk, images), images)
    total = sum(distributed.row_counts(rows))
    codes = min(config.tune_prototypes, max(1, total // 3))
    codes = min(codes, count_distinct(rows, codes))
    book = kmeans(rows, codes, iterations=25, generator=generator)
    bridge = Bridge(book.means, book.shrunk_variances(), book.log_weights, config.eps)
    bridge.project_()
    return bridge, EmaCodebook(book, decay=0.9)


def _blank_prototypes(config: DpdlConfig, state: TuneState) -> tuple[Bridge, EmaCodebook]:
    """Of the shapes that the state will fill."""
    means = state.tensors["network.bridge.means"]
    ones = torch.ones(len(means))
    book = Codebook(means, ones, torch.ones_like(means), 0.0)
    return Bridge(means, book.variances, ones, config.eps), EmaCodebook(book, decay=0.9)


@torch.no_grad()
def _patches(config: DpdlConfig, trunk: Trunk, images: Shard) -> Tensor:
    """(n, places, F) of this rank's images, each of norm one."""
    parts = []
    for batch in images.batches(config.batch_size):
        check_images(batch, config.image_size, "normals")
        maps = last_map(trunk, batch.to(trunk.mean_255.device))
        parts.append(nn.functional.normalize(maps.flatten(2).transpose(1, 2), dim=2).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 0, trunk.channels[-1])


def _in_order(patches: Tensor, images: Shard) -> Tensor:
    """All ranks' patches, dealt out anew by their images' numbers, (n, F): what k-means draws from
    them then does not depend on who held which image."""
    places = int(distributed.all_max(torch.tensor(patches.shape[1])))
    mine = patches if len(patches) else patches.new_zeros(0, places, patches.shape[2])
    order = distributed.gather_rows(images.numbers).argsort()
    share = distributed.gather_rows(mine)[order].tensor_split(distributed.world_size())
    return share[distributed.rank()].flatten(0, 1)


def _all_of(images: Shard, config: DpdlConfig) -> Tensor:
    size = config.image_size
    parts = list(images.batches(config.batch_size))
    return torch.cat([torch.zeros(0, size, size, 3, dtype=torch.uint8), *parts])
