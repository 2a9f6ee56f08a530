"""TLS settings reach the clients: a proxy that ends TLS stands before each embedded service.

The embedded services speak plainly on loopback, so the proxy plays the plant's TLS endpoint. For
Kafka that covers the bootstrap connection: afterwards a broker tells its own, plain, address.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infra.errors import ServiceUnavailable
from infra.kafka_client import make_admin
from infra.redis_client import make_redis
from infra.s3_client import ensure_buckets, make_filesystem
from infra.settings import Settings

pytestmark = pytest.mark.integration


@dataclass
class Authority:
    """A self-signed certificate for 127.0.0.1, which is its own authority."""

    ca: Path
    key: Path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plant")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca, key_file = folder / "ca.pem", folder / "key.pem"
    ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Authority(ca, key_file)


class TlsProxy:
    """Ends TLS and passes the bytes on to a plain port."""

    def __init__(self, authority: Authority, target_port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority.ca, authority.key)
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


@pytest.fixture
def secured(settings: Settings, authority: Authority) -> Iterator[Settings]:
    """The same services, reached through TLS."""
    ports = {
        "kafka": int(settings.kafka.bootstrap.rpartition(":")[2]),
        "redis": settings.redis.port,
        "s3": int(settings.s3.endpoint.rpartition(":")[2]),
    }
    proxies = {name: TlsProxy(authority, port) for name, port in ports.items()}
    yield changed(
        settings,
        kafka={
            "bootstrap": f"127.0.0.1:{proxies['kafka'].port}",
            "security_protocol": "SASL_SSL",
            "tls_ca": authority.ca,
        },
        redis={"port": proxies["redis"].port, "tls": True, "tls_ca": authority.ca},
        s3={
            "endpoint": f"127.0.0.1:{proxies['s3'].port}",
            "secure": True,
            "tls_ca": authority.ca,
        },
    )
    for proxy in proxies.values():
        proxy.close()


def changed(settings: Settings, **groups: dict[str, Any]) -> Settings:
    update = {
        name: getattr(settings, name).model_copy(update=fields) for name, fields in groups.items()
    }
    return settings.model_copy(update=update)


def test_a_known_authority_is_trusted(secured: Settings) -> None:
    make_admin(secured).close()
    assert make_redis(secured).ping()
    ensure_buckets(secured)
    filesystem = make_filesystem(secured)
    with filesystem.open_output_stream(f"{secured.s3.data_bucket}/key") as stream:
        stream.write(b"through TLS")
    assert filesystem.open_input_file(f"{secured.s3.data_bucket}/key").read() == b"through TLS"


def test_an_unknown_authority_is_not(secured: Settings) -> None:
    unknown = changed(secured, kafka={"tls_ca": None}, redis={"tls_ca": None}, s3={"tls_ca": None})
    for connect in (make_admin, make_redis, ensure_buckets):
        with pytest.raises(ServiceUnavailable, match=r"(?i)certificate"):
            connect(unknown)


def test_a_certificate_for_another_host_is_refused(secured: Settings) -> None:
    """localhost is the same machine, but the certificate is for 127.0.0.1."""
    elsewhere = changed(
        secured,
        kafka={"bootstrap": secured.kafka.bootstrap.replace("127.0.0.1", "localhost")},
        redis={"host": "localhost"},
        s3={"endpoint": secured.s3.endpoint.replace("127.0.0.1", "localhost")},
    )
    for connect in (make_admin, make_redis, ensure_buckets):
        with pytest.raises(ServiceUnavailable, match=r"(?i)certificate|hostname"):
            connect(elsewhere)
