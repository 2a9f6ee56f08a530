"""Twins: the same thing pictured twice, or moments apart. An import deals them to one side
(pipelines/dealing.py) and a cross-fit to one fold (calibrate.py), since beside a twin that was
learnt a held-out picture passes for one unseen.

Two pictures are twins where one of them, shifted a little and with another brightness and contrast,
leaves less than ALIKE of what the mean picture of the whole set leaves of the other: what all
pictures share, such as the grid of a solar cell, makes no two of them alike. No model is asked.
Letters: N pictures, S side of a thumbnail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from dpdl_core.images import Pixels

SIDE = 32
ALIKE = 0.02
"""Of 300 pictures with twins planted (2 % brighter or darker, noise of 3 grey levels, shifted by 2
pixels) this finds 96 % on ELPV, 92 % on HeadCT, 99 % on BrainMRI; 5 % of ELPV's cells then have a
twin among the others."""
NEAREST = 8
"""So many pictures are compared with each one: the nearest of a coarse look at all pairs. The twin
that was planted is among them in 99 of 100 cases on ELPV, which is where most look alike."""
_BLUR = 1.5
"""Pixels of the decoded square: so smooth, a shift by part of a thumbnail's pixel is linear."""
_BLOCK = 256
_STEPS = 2
_EDGE = 2
"""Pixels of a thumbnail: what a shift may bring in from outside is not compared."""
_HOPELESS = 0.3

Thumbnail = npt.NDArray[np.uint8]


def thumbnail(pixels: Pixels) -> Thumbnail:
    """Decoded, square, 2 S pixels wide or more, (., ., 3) -> (S, S) grey."""
    if len(pixels) != 2 * SIDE:
        pixels = cv2.resize(pixels, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    grey = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (0, 0), _BLUR)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.uint8)


def twins(
    thumbnails: Sequence[Thumbnail], common: npt.NDArray[np.float32], at_most: int
) -> list[list[int]]:
    """Groups of at most so many pictures, each with its twins; most are of one. In order.

    common: the mean thumbnail of the whole set (S, S), whatever the labels. The likest join first,
    so that a group that would be too large, as a film is, falls apart where it is least alike.
    Takes 16 N^2 bytes through the processor: 100,000 pictures, a few minutes.
    """
    group_of = list(range(len(thumbnails)))
    members = {i: [i] for i in group_of}
    if at_most > 1 and len(thumbnails) > 1:
        for _, i, j in sorted(_alike(np.stack(thumbnails).astype(np.float32), common)):
            a, b = sorted((group_of[i], group_of[j]))
            if a != b and len(members[a]) + len(members[b]) <= at_most:
                for each in members[b]:
                    group_of[each] = a
                members[a] += members.pop(b)
    return [sorted(members[a]) for a in sorted(members)]


def deal_together(part_of: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """The part of each picture, as before but for groups that were dealt to several: these go to
    the part of their first, or, where that is full, to the emptiest, and others make room.

    Every part keeps its number of pictures. A group that fits nowhere is dealt one by one.
    """
    room = Counter(part_of)
    dealt = list(part_of)
    # The largest first, those of one last: they fit everywhere.
    waiting = sorted(groups, key=lambda group: (-len(group), group[0]))
    while waiting:
        group = waiting.pop(0)
        part = part_of[group[0]]
        if room[part] < len(group):
            part = max(sorted(room), key=room.__getitem__)
        if room[part] < len(group):
            waiting += [[each] for each in group]
            continue
        room[part] -= len(group)
        for each in group:
            dealt[each] = part
    return dealt


def _alike(
    pictures_NSS: npt.NDArray[np.float32], common: npt.NDArray[np.float32]
) -> list[tuple[float, int, int]]:
    """(what is left, one, other) of all pairs that are twins."""
    alone = [_left(common, picture) for picture in pictures_NSS]
    found = []
    for i, j in _near(pictures_NSS, common):
        worst = 0.0
        for a, b in ((i, j), (j, i)):
            left = _left(pictures_NSS[a], pictures_NSS[b], hopeless=_HOPELESS * alone[b])
            worst = max(worst, left / alone[b] if alone[b] > 0 else 1.0)
            if worst >= ALIKE:
                break
        else:
            found.append((worst, i, j))
    return found


def _near(
    pictures_NSS: npt.NDArray[np.float32], common: npt.NDArray[np.float32]
) -> list[tuple[int, int]]:
    """Pairs of each picture and the NEAREST by correlation of what sets it off from the common."""
    rows = _unit(np.stack([_coarse(picture) for picture in pictures_NSS]))
    rows = _unit(rows - _unit(_coarse(common)[None]))
    pairs = set()
    nearest = min(NEAREST, len(rows) - 1)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] @ rows.T
        mine = np.arange(len(block))
        block[mine, start + mine] = -np.inf
        others = np.argpartition(-block, nearest - 1, axis=1)[:, :nearest]
        pairs |= {
            (min(start + i, int(j)), max(start + i, int(j)))
            for i, row in enumerate(others)
            for j in row
        }
    return sorted(pairs)


def _coarse(picture_SS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    coarse = cv2.resize(picture_SS, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA)
    return coarse.ravel().astype(np.float32)


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows without their mean, of length 1: brightness and contrast are gone."""
    rows = rows - rows.mean(1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = rows / np.maximum(lengths, 1e-6)
    return unit


def _left(
    of: npt.NDArray[np.float32], picture: npt.NDArray[np.float32], *, hopeless: float = np.inf
) -> float:
    """Sum of squares that is left of a picture (S, S) by the best of all shifts, contrasts and
    brightnesses `of` another: Gauss-Newton from no shift, to 2 pixels; above `hopeless` it ends.
    """
    inner = (slice(_EDGE, -_EDGE),) * 2
    wanted = picture[inner].ravel()
    shift, left = np.zeros(2), np.inf
    for _ in range(_STEPS):
        move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
        moved = cv2.warpAffine(
            of, move, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        down, right = np.gradient(moved)
        terms = np.stack([x[inner].ravel() for x in (moved, right, down, np.ones_like(moved))])
        # A picture without contrast has no shift: the small diagonal keeps that solvable.
        normal = (terms @ terms.T).astype(np.float64) + 1e-3 * np.eye(4)
        weights = np.linalg.solve(normal, (terms @ wanted).astype(np.float64))
        left = float(np.square(wanted - weights.astype(np.float32) @ terms).sum())
        if left > hopeless or weights[0] < 0.2:
            break
        shift = np.clip(shift - weights[1:3] / weights[0], -2, 2)
    return left
