"""`dpdl alerts --follow` over a Redis that dies and comes back."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from results import put, result

pytestmark = pytest.mark.integration


def lines(path):
    return path.read_text().splitlines()


def wait_lines(path, count):
    until = time.monotonic() + 60
    while len(lines(path)) < count:
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.05)


def test_it_waits_for_redis_says_so_once_and_goes_on_after_the_last_one_shown(
    store, stack, tmp_path
):
    put(store, 0, [result(n, anomaly=True) for n in range(3)])
    shown, said = tmp_path / "shown", tmp_path / "said"
    with shown.open("w") as out, said.open("w") as err:
        follower = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "alerts", "--follow", "--count", "2"],
            env=os.environ | {"COLUMNS": "40"},
            stdout=out,
            stderr=err,
        )
    try:
        wait_lines(shown, 2)
        for turn in (1, 2):
            stack.kill("redis")
            try:
                wait_lines(said, turn)
                time.sleep(2.5)  # several attempts
            finally:
                stack.start_service("redis")
            put(store, 2 + turn, [result(2 + turn, anomaly=True)])
            wait_lines(shown, 2 + turn)
    finally:
        follower.send_signal(signal.SIGTERM)
        follower.wait(20)
    alerts = [json.loads(line) for line in lines(shown)]
    wanted = [(stored.id, stored.result.frame_id) for stored in store.alerts()[1:]]
    assert [(alert["id"], alert["frame_id"]) for alert in alerts] == wanted
    assert len(wanted) == 4
    assert [line.startswith("waiting: Redis at ") for line in lines(said)] == [True, True]
