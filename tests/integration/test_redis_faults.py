"""A Valkey that dies, hangs, is full, a replica, or not ours: told in time, nothing half done."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from pydantic import SecretStr
from results import GROUP, TOPIC, changed, put, result, snapshot

from infra import redis_client
from infra.embedded import Stack
from infra.errors import AuthFailed, DataError, Fenced, ServiceUnavailable, StoreFull
from infra.redis_client import ResultStore
from infra.redis_connection import REPLY_TIMEOUT_S, eviction_policy, make_redis
from infra.settings import Settings, services_file

pytestmark = pytest.mark.integration


def test_what_was_answered_survives_sigkill(settings: Settings, stack: Stack) -> None:
    store = ResultStore(settings)
    put(store, 0, [result(n, anomaly=n % 2 == 0) for n in range(50)], dead={"empty": 3})
    before = snapshot(store, ["cam-1"])
    stack.kill("redis")
    try:
        with pytest.raises(ServiceUnavailable):
            put(store, 50, [result(50)])
    finally:
        stack.start_service("redis")
    assert snapshot(store, ["cam-1"]) == before  # the same client goes on by itself
    put(store, 50, [result(50)])
    assert store.next_offset(GROUP, TOPIC, 0) == 51


def test_a_paused_redis_is_an_error_in_time_and_its_late_write_is_fenced(
    settings: Settings, stack: Stack
) -> None:
    """The request waits in the socket and runs when Redis wakes: the caller must find out."""
    store = ResultStore(settings)
    put(store, 0, [result(0)])
    stack.pause("redis")
    started = time.monotonic()
    try:
        with pytest.raises(ServiceUnavailable):
            put(store, 1, [result(1, anomaly=True)])
        assert time.monotonic() - started < REPLY_TIMEOUT_S + 2
    finally:
        stack.resume("redis")
    with suppress(Fenced):  # the late one was quicker
        put(store, 1, [result(1, anomaly=True)])
    assert store.next_offset(GROUP, TOPIC, 0) == 2
    assert len(store.alerts()) == 1


@contextmanager
def configured(settings: Settings, **options: str) -> Iterator[redis.Redis]:
    admin = make_redis(settings)
    names = [name.replace("_", "-") for name in options]
    before = {name: admin.config_get(name)[name] for name in names}  # type: ignore[index]
    for name, value in zip(names, options.values(), strict=True):
        admin.config_set(name, value)
    try:
        yield admin
    finally:
        for name, value in before.items():
            admin.config_set(name, value)


def test_a_full_redis_says_so_and_writes_nothing(settings: Settings, store: ResultStore) -> None:
    put(store, 0, [result(0, anomaly=True)])
    before = snapshot(store, ["cam-1"])
    with (
        configured(settings, maxmemory="1mb"),
        pytest.raises(StoreFull, match="memory limit") as raised,
    ):
        put(store, 1, [result(1, anomaly=True)])
    assert raised.value.retryable
    assert snapshot(store, ["cam-1"]) == before
    put(store, 1, [result(1, anomaly=True)])


def test_a_redis_that_drops_keys_is_told_of(settings: Settings) -> None:
    assert eviction_policy(settings) == ""
    with configured(settings, maxmemory_policy="allkeys-lru"):
        assert eviction_policy(settings) == ""  # without a limit it drops nothing
        with configured(settings, maxmemory="1gb"):
            assert eviction_policy(settings) == "allkeys-lru"


def test_a_replica_is_not_written_to(settings: Settings, store: ResultStore) -> None:
    put(store, 0, [result(0)])
    admin = make_redis(settings)
    admin.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(ServiceUnavailable, match="primary"):
            put(store, 1, [result(1)])
    finally:
        admin.replicaof("NO", "ONE")
    assert put(store, 1, [result(1)]) == 0


class Address:
    """One address that stands for whichever server is the primary, as a virtual IP does."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target_port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def test_after_a_failover_the_new_primary_is_used(settings: Settings, tmp_path: Path) -> None:
    """The address stands for another server; connections to the demoted one stay open."""
    old = make_redis(settings)
    with (
        Stack(tmp_path / "other", services=["redis"]) as other,
        closing(Address(settings.redis.port)) as address,
    ):
        store = ResultStore(changed(settings, "redis", port=address.port))
        put(store, 0, [result(0)])
        assert store.next_offset(GROUP, TOPIC, 0) == 1
        new = yaml.safe_load(services_file(other.state_dir).read_text())["redis"]
        with redis.Redis(port=new["port"], password=new["password"]) as primary:
            assert settings.redis.password
            primary.config_set("requirepass", settings.redis.password.get_secret_value())
        address.target_port = new["port"]
        old.replicaof("127.0.0.1", "1")
        try:
            with pytest.raises(ServiceUnavailable, match="primary"):
                put(store, 1, [result(1)])
            assert store.next_offset(GROUP, TOPIC, 0) is None  # this test's new one was no replica
            assert put(store, 0, [result(0, anomaly=True)]) == 1
            store.set_threshold("cam-1", 2.0, by="x")
        finally:
            old.replicaof("NO", "ONE")
        store.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"password": SecretStr("wrong")},
        {"password": None},
        {"username": "nobody", "password": SecretStr("x")},
    ],
)
def test_wrong_credentials_are_one_line(settings: Settings, fields: dict[str, Any]) -> None:
    with pytest.raises(AuthFailed, match=r"redis\.password") as raised:
        ResultStore(changed(settings, "redis", **fields))
    assert "\n" not in str(raised.value)
    assert "wrong" not in str(raised.value)


