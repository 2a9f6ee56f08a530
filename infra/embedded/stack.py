"""Starts, finds and stops the loopback services that a state folder belongs to.

State folder (mode 0700):
  embedded.json   ports and generated secrets, chosen once (0600)
  services.yaml   how clients reach what runs now; infra.settings reads it (0600)
  run/NAME.json   which processes run (guard.py writes it)
  logs/NAME.log   what each service says; NAME.log.1: before its last start, or before 64 MB
  kafka/ s3/ redis/   data and configuration

Guarantee: no service outlives its owner, however that ends, unless it was started detached;
and no process is signalled that this state folder did not start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from infra.embedded import ports as free_ports
from infra.embedded.diagnose import explain
from infra.embedded.files import new_secret, write_private
from infra.embedded.kafka import Kafka
from infra.embedded.process import Process, Record, spawn
from infra.embedded.seaweedfs import SeaweedFs
from infra.embedded.service import Place, Service, ServiceName
from infra.embedded.valkey import Valkey
from infra.errors import ServiceUnavailable, SettingsError
from infra.settings import EmbeddedSettings, services_file

SERVICES: tuple[Service, ...] = (Kafka(), SeaweedFs(), Valkey())
SERVICE_NAMES: tuple[ServiceName, ...] = tuple(service.name for service in SERVICES)
_BY_NAME: dict[ServiceName, Service] = {service.name: service for service in SERVICES}
_MIN_FREE_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    name: ServiceName
    title: str
    pid: int | None
    port: int | None
    healthy: bool
    """It answered a client's request just now."""
    detail: str
    """running, paused, not answering, stopped."""
    memory_bytes: int = 0
    uptime_s: float = 0.0


