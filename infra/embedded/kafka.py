"""Apache Kafka 4.4 itself: a KRaft node on the JVM that comes by pip, alone or one of several.

Clients authenticate by SASL/SCRAM, the controller listener by SASL/PLAIN; both on loopback.
The stack runs one node and speaks plainly; several nodes, and TLS, are what the tests of faults
and of security run, from this same code.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded import jvm
from infra.embedded.files import write_private
from infra.embedded.service import (
    HOST,
    PROBE_TIMEOUT_S,
    USER,
    Command,
    Place,
    ServiceName,
    Tls,
    plain_environment,
)
from infra.errors import ServiceUnavailable

_SCRAM = "SCRAM-SHA-256"
_FORMAT_TIMEOUT_S = 120
RETENTION_MB = 512
"""Per partition of a topic: four partitions of frames and the dead letters stay below 3 GB."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node of a cluster as the others know it."""

    controller_port: int
    directory_id: str
    """A UUID in Kafka's spelling, as new_secret("cluster_id") makes them."""


@dataclass(frozen=True, slots=True)
class Kafka:
    node: int = 1
    peers: Mapping[int, Peer] = field(default_factory=dict)
    """Every node of the cluster by its number, this one too; empty: it is alone."""
    heap_mb: int = 512
    tls: Tls | None = None
    """Clients and other nodes then come by SASL_SSL."""

    name: ServiceName = field(default="kafka", init=False)
    title: str = field(default="Apache Kafka", init=False)
    port_uses: tuple[str, ...] = field(default=("client", "controller"), init=False)
    secret_names: tuple[str, ...] = field(
        default=("password", "controller_password", "cluster_id"), init=False
    )
    grace_s: float = field(default=15.0, init=False)

    def fetch(self, cache_dir: Path, say: Callable[[str], None]) -> None:
        jvm.program()
        jvm.class_path(cache_dir, say)

    def prepare(self, place: Place) -> Command:
        java = jvm.command(place.cache_dir, place.say, heap_mb=self.heap_mb)
        self.lay_out(place, java)
        return self.run(place, java)

    def run(self, place: Place, java: list[str]) -> Command:
        """The broker on what lay_out() has laid out."""
        # Its native libraries unpack there; kill -9 would leave them in /tmp.
        temporary = f"-Djava.io.tmpdir={place.home / 'tmp'}"
        argv = [java[0], temporary, *java[1:], "kafka.Kafka", str(place.home / "server.properties")]
        return Command(argv, place.home, plain_environment())

    def lay_out(self, place: Place, java: list[str]) -> None:
        """Write the configuration; the first time also the storage, with the clients' credential.

        Raises ServiceUnavailable with what Kafka's own tool says.
        """
        properties = place.home / "server.properties"
        write_private(properties, self._properties(place))
        formatted = place.home / "formatted"
        if formatted.exists():
            return
        shutil.rmtree(place.home / "data", ignore_errors=True)  # left by a format that was killed
        (place.home / "tmp").mkdir(exist_ok=True)
        credential = f"{_SCRAM}=[name={USER},password={place.secrets['password']}]"
        words = ["format", "-t", place.secrets["cluster_id"], "-c", str(properties)]
        words += [*self._quorum(), "--ignore-formatted", "--add-scram", credential]
        # "@file" is read by the tool itself, so that the password is on no command line.
        arguments = place.home / "format.args"
        write_private(arguments, "\n".join(words))
        try:
            done = subprocess.run(
                [*java, "kafka.tools.StorageTool", f"@{arguments}"],
                capture_output=True,
                text=True,
                env=plain_environment(),
                timeout=_FORMAT_TIMEOUT_S,
            )
        finally:
            arguments.unlink()
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ServiceUnavailable(f"Apache Kafka cannot prepare {place.home}: {' '.join(said)}")
        formatted.touch()

    def probe(self, place: Place) -> None:
        from kafka import KafkaAdminClient

        address = (HOST, place.ports["client"])
        # A refused connection is known at once; the client would go on trying for its time-out.
        socket.create_connection(address, PROBE_TIMEOUT_S).close()
        timeout_ms = int(PROBE_TIMEOUT_S * 1000)
        admin = KafkaAdminClient(
            bootstrap_servers=f"{HOST}:{address[1]}",
            security_protocol=self._protocol,
            ssl_cafile=str(self.tls.ca) if self.tls else None,
            sasl_mechanism=_SCRAM,
            sasl_plain_username=USER,
            sasl_plain_password=place.secrets["password"],
            request_timeout_ms=timeout_ms,
            bootstrap_timeout_ms=timeout_ms,
        )
        try:
            admin.list_topics()
        finally:
            admin.close()

    def settings(self, place: Place) -> dict[str, object]:
        found: dict[str, object] = {
            "bootstrap": f"{HOST}:{place.ports['client']}",
            "security_protocol": self._protocol,
            "sasl_mechanism": _SCRAM,
            "sasl_username": USER,
            "sasl_password": place.secrets["password"],
            # Topics that we create: a laptop keeps less than a plant.
            "retention_mb": RETENTION_MB,
        }
        return found | ({"tls_ca": str(self.tls.ca)} if self.tls else {})

    def litter(self, place: Place) -> list[Path]:
        return []

    @property
    def _protocol(self) -> str:
        return "SASL_SSL" if self.tls else "SASL_PLAINTEXT"

    def _quorum(self) -> list[str]:
        """How the storage tool is told of the controllers."""
        if not self.peers:
            return ["--standalone"]
        voters = (
            f"{node}@{HOST}:{peer.controller_port}:{peer.directory_id}"
            for node, peer in self.peers.items()
        )
        return ["--initial-controllers", ",".join(voters)]

    def _properties(self, place: Place) -> str:
        client, controller = place.ports["client"], place.ports["controller"]
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
        password, inner = place.secrets["password"], place.secrets["controller_password"]
        controllers = [peer.controller_port for peer in self.peers.values()] or [controller]
        copies = min(3, len(controllers))
        in_sync = 2 if copies == 3 else 1
        return f"""\
process.roles=broker,controller
node.id={self.node}
controller.quorum.bootstrap.servers={",".join(f"{HOST}:{port}" for port in controllers)}
listeners=CLIENT://{HOST}:{client},CONTROLLER://{HOST}:{controller}
advertised.listeners=CLIENT://{HOST}:{client},CONTROLLER://{HOST}:{controller}
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
listener.security.protocol.map=CLIENT:{self._protocol},CONTROLLER:SASL_PLAINTEXT
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-256
sasl.mechanism.controller.protocol=PLAIN
listener.name.client.sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.client.scram-sha-256.sasl.jaas.config={scram} required \\
  username="{USER}" password="{password}";
listener.name.controller.sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config={plain} required \\
  username="controller" password="{inner}" user_controller="{inner}";
log.dirs={place.home / "data"}
auto.create.topics.enable=false

# alone, nothing is replicated
default.replication.factor={copies}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={copies}
share.coordinator.state.topic.min.isr={in_sync}
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
# on disk within a second, as Valkey's file; by itself Kafka leaves that to the kernel, and after
# a power cut would lack frames that are already scored. The second line alone does nothing.
log.flush.scheduler.interval.ms=500
log.flush.interval.ms=500
# after kill -9 it waits for its own dead session: back in 3.5 s, with the defaults in 11 s
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500

# a laptop: three days or 512 MiB a partition, whichever is less
log.retention.hours=72
log.retention.bytes=536870912
log.segment.bytes=67108864
log.retention.check.interval.ms=60000
log.cleaner.dedupe.buffer.size=16777216
# a frame of 32 MiB and what is around it
message.max.bytes=34603008
replica.fetch.max.bytes=34603008
num.network.threads=2
num.io.threads=4
{self._tls_lines()}"""

    def _tls_lines(self) -> str:
        if not self.tls:
            return ""
        # Kafka wants a key and its certificate in one PEM file. Nodes are clients of each other.
        return f"""
ssl.keystore.type=PEM
ssl.keystore.location={self.tls.key}
ssl.truststore.type=PEM
ssl.truststore.location={self.tls.ca}
"""
