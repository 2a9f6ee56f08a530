"""One tiny process per service: it is the service's parent, and ends it when the owner is gone.

Runs alone (`python -I -S guard.py ...`), so it imports the standard library only.
Why a process and not PR_SET_PDEATHSIG alone: that signal fires when the *thread* that forked
ends, and it does not let a service stop in good order. A pidfd fires when the whole owner process
is gone, SIGKILL included, and nothing that the owner forks can keep it open.

    guard.py RECORD LOG OWNER GRACE_S COMMAND...

OWNER is a process id, or 0 for services that stay. RECORD gets who was started (see process.py);
it is written before the service runs, so there is no moment at which nobody knows of it.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys

PR_SET_PDEATHSIG = 1
LOG_BYTES = 64 * 2**20
LOOK_S = 60.0


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot; with the pid it names one process."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def launch(command: list[str], log: int, release: int) -> int:
    """Fork the service: it waits for one byte on `release` before it becomes the command."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        # If the guard itself is killed, the service goes with it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.read(release, 1) and os.getppid() == guard:
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.execvp(command[0], command)
    except OSError as error:
        os.write(log, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def write_record(path: str, service: int, owner: int) -> None:
    with open("/proc/sys/kernel/random/boot_id") as boot:
        record = {
            "boot": boot.read().strip(),
            "service": [service, start_ticks(service)],
            "guard": [os.getpid(), start_ticks(os.getpid())],
            "owner": [owner, start_ticks(owner)] if owner else None,
        }
    part = f"{path}.{os.getpid()}"
    with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(record, file)
    os.replace(part, path)


def keep_small(path: str, log: int) -> None:
    """Begin the log anew at LOG_BYTES; the former one is PATH.1. Lines of that moment are lost."""
    if os.fstat(log).st_size > LOG_BYTES:
        with contextlib.suppress(OSError):  # a full disk: all the more reason to go on
            shutil.copy(path, f"{path}.1")
        os.ftruncate(log, 0)  # whoever writes appends


def wake_on_signals() -> int:
    """A file descriptor that becomes readable when this process is told to end."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return read


def end(pid: int, child: int, grace_s: float) -> None:
    """SIGTERM, then SIGKILL after grace_s. SIGCONT lets a paused service hear the first."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        os.kill(pid, number)
    if not select.select([child], [], [], grace_s)[0]:
        os.kill(pid, signal.SIGKILL)
        select.select([child], [], [])


def main(record: str, log_path: str, owner_text: str, grace_s: str, *command: str) -> int:
    owner = int(owner_text)
    watched = [wake_on_signals()]
    if owner:
        try:
            watched.append(os.pidfd_open(owner))
        except ProcessLookupError:
            return 0
        if os.getppid() != owner:
            return 0  # it died before the pidfd existed, and the number may be another's by now
    log = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    release_read, release_write = os.pipe()
    pid = launch(list(command), log, release_read)
    child = os.pidfd_open(pid)
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # the owner died just now
        write_record(record, pid, owner)
        os.write(release_write, b"!")
    os.close(release_write)
    while not (ready := select.select([*watched, child], [], [], LOOK_S)[0]):
        keep_small(log_path, log)
    if child not in ready:
        end(pid, child, float(grace_s))
    # Not yet reaped, so its number still names its own group: whatever it forked goes with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
