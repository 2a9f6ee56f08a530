"""One tiny process per service: it is the service's parent, and ends it when the owner is gone.

Runs alone (`python -I -S guard.py ...`), so it imports the standard library only.
Why a process and not PR_SET_PDEATHSIG alone: that signal fires when the *thread* that forked
ends, and it does not reach a service that was meant to stop in good order. A pidfd fires when the
whole owner process is gone, SIGKILL included, and nothing that the owner forks can keep it open.

    guard.py RECORD LOG OWNER GRACE_S COMMAND...

OWNER is a process id, or 0 for services that stay. RECORD gets who was started (see process.py);
it is written before the service runs, so there is no moment at which nobody knows of it.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1


def start_ticks(pid):
    """Start time of a process in clock ticks since boot; with the pid it names one process."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def launch(command, log, release):
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
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.execvp(command[0], command)
    except OSError as error:
        os.write(log, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def write_record(path, record):
    part = f"{path}.{os.getpid()}"
    with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(record, file)
    os.replace(part, path)


def end(pid, child, grace_s):
    """SIGTERM, then SIGKILL after grace_s. SIGCONT lets a paused service hear the first."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        os.kill(pid, number)
    if not select.select([child], [], [], grace_s)[0]:
        os.kill(pid, signal.SIGKILL)


def main(record, log_path, owner, grace_s, *command):
    owner = int(owner)
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    watched = [stop_read]
    if owner:
        try:
            watched.append(os.pidfd_open(owner))
        except ProcessLookupError:
            return 0
        if os.getppid() != owner:
            return 0  # it died before the pidfd existed, and the number may be another's by now
    log = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    release_read, release_write = os.pipe()
    pid = launch(command, log, release_read)
    child = os.pidfd_open(pid)
    with open("/proc/sys/kernel/random/boot_id") as boot:
        boot_id = boot.read().strip()
    write_record(
        record,
        {
            "boot": boot_id,
            "service": [pid, start_ticks(pid)],
            "guard": [os.getpid(), start_ticks("self")],
            "owner": [owner, start_ticks(owner)] if owner else None,
            "at": time.time(),
        },
    )
    os.write(release_write, b"!")
    ready = select.select([*watched, child], [], [])[0]
    if child not in ready:
        end(pid, child, float(grace_s))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