class Stack:
    """The embedded services of one state folder.

    As a context manager the services live exactly as long as the block, or the process. With
    detached=True they stay until stop() is called by anyone on the same folder.
    """

    def __init__(
        self,
        state_dir: Path | str,
        *,
        services: Collection[ServiceName] = SERVICE_NAMES,
        instead: Collection[Service] = (),
        detached: bool = False,
        ports: Mapping[str, int] | None = None,
        cache_dir: Path | None = None,
        deadline_s: float = 120.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """services: which kinds to run. instead: others than the embedded ones, of the same names.

        ports: client ports that a person fixed, by name.
        cache_dir: where fetched jars are kept. deadline_s: longest that a service may take to
        serve. say: told what is being done, in one line each.
        """
        self.state_dir = Path(state_dir).absolute()
        self.cache_dir = cache_dir or EmbeddedSettings().cache_dir
        self._kinds = _BY_NAME | {service.name: service for service in instead}
        self._services = {name: self._kinds[name] for name in SERVICE_NAMES if name in services}
        self._detached = detached
        self._fixed = dict(ports or {})
        self._deadline_s = deadline_s
        self._say = say
        self._guards: dict[ServiceName, subprocess.Popen[bytes]] = {}
        self._cancel = threading.Event()

    # -- all services ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start what does not run, in parallel, until all serve. Idempotent.

        What a killed earlier run left behind is ended; what `up` left running is used. Raises
        SettingsError (a person must change something) or ServiceUnavailable, in one line; then
        nothing that this call started is left.
        """
        self._cancel.clear()
        self._make_folders()
        with self._lock():
            running = {name for name in self._services if self._running(name)}
            if set(self._services) - running:
                self._check_disk()
            for name in set(self._services) - running:
                self._services[name].fetch(self.cache_dir, self._say)
            try:
                self._each(self._bring_up, self._services)
            except BaseException:
                self._cancel.set()
                self._each(self._end, set(self._services) - running)
                raise
            self._write_services_file()

    def stop(self) -> None:
        """Stop the services that this Stack owns; a detached one stops all of the folder."""
        if not self.state_dir.is_dir():
            return
        self._cancel.set()
        with self._lock():
            names = SERVICE_NAMES if self._detached else tuple(self._guards)
            self._each(self._end, names)
            if not any(self._record(name) for name in SERVICE_NAMES):
                services_file(self.state_dir).unlink(missing_ok=True)

    def status(self) -> list[ServiceStatus]:
        """Asks each service with a client; takes up to two seconds where one does not answer."""
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            return list(pool.map(self._status, self._kinds.values()))

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- one service ----------------------------------------------------------------------------

    def start_service(self, name: ServiceName) -> None:
        """Start one service on its ports and data, until it serves; nothing if it does already."""
        self._cancel.clear()
        self._bring_up(name)
        self._write_services_file()

    def _bring_up(self, name: ServiceName) -> None:
        service = self._services[name]
        if not self._running(name):
            place = self._place(service, keep_ports=False)
            self._say(f"starting {service.title} on port {place.ports[service.port_uses[0]]}")
            self._launch(service, place)
        self._wait_ready(service)

    def stop_service(self, name: ServiceName) -> None:
        """Stop one service in good order."""
        self._end(name)

    def kill(self, name: ServiceName) -> None:
        """SIGKILL one service, as a crash would, and wait until it is gone."""
        self._signal(name, signal.SIGKILL)
        if record := self._record(name):
            record.service.wait(5.0)
        self._reap(name)

    def pause(self, name: ServiceName) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: ServiceName) -> None:
        """SIGCONT, the end of pause()."""
        self._signal(name, signal.SIGCONT)

    def pid(self, name: ServiceName) -> int | None:
        record = self._record(name)
        return record.service.pid if record else None

    def log_path(self, name: ServiceName) -> Path:
        return self.state_dir / "logs" / f"{name}.log"

    # -- starting -------------------------------------------------------------------------------

    def _running(self, name: ServiceName) -> bool:
        """Whether a usable one runs; ends one whose owner is dead. Refuses another's live one."""
        record = self._record(name)
        if record is None:
            return False
        if record.owner is None or record.owner == Process.current():
            return True
        if record.owner.alive():
            raise SettingsError(
                f"{self.state_dir} is in use by process {record.owner.pid}, which runs its own "
                "services there: wait for its end, or set DPDL_STATE_DIR to another folder"
            )
        self._say(f"ending {name}, left by a run that was killed")
        self._end(name)
        return False

    def _launch(self, service: Service, place: Place) -> None:
        name = service.name
        place.home.mkdir(mode=0o700, exist_ok=True)
        command = service.prepare(place)
        self._guards[name] = spawn(
            command.argv,
            cwd=command.cwd,
            env=dict(command.env),
            record=self._record_path(name),
            log=self.log_path(name),
            owned=not self._detached,
            grace_s=service.grace_s,
        )

    def _wait_ready(self, service: Service) -> None:
        """Ask until it serves. One line that says why, when it ends or the deadline passes."""
        name = service.name
        place = self._place(service, keep_ports=True)
        deadline = time.monotonic() + self._deadline_s
        while not self._cancel.is_set():
            # Before the probe: if it is gone, somebody else may be answering on its port.
            guard = self._guards.get(name)
            if (guard and guard.poll() is not None) or not (guard or self._record(name)):
                raise ServiceUnavailable(
                    explain(f"{service.title} ended while it started", self.log_path(name))
                )
            try:
                service.probe(place)
                return
            except Exception as error:  # whatever the client raises while it does not serve
                last = error
            if time.monotonic() > deadline:
                found = f"{service.title} does not serve after {self._deadline_s:.0f} s ({last})"
                raise ServiceUnavailable(explain(found, self.log_path(name)))
            self._cancel.wait(0.05)
        raise ServiceUnavailable(f"{service.title}: start was interrupted")

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self.state_dir).free
        if free < _MIN_FREE_BYTES:
            raise SettingsError(
                f"{self.state_dir}: {free / 1e9:.1f} GB free, wanted {_MIN_FREE_BYTES / 1e9:.1f} "
                "GB for the embedded services: free some, or set DPDL_STATE_DIR to another disk"
            )

    # -- ending ---------------------------------------------------------------------------------

    def _end(self, name: ServiceName) -> None:
        record = self._record(name)
        if record:
            record.service.end(self._kinds[name].grace_s)
        elif guard := self._guards.get(name):
            guard.terminate()  # it has not yet said what it started; it ends that too
        self._reap(name)

    def _reap(self, name: ServiceName) -> None:
        guard = self._guards.pop(name, None)
        if guard:
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.wait(10.0)
        service = self._kinds[name]
        for path in service.litter(self._place(service, keep_ports=True)):
            path.unlink(missing_ok=True)

    def _signal(self, name: ServiceName, number: int) -> None:
        record = self._record(name)
        if record is None or not record.service.send(number):
            raise ServiceUnavailable(f"{name} does not run in {self.state_dir}: start it first")

    # -- state folder ---------------------------------------------------------------------------

    def _make_folders(self) -> None:
        for folder in (self.state_dir, self.state_dir / "run", self.state_dir / "logs"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One start or stop at a time on a folder."""
        with (self.state_dir / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _record_path(self, name: ServiceName) -> Path:
        return self.state_dir / "run" / f"{name}.json"

    def _record(self, name: ServiceName) -> Record | None:
        """What runs now under that name, None if nothing."""
        record = Record.read(self._record_path(name))
        return record if record and record.service.alive() else None

    def _place(self, service: Service, *, keep_ports: bool) -> Place:
        """Ports and secrets of a service, chosen at its first start and then remembered."""
        with _state_lock:
            path = self.state_dir / "embedded.json"
            state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            known = state.setdefault(service.name, {"ports": {}, "secrets": {}})
            if not keep_ports:
                others = {p for s in state.values() for p in s["ports"].values()}
                known["ports"] = self._choose_ports(service, known["ports"], others)
            for secret in service.secret_names:
                known["secrets"].setdefault(secret, new_secret(secret))
            if not keep_ports:
                write_private(path, json.dumps(state, indent=1))
        return Place(
            home=self.state_dir / service.name,
            ports=known["ports"],
            secrets=known["secrets"],
            cache_dir=self.cache_dir,
            say=self._say,
        )

    def _choose_ports(
        self, service: Service, remembered: Mapping[str, int], taken: set[int]
    ) -> dict[str, int]:
        chosen: dict[str, int] = {}
        for use in service.port_uses:
            port = self._fixed.get(service.name) if use == service.port_uses[0] else None
            if port is not None and not free_ports.is_free(port):
                raise SettingsError(
                    f"port {port}, set for {service.title}, is taken by another program: end "
                    f"that, or unset the port and a free one is chosen"
                )
            port = port or remembered.get(use)
            if port is None or not free_ports.is_free(port):
                port = free_ports.choose(taken | set(chosen.values()))
            chosen[use] = port
        return chosen

    def _write_services_file(self) -> None:
        groups = {
            name: service.settings(self._place(service, keep_ports=True))
            for name, service in self._services.items()
        }
        head = "# Written by the embedded services while they run; do not edit.\n"
        write_private(services_file(self.state_dir), head + yaml.safe_dump(groups, sort_keys=False))

    def _status(self, service: Service) -> ServiceStatus:
        record = self._record(service.name)
        if record is None:
            return ServiceStatus(service.name, service.title, None, None, False, "stopped")
        place = self._place(service, keep_ports=True)
        healthy, detail = True, "running"
        try:
            service.probe(place)
        except Exception:  # whatever the client raises while it does not serve
            healthy, detail = False, "paused" if record.service.paused() else "not answering"
        return ServiceStatus(
            service.name,
            service.title,
            record.service.pid,
            place.ports[service.port_uses[0]],
            healthy,
            detail,
            record.service.memory_bytes(),
            record.service.uptime_s(),
        )

    def _each(self, act: Callable[[ServiceName], None], names: Collection[ServiceName]) -> None:
        """Act on all at once; when one fails, the others give up and its error is raised."""
        if not names:
            return
        with ThreadPoolExecutor(len(names)) as pool:
            futures = [pool.submit(act, name) for name in names]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._cancel.set()
                raise


_state_lock = threading.Lock()
