"""Samples by camera: everyone's share, whatever the order in which the cameras were imported."""

from collections import Counter

import pytest

from pipelines.drawing import SPREAD, draw, fair_share
from pipelines.held_out import each_camera
from pipelines.sources import RowGroup, RowRef

GROUP = 128


def described(cameras, minutes=None, rows=GROUP):
    """Row groups of objects of 8 whose rows are of these cameras, in this order."""
    made = []
    for start in range(0, len(cameras), rows):
        number = start // rows
        key, first = f"part-{number // 8}", number % 8 * rows
        refs = []
        for at in range(start, min(start + rows, len(cameras))):
            when = 60 * 10**9 * (minutes[at] if minutes else 0)
            row = first + at - start
            refs.append(RowRef(key, row, f"{at:064x}", 0, "", cameras[at], "", when))
        made.append((RowGroup(key, number % 8, len(refs)), refs))
    return made


def anything(row):
    return True


def by_itself(row):
    return row.digest


def cameras_of(drawn, groups):
    return Counter(row.camera for _, refs in groups for row in refs if (row.key, row.row) in drawn)


@pytest.mark.parametrize("order", ["one after the other", "in turn"])
def test_each_camera_gives_its_share_in_whatever_order_they_were_imported(order):
    """40 cameras of 500 images in 157 row groups, of which eight hold 1,024 images."""
    turn = order == "in turn"
    cameras = [f"cam-{i % 40 if turn else i // 500}" for i in range(40 * 500)]
    groups = described(cameras)
    drawn = draw(groups, anything, by_itself, at_most=1024)
    assert cameras_of(drawn.rows, groups) == {f"cam-{i}": 1024 // 40 for i in range(40)}
    assert len(drawn.groups) <= 40 * SPREAD
    assert drawn == draw(described(cameras), anything, by_itself, at_most=1024)


def test_cameras_with_little_leave_their_share_to_the_others():
    groups = described(["many"] * 2000 + ["few"] * 3 + [""] * 400)
    drawn = draw(groups, anything, by_itself, at_most=103)
    assert cameras_of(drawn.rows, groups) == {"many": 50, "few": 3, "": 50}
    assert fair_share([2000, 3, 400], 103) == 50
    assert fair_share([2, 3, 4], 100) == 4
    assert fair_share([], 100) == 0


def test_each_camera_with_a_name_can_have_what_a_threshold_of_its_own_needs():
    """At .01 that is 99 of different moments; of 40 cameras whose share is less."""
    groups = described([f"cam-{i // 500}" for i in range(40 * 500)] + [""] * 500)
    drawn = draw(groups, anything, by_itself, at_most=1024, each=each_camera(0.01))
    found = cameras_of(drawn.rows, groups)
    assert found.pop("") == 1024 // 41
    assert set(found.values()) == {200}


def test_only_rows_that_may_be_used_are_drawn_and_counted():
    groups = described([f"cam-{i // 500}" for i in range(4 * 500)])

    def keep(row):
        return int(row.digest, 16) % 5 == 0

    drawn = draw(groups, keep, by_itself, at_most=200)
    chosen = [row for _, refs in groups for row in refs if (row.key, row.row) in drawn.rows]
    assert all(map(keep, chosen))
    assert Counter(row.camera for row in chosen) == {f"cam-{i}": 50 for i in range(4)}


def test_of_a_camera_no_moment_gives_two_before_each_has_given_one():
    minutes = [0] * 100 + list(range(1, 29))  # a burst, and 28 frames apart
    groups = described(["cam-1"] * GROUP, minutes)
    drawn = draw(groups, anything, lambda row: str(row.captured_at_ns), at_most=30)
    shown = Counter(minutes[row] for _, row in drawn.rows)
    assert shown == {0: 2, **dict.fromkeys(range(1, 29), 1)}


def test_a_large_sample_is_all_there_is():
    groups = described(["cam-1", "cam-2", ""] * 100)
    drawn = draw(groups, anything, by_itself, at_most=5000)
    assert drawn.groups == [group for group, _ in groups]
    assert len(drawn.rows) == 300
    assert draw([], anything, by_itself, at_most=5000).rows == frozenset()
