"""The deployed application under bad input and faults, at moderate size.

The same code at full size, every fault with a stream of its own: `make faults` (run.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bad_input import bad_input
from run import MEMORY_BOUND_MB
from world import Frames, World, faults, strike

pytestmark = pytest.mark.integration

SHORT = ("consumer SIGKILL", "scorer SIGKILL", "kafka SIGKILL", "redis SIGKILL", "s3 SIGKILL")
PAUSE_S = 3.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("faults")) as running:
        yield running


def test_every_bad_record_has_its_reason_and_every_good_one_its_score(world):
    found = bad_input(world, 1000)
    print(found)
    assert not found.wrong
    assert found.good == 1000
    assert found.good_wrong == 0
    assert not found.miscounted
    assert len(found.outcomes) > 10
    assert found.idle_mb < 400  # a consumer with PyTorch has 900
    assert found.peak_mb < MEMORY_BOUND_MB


def test_one_stream_survives_one_fault_after_another(world):
    frames = Frames(world, "short", num_frames=100_000, fps=60)
    try:
        frames.wait_sent(60)
        for fault in faults(PAUSE_S):
            if fault.name in SHORT or fault.name.startswith("redis"):
                print(fault.name, strike(world, fault))
        sent = frames.wait_end(now=True)
    finally:
        frames.kill()
    world.wait_scored(60)
    account = world.account(sent)
    print(account)
    assert account.perfect, account
    assert account.sent > 300
    assert account.dead > 10
    assert account.alerts > 20
