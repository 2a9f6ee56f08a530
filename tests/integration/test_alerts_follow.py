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


def dpdl_alerts(*options):
    command = [sys.executable, "-m", "cluster.cli", "alerts", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_who_handed_alerts_on_goes_on_after_the_last_one(store):
    put(store, 0, [result(n, anomaly=True) for n in range(230)])
    ids = [stored.id for stored in store.latest_alerts(500)[::-1]]
    done = dpdl_alerts("--after", ids[9])
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids[10:]
    assert dpdl_alerts("--after", ids[-1]).stdout == dpdl_alerts("--count", "0").stdout == ""
    for wrong in (("--after", "yesterday"), ("--after", ids[0], "--count", "3")):
        done = dpdl_alerts(*wrong)
        assert (done.returncode != 0, "--after" in done.stderr) == (True, True)


def test_what_was_trimmed_since_is_said(store, tmp_path):
    put(store, 0, [result(n, anomaly=True) for n in range(230)])
    ids = [stored.id for stored in store.latest_alerts(500)[::-1]]
    store._redis.xtrim(store._key("alerts"), maxlen=200, approximate=False)
    done = dpdl_alerts("--after", ids[9])
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids[30:]
    assert len(done.stderr.splitlines()) == 1
    assert f"missing between {ids[9]} (" in done.stderr
    assert f"and {ids[30]} (" in done.stderr
    for kept in (ids[30], ids[120], "0"):
        assert dpdl_alerts("--after", kept).stderr == ""
    said = tmp_path / "said"
    with said.open("w") as err:
        command = [sys.executable, "-m", "cluster.cli", "alerts", "-f", "--after", ids[9]]
        follower = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
    try:
        wait_lines(said, 1)
    finally:
        follower.send_signal(signal.SIGTERM)
        follower.wait(20)
    assert lines(said) == done.stderr.splitlines()


@pytest.mark.parametrize("begin", ["--count=0", "--after={}"])
def test_it_follows_from_where_one_says(store, tmp_path, begin):
    put(store, 0, [result(n, anomaly=True) for n in range(3)])
    last = store.latest_alerts(1)[0].id
    with (tmp_path / "shown").open("w") as out:
        follower = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "alerts", "-f", begin.format(last)], stdout=out
        )
    try:
        number = 3
        while not lines(tmp_path / "shown") and number < 60:  # when it began to look is not said
            put(store, number, [result(number, anomaly=True)])
            number += 1
            time.sleep(1)
    finally:
        follower.send_signal(signal.SIGTERM)
        follower.wait(20)
    first = json.loads(lines(tmp_path / "shown")[0])
    assert first["id"] > last
    if "after" in begin:
        assert first["id"] == store.alerts(last)[0].id


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
