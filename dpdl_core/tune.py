"""Fine-tuning of the trunk's last stages by the paper's objective, eqs. 16-23, on images.

Knows the trunk, heads, bridge and losses. What it trains besides the trunk is thrown away:
fit.py learns energies and heads anew on the features it leaves. Off in the edge recipe, where
ten anomalies overfit a tuned trunk (docs/accuracy.md); the paper recipe is made of it.
Letters: B batch, S image side, F channels of the last stage, C prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dpdl_core import distributed
from dpdl_core.augment import cut_paste, dihedral, rotate
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import EmaCodebook, assign, kmeans
from dpdl_core.config import DpdlConfig
from dpdl_core.features import Trunk
from dpdl_core.heads import AnomalyHead, NormalHead, ResidualHead, to_map, to_rows, top_mean
from dpdl_core.images import ImageSource
from dpdl_core.losses import (
    LossTerms,
    RunningMargin,
    anomaly_head_loss,
    dispersion_loss,
    literal_anomaly_loss,
    literal_normal_loss,
    margin_loss,
    normal_head_loss,
    residual_head_loss,
    targets,
    transport_loss,
)

_THIRD = 16
"""Images of each kind in a batch: normal, pseudo, seen."""
_START_IMAGES = 256
"""Normals of each rank whose patches the prototypes start from."""
_SHUFFLE = 512
"""Images held to draw from, so that a source's order is not the order of training."""

Tell = Callable[[float, dict[str, float]], None]


