"""Augmentation: what is pasted, where, how large; poses and turns against plain tensor code."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from dpdl_core.augment import AREA, ASPECT, cut_paste, dihedral, rotate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(batch=1, height=40, width=50):
    """Images whose first two channels name each pixel's row and column, the third its image."""
    rows = torch.arange(height)[:, None].expand(height, width) / 100
    columns = torch.arange(width)[None].expand(height, width) / 100
    images = torch.stack([rows, columns, torch.zeros(height, width)]).repeat(batch, 1, 1, 1)
    images[:, 2] = (torch.arange(batch) / 1000)[:, None, None]
    return images


def box(mask):
    """Top, left, height, width of the only rectangle in a mask."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert int(mask.sum()) == len(rows) * len(columns)
    return int(rows[0]), int(columns[0]), len(rows), len(columns)


def test_a_paste_is_a_shifted_rectangle_and_the_rest_is_untouched():
    images = coordinates(64)
    pasted, masks = cut_paste(images, jitter=0.0, generator=seeded())
    assert torch.equal(images, coordinates(64))
    moved = 0
    for image, before, mask in zip(pasted, images, masks, strict=True):
        top, left, height, width = box(mask)
        assert torch.equal(image[:, ~mask], before[:, ~mask])
        inside = (image[:2, top : top + height, left : left + width] * 100).round()
        source_top, source_left = (int(inside[axis, 0, 0]) for axis in (0, 1))
        want = before[:, source_top : source_top + height, source_left : source_left + width]
        torch.testing.assert_close(image[:, top : top + height, left : left + width], want)
        moved += (source_top, source_left) != (top, left)
    assert moved > 55


def test_areas_aspects_and_places_are_as_stated():
    """Uniform area, log-uniform aspect, uniform place: Kolmogorov-Smirnov on 1,000 rectangles."""
    images = torch.zeros(1000, 3, 1, 1).expand(-1, -1, 160, 160)
    masks = torch.cat(
        [cut_paste(part, generator=seeded(i))[1] for i, part in enumerate(images.split(50))]
    )
    heights, widths = masks.any(2).sum(1).double(), masks.any(1).sum(1).double()
    share = (heights * widths / 160**2).numpy()
    low, high = AREA
    assert kstest(share, "uniform", args=(low, high - low)).pvalue > 1e-3
    aspect = (heights / widths).log().numpy()
    span = math.log(1 / ASPECT)
    assert kstest(aspect, "uniform", args=(-span, 2 * span)).pvalue > 1e-3
    tops = masks.any(2).double().argmax(1) / (160 - heights)
    assert kstest(tops.numpy(), "uniform").statistic < 0.05  # whole pixels: not quite uniform


def test_pastes_across_images_come_from_the_donor():
    images = coordinates(8)
    pasted, masks = cut_paste(images, donors=images.roll(1, 0), jitter=0.0, generator=seeded())
    for index in range(8):
        values = pasted[index, 2][masks[index]]
        torch.testing.assert_close(values, torch.full_like(values, ((index - 1) % 8) / 1000))


def test_jitter_is_mild_and_stays_in_range():
    images = torch.rand(32, 3, 64, 64, generator=seeded())
    plain, masks = cut_paste(images, jitter=0.0, generator=seeded(1))
    jittered, same = cut_paste(images, jitter=0.1, generator=seeded(1))
    assert torch.equal(masks, same)
    change = (jittered - plain).abs()
    assert 0 < change.max() < 0.35
    assert (change.amax((1, 2, 3)) > 0).all()
    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_jitter_in_three_plain_steps():
    """Brightness, contrast about the mean, saturation, one after the other, on one rectangle
    that fills the image; factors found from the generator's own stream."""
    from dpdl_core.augment import _jitter

    image = 0.3 + 0.4 * torch.rand(1, 3, 8, 8, generator=seeded())
    factors = 1 + 0.1 * (2 * torch.rand(3, 1, 1, 1, 1, generator=seeded(2)) - 1)
    step = image * factors[0]
    step = step.mean() + factors[1] * (step - step.mean())
    grey = step.mean(1, keepdim=True)
    want = grey + factors[2] * (step - grey)
    got = _jitter(image, torch.ones(1, 8, 8, dtype=torch.bool), 0.1, seeded(2))
    torch.testing.assert_close(got, want)


def test_all_eight_poses_occur_alike():
    image = torch.rand(1, 3, 5, 5, generator=seeded())
    poses = [torch.rot90(flip, k, (2, 3)) for flip in (image, image.flip(3)) for k in range(4)]
    turned = dihedral(image.expand(1600, -1, -1, -1), generator=seeded(1))
    counts = [int((turned == pose).all((1, 2, 3)).sum()) for pose in poses]
    assert sum(counts) == 1600
    assert min(counts) > 150


def test_oblong_images_are_only_flipped():
    image = torch.rand(1, 3, 4, 6, generator=seeded())
    poses = [image, image.flip(2), image.flip(3), image.flip(2, 3)]
    turned = dihedral(image.expand(400, -1, -1, -1), generator=seeded(1))
    counts = [int((turned == pose).all((1, 2, 3)).sum()) for pose in poses]
    assert sum(counts) == 400
    assert min(counts) > 60


@pytest.mark.parametrize("shape", [(41, 41), (41, 61)])
def test_a_turn_is_rigid(shape):
    """A bright spot ends where the rotation puts it, at the same distance from the middle, for
    oblong images too."""
    height, width = shape
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    image = torch.zeros(1, 3, height, width)
    image[:, :, 10, 30] = 1.0
    turned = rotate(image.expand(64, -1, -1, -1), padding="zeros", generator=seeded())
    mass = turned[:, 0] / turned[:, 0].sum((1, 2), keepdim=True)
    rows = (mass.sum(2) * torch.arange(height)).sum(1)
    columns = (mass.sum(1) * torch.arange(width)).sum(1)
    offset = torch.stack([rows - middle[0], columns - middle[1]], 1).double()
    radius = np.hypot(*(np.array([10, 30]) - middle))
    np.testing.assert_allclose(offset.norm(dim=1), radius, atol=0.4)
    angles = torch.atan2(offset[:, 0], offset[:, 1])
    assert angles.max() - angles.min() > 5.5  # all the way round


def test_no_turn_is_no_change():
    images = torch.rand(3, 3, 16, 20, generator=seeded())
    torch.testing.assert_close(rotate(images, 0.0), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("augment", [cut_paste, rotate, dihedral])
def test_draws_repeat_with_their_generator(augment):
    images = torch.rand(6, 3, 32, 32, generator=seeded())
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    one, again, other = (first(augment(images, generator=seeded(s))) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.dtype == images.dtype


@pytest.mark.parametrize("augment", [cut_paste, rotate, dihedral])
def test_bytes_are_refused(augment):
    with pytest.raises(ValueError, match="floating point"):
        augment(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_what_is_no_paste_is_refused():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="donors"):
        cut_paste(images, donors=images[:1])
    with pytest.raises(ValueError, match="area"):
        cut_paste(images, area=(0.5, 0.1))
