"""Processes by identity: a pid and its start time, so that only our own are ever signalled.

A pid alone is reused by the kernel; with the start time and the boot it names one process.
Linux only (/proc, pidfd). The records are written by guard.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.embedded.guard import start_ticks

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One process that ran at some time on this boot of the machine."""

    pid: int
    ticks: int
    """Start time in clock ticks since boot."""

    @classmethod
    def current(cls) -> Process:
        return cls(os.getpid(), start_ticks(os.getpid()))

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return int(stat[19]) == self.ticks and stat[0] not in (b"Z", b"X")

    def send(self, number: int) -> bool:
        """Signal it; False when it is gone. Race-free: the pidfd is checked before it is used."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is gone; False when it still runs after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def end(self, grace_s: float) -> None:
        """SIGTERM (and SIGCONT, should it be paused), then SIGKILL after grace_s."""
        if self.send(signal.SIGTERM) and self.send(signal.SIGCONT) and self.wait(grace_s):
            return
        if self.send(signal.SIGKILL):
            self.wait(5.0)

    def paused(self) -> bool:
        """Whether it was stopped by SIGSTOP."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat[0] == b"T"

    def memory_bytes(self) -> int:
        """Resident memory; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def uptime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.ticks / _TICKS_PER_S


def spawn(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: dict[str, str],
    record: Path,
    log: Path,
    owned: bool,
    grace_s: float,
) -> subprocess.Popen[bytes]:
    """Start a command under a guard, which is returned. owned: it ends with this process.

    The log of before, which may say why it must be started again, is LOG.1 then.
    """
    record.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        log.replace(f"{log}.1")
    guard = Path(__file__).with_name("guard.py")
    owner = os.getpid() if owned else 0
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *map(str, (guard, record, log, owner, grace_s)), *argv],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches the owner only, which then ends it in order
    )


@dataclass(frozen=True, slots=True)
class Record:
    """What guard.py wrote about one service."""

    service: Process
    guard: Process
    owner: Process | None
    """The process with which the service ends; None for services that stay."""

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record, or None: never written, unreadable, or of an earlier boot."""
        try:
            data = json.loads(path.read_text())
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            if data["boot"] != boot:
                return None
            owner = data["owner"]
            return cls(
                Process(*data["service"]),
                Process(*data["guard"]),
                Process(*owner) if owner else None,
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
