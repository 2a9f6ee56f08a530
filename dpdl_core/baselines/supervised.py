"""What DevNet and DRA share: top-K heads at two scales, deviation loss, sampling, training.

The trunk stays frozen: with ten anomalies that was better than tuning it (MATH.md 7: DRA .865
against .833 on ELPV), and its features are then computed once. Written from the papers' formulas;
none of their code is used.
Letters: B batch, c channels, h w sides of a map, N normals, M seen anomalies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl_core.baselines.frozen import FrozenTrunk
from dpdl_core.features import PACKAGE_TRUNK
from dpdl_core.heads import top_mean

LEARNING_RATE = 2e-4
WEIGHT_DECAY = 1e-5
CLIP_NORM = 1.0
BATCH = 48
STEPS_PER_EPOCH = 20
MARGIN = 5.0
"""Standard deviations of the prior that an anomaly's score is to lie above its mean."""
PRIOR_DRAWS = 5000

Maps = list[Tensor]
"""One (B, c, h, w) per scale: full size and half size."""


def check_seen(method: str, num_anomalies: int) -> None:
    """Raises ValueError where a method that learns from seen anomalies is given none."""
    if num_anomalies < 1:
        raise ValueError(
            f"{method} learns from seen anomalies and M={num_anomalies}: need at least 1; "
            "dpdl and the floors do without"
        )


def check_half(method: str, trunk: FrozenTrunk, size: int) -> None:
    """Raises ValueError where the trunk takes no images of half the side S."""
    try:
        trunk.try_size(size // 2)
    except ValueError as error:
        raise ValueError(
            f"{method} looks at images of half the side, too, and the trunk {error}: take another, "
            f"such as {PACKAGE_TRUNK}"
        ) from error


class TopKHead(nn.Module):
    """1x1 convolution, |.|, mean of the top tenth: the multiple-instance score of DevNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c, h, w) -> scores (B,) and the map they come from (B, h, w), both >= 0."""
        places = self.classify(features).squeeze(1).abs()
        return top_mean(places), places


def deviation_loss(score: Tensor, label: Tensor) -> Tensor:
    """(1-y)|z| + y max(0, 5 - z), z the score standardised by draws from N(0, 1) (DevNet eq. 6).

    Shapes: (B,), (B,) of 0 and 1 -> scalar.
    """
    prior = torch.randn(PRIOR_DRAWS)
    z = (score - prior.mean()) / prior.std()
    return ((1 - label) * z.abs() + label * (MARGIN - z).clamp_min(0)).mean()


def half_size(images: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) -> (B, S//2, S//2, 3), the mean of 2 x 2 pixels."""
    x = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2)
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def two_scales(trunk: FrozenTrunk, images: Tensor) -> Maps:
    """uint8 (B, S, S, 3) -> the last stage's maps of the full and of the halved images."""
    sizes = (images, half_size(images))
    batches = ([trunk.views(part).last for part in torch.split(x, trunk.batch_size)] for x in sizes)
    # On the CPU: the heads are small, and their draws are then the same on every machine.
    return [torch.cat(parts).cpu() for parts in batches]


def rows(maps: Maps, index: Tensor) -> Maps:
    return [m[index] for m in maps]


def draw(count: int, of: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers below `of`, with replacement."""
    return torch.randint(of, (count,), generator=generator)


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Initialisation and draws from one seed, and the caller's stream of numbers as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    iterations: int,
    progress: Callable[[float], None],
) -> None:
    """Adam at the published rate with its decay, gradients clipped; leaves the model in eval."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(iterations):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if step % STEPS_PER_EPOCH == 0:
            progress(step / iterations)
    model.eval()
