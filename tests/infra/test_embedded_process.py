"""The guard: no service outlives its owner, and nobody else's process is ever signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.embedded.guard import keep_small
from infra.embedded.process import Process, Record, spawn

STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Record]]]:
    """Starts a shell command under a guard; whatever is left is ended with the test."""
    guards: list[subprocess.Popen[bytes]] = []

    def start(
        script: str, *, owned: bool = True, grace_s: float = 5.0
    ) -> tuple[subprocess.Popen[bytes], Record]:
        guard = spawn(
            ["sh", "-c", script],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            record=tmp_path / "record.json",
            log=tmp_path / "log",
            owned=owned,
            grace_s=grace_s,
        )
        guards.append(guard)
        return guard, wait_for_record(tmp_path)

    yield start
    for guard in guards:
        guard.kill()
        guard.wait()


def wait_for_record(folder: Path) -> Record:
    for _ in range(500):
        if record := Record.read(folder / "record.json"):
            return record
        time.sleep(0.02)
    raise AssertionError("the guard wrote no record in 10 s")


def owner(folder: Path, body: str) -> subprocess.Popen[str]:
    """A process that starts `sleep` under a guard and then runs `body`."""
    code = f"""
        import os, threading, time
        from pathlib import Path
        from infra.embedded.process import spawn
        def start(owned=True):
            return spawn(
                ["sleep", "600"], cwd=Path("{folder}"), env=dict(os.environ),
                record=Path("{folder}/record.json"), log=Path("{folder}/log"),
                owned=owned, grace_s=5.0,
            )
    """
    program = textwrap.dedent(code) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_the_record_names_service_guard_and_owner(start):
    guard, record = start("sleep 600")
    assert record.guard.pid == guard.pid
    assert record.owner == Process.current()
    assert record.service.alive()


def test_output_goes_to_the_log_and_the_exit_code_to_the_owner(start, tmp_path):
    guard, _ = start("echo out; echo err >&2; exit 7")
    assert guard.wait(10) == 7
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_service_ends_when_its_owner_does(how, tmp_path):
    parent = owner(tmp_path, "start(); time.sleep(600)")
    record = wait_for_record(tmp_path)
    parent.send_signal(how)
    parent.wait(10)
    assert record.service.wait(10)
    assert record.guard.wait(10)


def test_what_the_owner_forked_does_not_keep_the_service(tmp_path):
    """A pipe would: the fork holds its other end."""
    parent = owner(tmp_path, "start(); print(os.fork(), flush=True); time.sleep(600)")
    record = wait_for_record(tmp_path)
    forked = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait(10)
        assert record.service.wait(10)
    finally:
        os.kill(forked, signal.SIGKILL)


def test_the_service_survives_the_thread_that_started_it(start):
    """PR_SET_PDEATHSIG in the service, set for the owner, would end it here."""
    found: list[Record] = []
    thread = threading.Thread(target=lambda: found.append(start("sleep 600")[1]))
    thread.start()
    thread.join()
    assert not found[0].service.wait(0.5)


def test_the_service_ends_when_its_guard_is_killed(start):
    guard, record = start("exec sleep 600")
    guard.kill()
    assert record.service.wait(10)


def test_a_detached_service_survives_its_starter_and_is_found(tmp_path):
    parent = owner(tmp_path, "start(owned=False); time.sleep(1)")
    record = wait_for_record(tmp_path)
    assert parent.wait(20) == 0
    assert record.owner is None
    assert not record.service.wait(0.3)
    record.service.end(grace_s=5.0)
    assert record.guard.wait(10)


def test_a_service_that_ignores_sigterm_is_killed_after_its_grace(start):
    guard, record = start(STUBBORN, grace_s=0.3)
    time.sleep(0.3)  # let it set its trap
    guard.terminate()
    assert record.service.wait(10)


def test_a_paused_service_can_be_ended(start):
    _, record = start("exec sleep 600")
    record.service.send(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not record.service.paused() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert record.service.paused()
    record.service.end(grace_s=5.0)
    assert not record.service.alive()


def test_what_the_service_forked_goes_with_it(start, tmp_path):
    guard, record = start("sleep 600 & echo $!; wait")
    deadline = time.monotonic() + 10
    while not (said := (tmp_path / "log").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = Path(f"/proc/{int(said)}/cmdline")
    record.service.send(signal.SIGKILL)
    guard.wait(10)
    deadline = time.monotonic() + 10
    while grandchild.exists() and grandchild.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not grandchild.exists() or not grandchild.read_bytes()


def test_a_process_that_has_only_the_same_number_is_never_signalled(start):
    _, record = start("exec sleep 600")
    stranger = Process(record.service.pid, record.service.ticks - 1)
    assert not stranger.alive()
    assert not stranger.send(signal.SIGKILL)
    stranger.end(grace_s=0.1)
    assert record.service.alive()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"boot": "another", "service": [1, 1]}'])
def test_a_record_that_says_nothing_of_this_boot_counts_as_none(content, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(content)
    assert Record.read(path) is None


def test_a_command_that_does_not_exist_is_told_in_the_log(tmp_path):
    guard = spawn(
        ["/no/such/program"],
        cwd=tmp_path,
        env={},
        record=tmp_path / "record.json",
        log=tmp_path / "log",
        owned=True,
        grace_s=1.0,
    )
    assert guard.wait(10) == 127
    assert "/no/such/program: " in (tmp_path / "log").read_text()


def test_the_log_of_the_run_before_is_kept(start, tmp_path):
    for word in ("first", "second"):
        started, _ = start(f"echo {word}", owned=False)
        started.wait(10)
    assert (tmp_path / "log").read_text() == "second\n"
    assert (tmp_path / "log.1").read_text() == "first\n"


def test_a_log_begins_anew_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.embedded.guard.LOG_BYTES", 10)
    path = tmp_path / "log"
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for line in (b"0123456789\n", b"short\n"):
        os.write(log, line)
        keep_small(str(path), log)
    os.close(log)
    assert path.read_bytes() == b"short\n"
    assert (tmp_path / "log.1").read_bytes() == b"0123456789\n"
