"""Pseudo anomalies by cut and paste, and turns: batched, on the images' device, seeded.

Knows tensors only. Used by tune.py and baselines/dra.py. Papers: DPDL section 5.3 (CutMix for
pseudo anomalies); CutPaste, arXiv:2104.04015, for the sizes; rotation as in DRA.
Shapes: images (B, 3, H, W), floating point in [0, 1], before any normalisation.

Every random number comes from `generator`, drawn on its own device: a CPU generator gives the
same augmentations on every device. A rank that holds some images of a batch gives `Draws`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

AREA = (0.02, 0.15)
"""Share of the image that a pasted rectangle covers, uniform."""
ASPECT = 0.3
"""Height over width is log-uniform in (ASPECT, 1 / ASPECT)."""


@dataclass(frozen=True)
class Draws:
    """Some rows' share of the random numbers that a whole batch takes from `generator`.

    Each image is then augmented as it would be beside all the others, whoever holds them, and the
    generator ends in the same state.
    """

    generator: torch.Generator
    total: int
    """Images in the whole batch."""
    rows: Tensor
    """(B,), which of them the images at hand are."""


Source = torch.Generator | Draws | None


def cut_paste(
    images: Tensor,
    *,
    donors: Tensor | None = None,
    area: tuple[float, float] = AREA,
    aspect: float = ASPECT,
    jitter: float = 0.1,
    generator: Source = None,
) -> tuple[Tensor, Tensor]:
    """Paste a jittered rectangle of each image, or of its donor, at a uniform place.

    donors (B, 3, H, W): where rectangles are cut; the image itself if None. For pastes across
    images give other normals, e.g. `images.roll(1, 0)`. Returns images and the pasted places
    (B, H, W) bool. The arguments stay as they are.
    """
    _check(images)
    if donors is not None and donors.shape != images.shape:
        raise ValueError(f"donors are {tuple(donors.shape)}: want {tuple(images.shape)}")
    if not 0 < area[0] <= area[1] < 1:
        raise ValueError(f"area={area}: want two shares of the image, in order, in (0, 1)")
    batch, _, height, width = images.shape
    draw = _uniform(4, batch, generator, images.device)
    share = area[0] + (area[1] - area[0]) * draw[0]
    # height / width of the rectangle, in pixels; what does not fit is cut to the image.
    ratio = ((2 * draw[1] - 1) * math.log(1 / aspect)).exp()
    tall = (share * height * width * ratio).sqrt().round().clamp(1, height)
    wide = (share * height * width / ratio).sqrt().round().clamp(1, width)
    top, left = _start(draw[2], height - tall), _start(draw[3], width - wide)
    sources = _uniform(2, batch, generator, images.device)
    source_top, source_left = _start(sources[0], height - tall), _start(sources[1], width - wide)

    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside = ((rows >= top[:, None]) & (rows < (top + tall)[:, None]))[:, :, None] & (
        (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    )[:, None, :]
    from_rows = (rows + (source_top - top)[:, None]).clamp(0, height - 1).long()
    from_columns = (columns + (source_left - left)[:, None]).clamp(0, width - 1).long()
    pasted = _take(images if donors is None else donors, from_rows, from_columns)
    pasted = _jitter(pasted, inside, jitter, generator)
    return torch.where(inside[:, None], pasted, images), inside


def rotate(
    images: Tensor,
    degrees: float = 180.0,
    *,
    padding: str = "reflection",
    generator: Source = None,
) -> Tensor:
    """Turn each image by an angle uniform in (-degrees, degrees), bilinear.

    padding fills the corners: "reflection" with more of the image, "zeros" with black, as
    DRA's RandomRotation does; black corners are something a detector can learn.
    """
    _check(images)
    if not len(images):
        return images  # a grid of none is refused
    turn = (2 * _uniform(1, len(images), generator, images.device)[0] - 1) * math.radians(degrees)
    cosine, sine, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    # The grid's unit is half a side: an oblong image needs its aspect to turn rigidly.
    oblong = images.shape[2] / images.shape[3]
    rows = [cosine, -sine * oblong, zero, sine / oblong, cosine, zero]
    theta = torch.stack(rows, 1).view(-1, 2, 3).to(images.dtype)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    turned: Tensor = grid_sample(images, grid, padding_mode=padding, align_corners=False)
    return turned


def dihedral(images: Tensor, *, generator: Source = None) -> Tensor:
    """Flip and quarter-turn each image to one of its eight poses, or four if it is oblong."""
    _check(images)
    batch, _, height, width = images.shape
    flips = _uniform(3, batch, generator, images.device) < 0.5
    rows = _flipped(height, flips[0], images.device)
    columns = _flipped(width, flips[1], images.device)
    taken = _take(images, rows, columns)
    if height != width:
        return taken
    return torch.where(flips[2][:, None, None, None], taken.transpose(2, 3), taken)


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels at (rows (B, H), columns (B, W)) of each image."""
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    taken = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2).contiguous()


def _flipped(size: int, flip: Tensor, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    return torch.where(flip[:, None], size - 1 - index, index)


def _jitter(images: Tensor, inside: Tensor, amount: float, generator: Source) -> Tensor:
    """Brightness, contrast about the rectangle's mean, and saturation, each times
    U(1 - amount, 1 + amount), in this order; clipped to [0, 1]."""
    draw = _uniform(3, len(images), generator, images.device).to(images.dtype)
    draw = draw.view(3, -1, 1, 1, 1)
    brightness, contrast, saturation = 1 + amount * (2 * draw - 1)
    grey = images.mean(1, keepdim=True)
    within = inside[:, None].to(images.dtype)
    mean = (grey * within).sum((2, 3), keepdim=True) / within.sum((2, 3), keepdim=True)
    # The three in one go: each is linear in the pixel, its grey and the rectangle's mean.
    gain = brightness * contrast
    shift = gain * (1 - saturation) * grey + brightness * (1 - contrast) * mean
    jittered: Tensor = (gain * saturation * images + shift).clamp(0, 1)
    return jittered


def _start(draw: Tensor, room: Tensor) -> Tensor:
    """A uniform whole number from 0 to room, both included."""
    return torch.minimum((draw * (room + 1)).floor(), room)


def _uniform(count: int, batch: int, generator: Source, device: torch.device) -> Tensor:
    """(count, batch) in [0, 1)."""
    if isinstance(generator, Draws):
        drawn = _uniform(count, generator.total, generator.generator, device)
        return drawn[:, generator.rows.to(device)]
    source = device if generator is None else generator.device
    return torch.rand(count, batch, generator=generator, device=source).to(device)


def _check(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}: want floating point "
            "(B, 3, H, W) in [0, 1]"
        )
