"""Which rows are looked at where all would be too many: of each camera its fair share.

An import may bring one camera after the other, so a sample of whole row groups would know a few
cameras only. Drawn are rows, by a digest of where they lie, so the same rows give the same draw;
read is what these rows lie in: row groups, since nothing smaller can be read of an image column.
Knows rows and row groups; no S3, no pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipelines.sources import Keep, RowGroup, RowRef

SPREAD = 2
"""A camera's rows are drawn from row groups that hold so many times as many: one group's images
often follow one another."""

Moment = Callable[[RowRef], str]
"""The same for rows that show about the same."""


@dataclass(frozen=True)
class Drawn:
    groups: list[RowGroup]
    """Those that have to be read, in the order in which they came."""
    rows: frozenset[tuple[str, int]]
    """Key and row of what was drawn."""


def draw(
    described: Iterable[tuple[RowGroup, Sequence[RowRef]]],
    keep: Keep,
    moment: Moment,
    *,
    at_most: int,
    each: int = 0,
) -> Drawn:
    """Rows that `keep` lets pass: at most so many in all, but of each camera one, and of a camera
    with a name `each`, where it has them.

    A camera with fewer than its share leaves the rest to the others. Of a camera's moments each
    gives one row before one gives a second.
    """
    groups: list[RowGroup] = []
    found: list[list[tuple[int, str, str]]] = []
    names: dict[str, str] = {}
    for group, refs in described:
        some = [
            (row.row, names.setdefault(row.camera, row.camera), moment(row))
            for row in refs
            if keep(row)
        ]
        if some:
            groups.append(group)
            found.append(some)
    there = Counter(camera for some in found for _, camera, _ in some)
    share = max(1, fair_share(list(there.values()), at_most))
    wanted = {camera: max(share, each) if camera else share for camera in there}
    chosen = _groups_to_read(groups, found, there, wanted)
    by_camera: dict[str, list[tuple[str, str, str, int]]] = {}
    for i in chosen:
        for row, camera, shown in found[i]:
            mark = _mark(groups[i].key, row)
            by_camera.setdefault(camera, []).append((mark, shown, groups[i].key, row))
    rows = frozenset(
        each_one
        for camera, some in by_camera.items()
        for each_one in _first_of_moments(some)[: wanted[camera]]
    )
    read = [i for i in chosen if any((groups[i].key, row) in rows for row, _, _ in found[i])]
    return Drawn([groups[i] for i in read], rows)


def fair_share(counts: Sequence[int], at_most: int) -> int:
    """The most that each may give so that all together give at most so many."""
    left = at_most
    for i, count in enumerate(sorted(counts)):
        share = left // (len(counts) - i)
        if count > share:
            return share
        left -= count
    return max(counts, default=0)


def _groups_to_read(
    groups: Sequence[RowGroup],
    found: Sequence[Sequence[tuple[int, str, str]]],
    there: Counter[str],
    wanted: dict[str, int],
) -> list[int]:
    """Numbers of groups that hold SPREAD times what is wanted of each camera, or all it has."""
    counts = [Counter(camera for _, camera, _ in some) for some in found]
    holding: dict[str, list[int]] = {camera: [] for camera in there}
    for i in sorted(range(len(groups)), key=lambda i: _mark(groups[i].key, groups[i].index)):
        for camera in counts[i]:
            holding[camera].append(i)
    chosen: set[int] = set()
    have: Counter[str] = Counter()
    for camera in sorted(there):
        for i in holding[camera]:
            if have[camera] >= SPREAD * wanted[camera]:
                break
            if i not in chosen:
                chosen.add(i)
                have += counts[i]
    return sorted(chosen)


def _first_of_moments(rows: Iterable[tuple[str, str, str, int]]) -> list[tuple[str, int]]:
    """(key, row) of (mark, moment, key, row): one of each moment, then a second of each, and so on;
    else by mark."""
    before: Counter[str] = Counter()
    turns = []
    for mark, shown, key, row in sorted(rows):
        turns.append((before[shown], mark, key, row))
        before[shown] += 1
    return [(key, row) for _, _, key, row in sorted(turns)]


def _mark(key: str, number: int) -> str:
    return hashlib.sha256(f"{key} {number}".encode()).hexdigest()