class _Network(nn.Module):
    """Trunk, three heads, prototypes: what is trained together."""

    def __init__(self, trunk: Trunk, bridge: Bridge, codebook: EmaCodebook) -> None:
        super().__init__()
        channels = trunk.channels[-1]
        self.trunk, self.bridge, self.codebook = trunk, bridge, codebook
        self.anomaly = AnomalyHead(channels)
        self.normal = NormalHead(channels)
        self.residual = ResidualHead(channels)
        self.margin = RunningMargin()

    def losses(self, images: Tensor, label: Tensor, config: DpdlConfig) -> LossTerms:
        """images (B, S, S, 3) in 0..255, label (B,) 1 for anomalies."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            features = self.trunk(images)[-1]
        features = features.float()
        batch, _, height, width = features.shape
        rows = nn.functional.normalize(to_rows(features), dim=1)
        energy, winner = self.bridge.nearest(rows)
        residuals = to_map(self.bridge.residual(rows, winner), batch, height, width)
        normal = label == 0
        on_normal = normal.repeat_interleave(height * width)
        image_energy = top_mean(energy.view(batch, height, width))
        self.margin.update(image_energy[normal])
        if config.literal_loss:
            transport = literal_normal_loss(self.bridge, rows[on_normal])
            margin = literal_anomaly_loss(self.bridge, rows[~on_normal])
        else:
            code, _ = assign(rows[on_normal].detach(), self.codebook.means)
            goal = targets(self.codebook.means, code)
            transport = transport_loss(self.bridge, rows[on_normal], goal)
            margin = margin_loss(image_energy[~normal], self.margin.margin)
        self.codebook.update(rows[on_normal], energy[on_normal])
        return LossTerms(
            anomaly_head=anomaly_head_loss(self.anomaly(features).logit, label),
            normal_head=normal_head_loss(self.normal(features), label),
            residual_head=residual_head_loss(self.residual(residuals).logit, label),
            transport=transport,
            margin=margin,
            dispersion=dispersion_loss(features[normal].mean((2, 3)), config.kappa),
        )


def tune(
    config: DpdlConfig,
    trunk: Trunk,
    normals: ImageSource,
    anomalies: Tensor,
    *,
    generator: torch.Generator,
    tell: Tell,
) -> None:
    """Fine-tune `config.tuned_stages` stages of an unfused trunk in place.

    anomalies uint8 (M, S, S, 3), M >= 1, the same on every rank. Ranks draw batches from their
    shards and average gradients, so that more ranks mean larger batches. Raises ValueError if
    the loss stops being finite.
    """
    device = trunk.mean_255.device
    net = _Network(trunk, *_start_prototypes(config, trunk, normals, generator)).to(device)
    for parameter in trunk.parameters():
        parameter.requires_grad_(False)
    for parameter in trunk.tuned_parameters(config.tuned_stages):
        parameter.requires_grad_(True)
    _same_start(net)
    optimizer = _optimizer(net, config)
    steps = config.tune_epochs * config.tune_iterations
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = _shuffled(normals, 2 * _THIRD, generator)
    label = torch.cat([torch.zeros(_THIRD), torch.ones(2 * _THIRD)]).to(device)
    net.train()
    for stage in list(trunk.stages)[: len(trunk.stages) - config.tuned_stages]:
        stage.eval()  # statistics of frozen stages stay frozen too
    for step in range(steps):
        images = _batch(next(stream), anomalies, config, generator).to(device)
        terms = net.losses(images, label, config)
        loss = terms.total(config.dispersion_weight)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step}: lower tune_learning_rate "
                f"({config.tune_learning_rate}), or set literal_loss=false"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        _average_gradients(net)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        net.bridge.project_()
        if (step + 1) % config.tune_iterations == 0:
            tell((step + 1) / steps, {"loss": float(loss.detach())})
    _average_statistics(trunk)
    trunk.eval().requires_grad_(False)


def _optimizer(net: _Network, config: DpdlConfig) -> torch.optim.Optimizer:
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


@torch.no_grad()
def _start_prototypes(
    config: DpdlConfig, trunk: Trunk, normals: ImageSource, generator: torch.Generator
) -> tuple[Bridge, EmaCodebook]:
    """k-means of unit-norm patches of the last stage; variances from within the clusters."""
    parts: list[Tensor] = []
    seen = 0
    for images in normals.batches(config.batch_size):
        maps = trunk(images.to(trunk.mean_255.device))[-1].float()
        parts.append(nn.functional.normalize(to_rows(maps), dim=1).cpu())
        seen += len(images)
        if seen >= _START_IMAGES:
            break
    rows = torch.cat(parts)
    total = sum(distributed.row_counts(rows))
    codes = min(config.tune_prototypes, max(1, total // 3))
    book = kmeans(rows, codes, iterations=25, generator=generator)
    bridge = Bridge(book.means, book.shrunk_variances(), book.log_weights, config.eps)
    bridge.project_()
    return bridge, EmaCodebook(book, decay=0.9)


def _batch(
    normals: Tensor, anomalies: Tensor, config: DpdlConfig, generator: torch.Generator
) -> Tensor:
    """16 normal, 16 pseudo, 16 seen, augmented, (48, S, S, 3) float in 0..255."""
    picked = torch.randint(len(anomalies), (_THIRD,), generator=generator)
    plain = torch.cat([normals, anomalies[picked].to(normals)]).permute(0, 3, 1, 2).float() / 255
    clean, to_spoil, seen = torch.split(plain, _THIRD)
    pseudo, _ = cut_paste(to_spoil, generator=generator)
    images = dihedral(torch.cat([clean, pseudo, seen]), generator=generator)
    if config.rotate:
        images = rotate(images, generator=generator)
    return images.permute(0, 2, 3, 1) * 255


def _shuffled(source: ImageSource, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `count` images for ever, drawn from a buffer that the source fills in order."""
    held = torch.empty(0)
    while True:
        for images in source.batches(count):
            held = torch.cat([held, images]) if len(held) else images
            if len(held) < min(_SHUFFLE, max(count, source.num_images)):
                continue
            order = torch.randperm(len(held), generator=generator)
            yield held[order[:count]]
            held = held[order[count:]]


def _same_start(net: nn.Module) -> None:
    for tensor in net.state_dict().values():
        tensor.copy_(distributed.broadcast(tensor))


def _average_gradients(net: nn.Module) -> None:
    if not distributed.is_distributed():
        return
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(distributed.all_sum(parameter.grad) / distributed.world_size())


def _average_statistics(trunk: Trunk) -> None:
    """Batch norms saw each rank's own images."""
    for buffer in trunk.buffers():
        if buffer.is_floating_point():
            buffer.copy_(distributed.all_sum(buffer) / distributed.world_size())
