"""Which pictures are twins, and that twins are dealt to one side."""

from collections import Counter

import cv2
import numpy as np
import pytest

from dpdl_core.images import decode_image
from dpdl_core.protocol import load_dataset
from dpdl_core.twins import deal_together, thumbnail, twins


def again(picture, rng):
    """The same thing taken once more: exposure, noise and aim are not quite the same."""
    aim = np.float32([[1, 0, rng.integers(-2, 3)], [0, 1, rng.integers(-2, 3)]])
    moved = cv2.warpAffine(picture, aim, picture.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    seen = moved * rng.uniform(0.98, 1.02) + rng.normal(0, 3, picture.shape)
    return seen.clip(0, 255).astype(np.uint8)


def scene(rng):
    """A plate of 192 pixels with a grid that all have and a pattern of its own."""
    pattern = cv2.GaussianBlur(rng.normal(0, 1, (192, 192)), (0, 0), 12)
    picture = 120 + 25 * pattern / pattern.std()
    picture[::48] += 60
    picture[:, ::48] += 60
    return picture.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)


def found(pictures, at_most=12):
    seen = [thumbnail(picture) for picture in pictures]
    return twins(seen, np.mean(seen, axis=0, dtype="f4"), at_most)


def test_pictures_of_one_scene_are_twins_and_those_of_two_are_not():
    rng = np.random.default_rng(0)
    pictures = [again(each, rng) for each in [scene(rng) for _ in range(40)] for _ in range(3)]
    order = rng.permutation(len(pictures))
    groups = [{order[i] // 3 for i in group} for group in found([pictures[i] for i in order])]
    assert all(len(scenes) == 1 for scenes in groups)
    assert len(groups) <= 42  # of 120: nearly every scene is one group


def test_cells_that_look_alike_stay_apart_and_planted_twins_are_found():
    """ELPV, whose cells all have one grid."""
    rng = np.random.default_rng(0)
    cells = [decode_image(sample.read(), 300) for sample in load_dataset("elpv").normals[::8]]
    assert sum(len(group) > 1 for group in found(cells)) < 0.03 * len(cells)
    planted = [again(cell, rng) for cell in cells]
    groups = [set(group) for group in found([*cells, *planted])]
    together = sum(any({i, i + len(cells)} <= group for group in groups) for i in range(len(cells)))
    assert together > 0.9 * len(cells)


def test_no_group_is_larger_than_asked_even_of_one_scene():
    """A film: each frame is its neighbours' twin, the first is not the last's."""
    rng = np.random.default_rng(0)
    first, last, others = scene(rng), scene(rng), [scene(rng) for _ in range(20)]
    film = [cv2.addWeighted(last, i / 29, first, 1 - i / 29, 0) for i in range(30)]
    groups = [group for group in found([*film, *others], at_most=5) if group[0] < 30]
    assert len(groups) < 20
    assert max(map(len, groups)) == 5
    # Neighbours are together, not frames from here and there.
    assert all(max(group) - min(group) < 10 for group in groups)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_few_pictures_are_no_special_case(number):
    rng = np.random.default_rng(0)
    pictures = [thumbnail(scene(rng)) for _ in range(number)]
    assert twins(pictures, np.zeros((32, 32), np.float32), 5) == [[i] for i in range(number)]


PARTS = ["train"] * 6 + ["calibration"] * 2 + ["test"] * 4


def test_without_twins_nothing_moves():
    assert deal_together(PARTS, [[i] for i in range(12)]) == PARTS


def test_twins_go_to_one_part_and_every_part_keeps_its_number():
    groups = [[0, 6], [1, 8, 9], [2], [3], [4], [5], [7], [10], [11]]
    dealt = deal_together(PARTS, groups)
    assert Counter(dealt) == Counter(PARTS)
    assert all(len({dealt[i] for i in group}) == 1 for group in groups)
    assert dealt == deal_together(PARTS, groups)


def test_a_group_that_fits_nowhere_is_dealt_one_by_one():
    dealt = deal_together(PARTS, [list(range(12))])
    assert dealt == PARTS