def test_an_acl_user_needs_only_its_prefix(settings: Settings) -> None:
    admin, prefix = make_redis(settings), settings.redis.prefix
    rights = ["+@read", "+@write", "+@scripting", "+@transaction", "+@connection"]
    assert " ".join(rights) in (redis_client.__doc__ or "")
    admin.execute_command("ACL", "SETUSER", prefix, "reset", "on", ">pw", f"~{prefix}:*", *rights)
    try:
        user = {"username": prefix, "password": SecretStr("pw")}
        store = ResultStore(changed(settings, "redis", **user))
        put(store, 0, [result(0, anomaly=True)])
        store.set_threshold("cam-1", 2.0, by="x")
        assert len(store.alerts()) == len(store.cameras()) == 1
        assert store.progress(GROUP, TOPIC) == {0: 1}
        other = ResultStore(changed(settings, "redis", prefix="elsewhere", **user))
        with pytest.raises(AuthFailed, match=f"user {prefix}"):
            put(other, 0, [result(0)])
        with pytest.raises(AuthFailed):
            other.alerts()
        assert eviction_policy(changed(settings, "redis", **user)) == ""
    finally:
        admin.execute_command("ACL", "DELUSER", prefix)


@pytest.mark.parametrize(
    "fields", [{"port": 1}, {"host": "nowhere.invalid"}, {"tls": True, "tls_check_hostname": False}]
)
def test_no_redis_there_is_an_error_in_time(settings: Settings, fields: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="dpdl status") as raised:
        make_redis(changed(settings, "redis", **fields))
    assert time.monotonic() - started < 2 * REPLY_TIMEOUT_S + 3
    assert "\n" not in str(raised.value)


def test_something_else_on_the_port_is_told(settings: Settings) -> None:
    port = int(settings.s3.endpoint.rpartition(":")[2])
    with pytest.raises(ServiceUnavailable):
        make_redis(changed(settings, "redis", port=port))


def test_a_foreign_entry_in_our_stream_is_a_data_error(
    settings: Settings, store: ResultStore
) -> None:
    make_redis(settings).xadd(f"{settings.redis.prefix}:alerts", {"hello": "world"})
    with pytest.raises(DataError, match="unreadable"):
        store.alerts()
