"""One short stream through the really deployed application, struck by one fault after another.

The same code at full size, every fault with a stream of its own: `make faults` (run.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from world import Frames, World, faults, strike

pytestmark = pytest.mark.integration

SHORT = ("consumer SIGKILL", "scorer SIGKILL", "kafka SIGKILL", "redis SIGKILL", "s3 SIGKILL")
PAUSE_S = 3.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("faults")) as running:
        yield running


def test_one_stream_survives_one_fault_after_another(world):
    frames = Frames(world, "short", num_frames=100_000, fps=60)
    try:
        frames.wait_sent(60)
        for fault in faults(PAUSE_S):
            if fault.name in SHORT or fault.name.startswith(("kafka", "redis")):
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
