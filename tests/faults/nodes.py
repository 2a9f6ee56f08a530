"""Embedded services outside a Stack: several Kafka nodes as one cluster, and servers with TLS.

They run from the stack's own code (infra.embedded) and live as long as the block or this process.
"""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infra.embedded import ports
from infra.embedded.files import new_secret
from infra.embedded.kafka import Kafka, Peer
from infra.embedded.process import Record, spawn
from infra.embedded.service import Place, Service, Tls
from infra.settings import EmbeddedSettings

START_S = 60.0


class Node:
    """One service at one place."""

    def __init__(self, service: Service, place: Place) -> None:
        self.service, self.place = service, place
        self._record = place.home / "process.json"
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; serves() says when it is ready."""
        self.place.home.mkdir(parents=True, exist_ok=True)
        command = self.service.prepare(self.place)
        self._guard = spawn(
            command.argv,
            cwd=command.cwd,
            env=dict(command.env),
            record=self._record,
            log=self.place.home / "service.log",
            owned=True,
            grace_s=self.service.grace_s,
        )

    def serves(self, deadline_s: float = START_S) -> None:
        """Waits until it answers a client."""
        until = time.monotonic() + deadline_s
        while True:
            try:
                return self.service.probe(self.place)
            except Exception:  # whatever its client raises
                if time.monotonic() > until:
                    log = (self.place.home / "service.log").read_text()
                    raise TimeoutError(
                        f"{self.place.home} does not serve:\n{log[-2000:]}"
                    ) from None
                time.sleep(0.1)

    def settings(self) -> dict[str, object]:
        """Its group of the settings."""
        return self.service.settings(self.place)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        record = Record.read(self._record)
        assert record is not None
        record.service.send(9)
        record.service.wait(5.0)
        if self._guard:
            self._guard.wait(10.0)

    def stop(self) -> None:
        if record := Record.read(self._record):
            record.service.end(2.0)
        if self._guard:
            with suppress(subprocess.TimeoutExpired):
                self._guard.wait(10.0)


def place_for(service: Service, home: Path, taken: set[int], **secrets: str) -> Place:
    """Free ports, which join `taken`, and secrets: those given, else new ones."""
    chosen = {}
    for use in service.port_uses:
        chosen[use] = ports.choose(taken)
        taken.add(chosen[use])
    return Place(
        home=home,
        ports=chosen,
        secrets={name: secrets.get(name) or new_secret(name) for name in service.secret_names},
        cache_dir=EmbeddedSettings().cache_dir,
        say=lambda _: None,
    )


@contextmanager
def running(service: Service, home: Path) -> Iterator[Node]:
    """One service, alive as long as the block."""
    node = Node(service, place_for(service, home, set()))
    try:
        node.start()
        node.serves()
        yield node
    finally:
        node.stop()


class KafkaCluster:
    """Nodes 1 to num_nodes: brokers and controllers; every topic on three, two in sync.

    Each has 256 MB of heap: they share one machine with all else.
    """

    def __init__(self, folder: Path, num_nodes: int = 3) -> None:
        taken: set[int] = set()
        plain = Kafka(heap_mb=256)
        secrets = {name: new_secret(name) for name in plain.secret_names}
        places = {
            n: place_for(plain, folder / f"kafka-{n}", taken, **secrets)
            for n in range(1, num_nodes + 1)
        }
        peers = {
            n: Peer(place.ports["controller"], new_secret("cluster_id"))
            for n, place in places.items()
        }
        self.nodes = {
            n: Node(replace(plain, node=n, peers=peers), place) for n, place in places.items()
        }
        self._ends = ExitStack()

    def __enter__(self) -> KafkaCluster:
        with ExitStack() as ends:
            for node in self.nodes.values():
                ends.callback(node.stop)
                node.start()
            for node in self.nodes.values():
                node.serves()
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def settings(self) -> dict[str, Any]:
        """The group `kafka` of the settings."""
        groups = [node.settings() for node in self.nodes.values()]
        bootstrap = ",".join(str(group["bootstrap"]) for group in groups)
        return groups[0] | {"bootstrap": bootstrap, "replication": min(3, len(self.nodes))}


def certify(folder: Path, name: str = "plant") -> Tls:
    """A self-signed certificate for 127.0.0.1, which is its own authority, for a day."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    found = Tls(certificate=folder / "ca.pem", key=folder / "key.pem", ca=folder / "ca.pem")
    found.certificate.write_bytes(pem)
    found.key.write_bytes(secret + pem)  # Kafka wants both in one file; others do not mind
    return found
