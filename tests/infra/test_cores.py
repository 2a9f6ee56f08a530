"""Cores of a process: its affinity, and its container's quota."""

import os

import pytest

from infra.cores import num_cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("what is this\n", 8),
        ("100 0\n", 8),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    path = tmp_path / "cpu.max"
    path.write_text(quota)
    assert num_cores(path) == cores


def test_without_a_control_group_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert num_cores(tmp_path / "none") == 2
