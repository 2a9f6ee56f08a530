"""TLS on real servers: Kafka by SASL_SSL, SeaweedFS by https, with our clients and our settings.

The valkey-server that comes by pip is built without TLS, so a proxy that ends TLS stands before it:
that tests our client and its settings, not the server.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from kafka import TopicPartition

sys.path.insert(0, str(Path(__file__).parent))
from nodes import certify, running

from infra.embedded.files import write_private
from infra.embedded.kafka import Kafka
from infra.embedded.seaweedfs import SeaweedFs
from infra.embedded.service import Tls
from infra.embedded.valkey import Valkey
from infra.errors import DpdlError, ServiceUnavailable
from infra.kafka_client import ensure_topics, make_admin, make_consumer, make_producer
from infra.redis_connection import make_redis
from infra.s3_client import ensure_buckets, make_filesystem
from infra.settings import Settings, load_settings

pytestmark = pytest.mark.integration


class TlsProxy:
    """Ends TLS and passes the bytes on to a plain port."""

    def __init__(self, server: Tls, target_port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server.certificate, server.key)
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError):
            client = self._context.wrap_socket(plain, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
            self._pass(client, server)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Three services that speak TLS only, and the settings that reach them."""
    folder = tmp_path_factory.mktemp("tls")
    server = certify(folder / "server")
    with (
        running(Kafka(heap_mb=256, tls=server), folder / "kafka") as kafka,
        running(SeaweedFs(tls=server), folder / "s3") as s3,
        running(Valkey(), folder / "redis") as redis,
    ):
        groups = {node.service.name: node.settings() for node in (kafka, s3, redis)}
        proxy = TlsProxy(server, redis.place.ports["client"])
        groups["redis"] |= {"port": proxy.port, "tls": True, "tls_ca": str(server.ca)}
        write_private(folder / "dpdl.yaml", yaml.safe_dump(groups))
        yield load_settings(
            {"DPDL_CONFIG": str(folder / "dpdl.yaml"), "DPDL_STATE_DIR": str(folder / "state")}
        )
        proxy.close()


def changed(settings: Settings, **groups: dict[str, Any]) -> Settings:
    update = {
        name: getattr(settings, name).model_copy(update=fields) for name, fields in groups.items()
    }
    return settings.model_copy(update=update)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is known at once; the client would go on trying for ten seconds."""
    monkeypatch.setattr("infra.kafka_client.BOOTSTRAP_TIMEOUT_S", 4.0)


CONNECT = {"kafka": make_admin, "redis": make_redis, "s3": ensure_buckets}


def test_frames_travel_by_tls(secured: Settings) -> None:
    """Beyond the first connection too: the broker tells an address that speaks TLS."""
    assert secured.kafka.security_protocol == "SASL_SSL"
    ensure_topics(secured)
    producer = make_producer(secured)
    producer.send(secured.kafka.topic, b"frame", partition=0).get(30)
    producer.close()
    consumer = make_consumer(secured)
    place = TopicPartition(secured.kafka.topic, 0)
    consumer.assign([place])
    consumer.seek(place, 0)
    assert [record.value for record in consumer.poll(10_000)[place]] == [b"frame"]
    consumer.close()


def test_objects_and_results_travel_by_tls(secured: Settings) -> None:
    assert make_redis(secured).ping()
    ensure_buckets(secured)
    filesystem = make_filesystem(secured)
    with filesystem.open_output_stream(f"{secured.s3.data_bucket}/key") as stream:
        stream.write(b"through TLS")
    assert filesystem.open_input_file(f"{secured.s3.data_bucket}/key").read() == b"through TLS"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("service", CONNECT)
def test_an_authority_that_is_not_known_is_one_line(
    secured: Settings, service: str, tmp_path: Path
) -> None:
    other = certify(tmp_path, "somebody else").ca
    for authority in (None, other):
        with pytest.raises(ServiceUnavailable, match=r"(?i)certificate") as caught:
            CONNECT[service](changed(secured, **{service: {"tls_ca": authority}}))
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("service", "plain"),
    [
        ("kafka", {"security_protocol": "SASL_PLAINTEXT"}),
        ("redis", {"tls": False}),
        ("s3", {"secure": False}),
    ],
)
def test_a_client_without_tls_is_one_line(
    secured: Settings, service: str, plain: dict[str, Any]
) -> None:
    with pytest.raises(DpdlError) as caught:  # SeaweedFS answers, with "bad request"
        CONNECT[service](changed(secured, **{service: plain}))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_a_certificate_for_another_host_is_refused(secured: Settings) -> None:
    """localhost is the same machine, but the certificate is for 127.0.0.1."""
    elsewhere = changed(
        secured,
        kafka={"bootstrap": secured.kafka.bootstrap.replace("127.0.0.1", "localhost")},
        redis={"host": "localhost"},
        s3={"endpoint": secured.s3.endpoint.replace("127.0.0.1", "localhost")},
    )
    for connect in CONNECT.values():
        with pytest.raises(ServiceUnavailable, match=r"(?i)certificate|hostname"):
            connect(elsewhere)
