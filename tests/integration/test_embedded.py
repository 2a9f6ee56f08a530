"""The embedded services, real: start, stop, kill, secrets, and what is left behind (nothing)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
import yaml
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from kafka.errors import KafkaError
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from rich.console import Console

import cluster.stack
from infra.embedded import SERVICE_NAMES, Stack, jvm, ports, seaweedfs
from infra.embedded.process import Record
from infra.errors import DataError, ServiceUnavailable, SettingsError
from infra.settings import Settings, load_settings

pytestmark = pytest.mark.integration


def kafka_auth(settings: Settings, **changes: str) -> dict[str, object]:
    kafka = settings.kafka
    assert kafka.sasl_password is not None
    auth: dict[str, object] = {
        "bootstrap_servers": kafka.bootstrap,
        "security_protocol": kafka.security_protocol,
        "sasl_mechanism": kafka.sasl_mechanism,
        "sasl_plain_username": kafka.sasl_username,
        "sasl_plain_password": kafka.sasl_password.get_secret_value(),
        "bootstrap_timeout_ms": 5_000,
    }
    return auth | changes


def s3(settings: Settings, **changes: str) -> Minio:
    secret = settings.s3.secret_key
    assert secret is not None
    keys = {"access_key": settings.s3.access_key, "secret_key": secret.get_secret_value()}
    return Minio(settings.s3.endpoint, **(keys | changes), secure=False)


def valkey(settings: Settings, password: str | None = None) -> redis.Redis:
    secret = settings.redis.password
    assert secret is not None
    password = secret.get_secret_value() if password is None else password
    return redis.Redis(settings.redis.host, settings.redis.port, password=password)


def read_record(state_dir: Path, name: str) -> Record:
    record = Record.read(state_dir / "run" / f"{name}.json")
    assert record is not None
    return record


def known_secrets(stack: Stack) -> list[str]:
    state = json.loads((stack.state_dir / "embedded.json").read_text())
    return [
        secret
        for service in state.values()
        for name, secret in service["secrets"].items()
        if name != "cluster_id"
    ]


@pytest.fixture
def own_state(tmp_path, monkeypatch):
    """A state folder of this test alone; whatever still runs there afterwards is ended."""
    for name in [name for name in os.environ if name.startswith("DPDL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPDL_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    Stack(tmp_path / "state", detached=True).stop()


def python(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True
    )


# -- secrets --------------------------------------------------------------------------------------


def test_no_secret_is_on_a_command_line_or_in_an_environment(stack):
    secrets = known_secrets(stack)
    assert len(secrets) == 5
    seen = 0
    for name in SERVICE_NAMES:
        record = read_record(stack.state_dir, name)
        for process in (record.service, record.guard):
            for file in ("cmdline", "environ"):
                text = Path(f"/proc/{process.pid}/{file}").read_text(errors="replace")
                seen += bool(text)
                assert not [secret for secret in secrets if secret in text]
    assert seen == 2 * 2 * len(SERVICE_NAMES)


def test_no_secret_is_in_a_log_and_every_file_with_one_is_private(stack):
    secrets = [secret.encode() for secret in known_secrets(stack)]
    for log in (stack.state_dir / "logs").iterdir():
        assert not [secret for secret in secrets if secret in log.read_bytes()]
    assert stack.state_dir.stat().st_mode & 0o777 == 0o700
    holders = {
        path
        for path in stack.state_dir.rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    }
    assert {path.name for path in holders} >= {
        "embedded.json",
        "services.yaml",
        "server.properties",
        "s3.json",
        "valkey.conf",
    }
    assert {oct(path.stat().st_mode & 0o777) for path in holders} == {"0o600"}
    assert not (stack.state_dir / "kafka" / "format.args").exists()


def test_every_service_refuses_wrong_credentials(settings):
    with pytest.raises(redis.AuthenticationError):
        valkey(settings, password="wrong").ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(settings.redis.host, settings.redis.port).ping()
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        s3(settings, secret_key="wrong").list_buckets()
    with pytest.raises(KafkaError):
        KafkaAdminClient(**kafka_auth(settings, sasl_plain_password="wrong"))


def test_everything_listens_on_loopback_only(stack):
    pids = {read_record(stack.state_dir, name).service.pid for name in SERVICE_NAMES}
    inodes = {
        os.readlink(link)[8:-1]
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if os.path.islink(link) and os.readlink(link).startswith("socket:")
    }
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert len(listening) >= 8
    assert set(listening) <= loopback


def test_no_proxy_is_asked_for_what_runs_here(stack, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert all(one.healthy for one in stack.status())


# -- one service at a time ------------------------------------------------------------------------


def test_kill_and_start_keeps_port_password_and_data(stack, settings):
    own = settings.kafka.group
    admin = KafkaAdminClient(**kafka_auth(settings))
    admin.create_topics([NewTopic(settings.kafka.topic, 1, 1)])
    admin.close()
    producer = KafkaProducer(**kafka_auth(settings), acks="all")
    producer.send(settings.kafka.topic, b"frame").get(30)
    producer.close()
    bucket = settings.s3.data_bucket
    s3(settings).make_bucket(bucket)
    s3(settings).put_object(bucket, "key", io.BytesIO(b"object"), 6)
    valkey(settings).set(own, "value")

    for name in SERVICE_NAMES:
        before = stack.pid(name)
        stack.kill(name)
        assert stack.pid(name) is None
        stack.start_service(name)
        assert stack.pid(name) not in (None, before)

    assert load_settings().redacted() == settings.redacted()
    assert valkey(settings).get(own) == b"value"
    assert s3(settings).get_object(bucket, "key").read() == b"object"
    consumer = KafkaConsumer(
        settings.kafka.topic, **kafka_auth(settings), auto_offset_reset="earliest"
    )
    found = [record.value for batch in consumer.poll(30_000).values() for record in batch]
    consumer.close()
    assert found == [b"frame"]


def test_a_paused_service_shows_as_paused_and_comes_back(stack):
    stack.pause("redis")
    try:
        shown = {one.name: (one.healthy, one.detail) for one in stack.status()}
        assert shown["redis"] == (False, "paused")
        assert shown["s3"] == (True, "running")
    finally:
        stack.resume("redis")
    assert all(one.healthy for one in stack.status())


def test_start_again_changes_nothing(stack):
    before = [stack.pid(name) for name in SERVICE_NAMES]
    stack.start()
    assert [stack.pid(name) for name in SERVICE_NAMES] == before


def test_what_is_due_in_s3_is_deleted(own_state, monkeypatch):
    """Its server keeps lifecycle rules; what runs beside it carries them out, and ends with it."""
    monkeypatch.setattr(seaweedfs, "EXPIRE_EVERY_S", 1)
    past = Expiration(date=datetime(2026, 1, 1, tzinfo=UTC))
    rule = Rule(ENABLED, rule_filter=Filter(prefix=""), expiration=past)
    with Stack(own_state, services=["s3"]) as stack:
        client = s3(load_settings())
        client.make_bucket("evidence")
        client.put_object("evidence", "key", io.BytesIO(b"object"), 6)
        client.set_bucket_lifecycle("evidence", LifecycleConfig([rule]))
        deadline = time.monotonic() + 60
        while list(client.list_objects("evidence")):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        group = stack.pid("s3")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            assert int(its_group) != group or state == "Z", path


# -- owners ---------------------------------------------------------------------------------------

OWNER = """
    import sys, time
    from infra.embedded import Stack
    with Stack({state!r}, services=["redis", "s3"]):
        print("up", flush=True)
        {then}
"""


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None],
    ids=["int", "term", "kill", "raise"],
)
def test_no_service_outlives_its_owner(how, own_state):
    then = "time.sleep(600)" if how else "raise RuntimeError('a crash')"
    parent = python(OWNER.format(state=str(own_state), then=then))
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    records = [Record.read(own_state / "run" / f"{name}.json") for name in ("redis", "s3")]
    if how:
        parent.send_signal(how)
    assert parent.wait(30) != 0
    for record in records:
        if record is not None:  # None: already ended with the crash
            assert record.service.wait(15)
            assert record.guard.wait(15)


@pytest.mark.parametrize("detached", [False, True], ids=["demo", "up"])
def test_ctrl_c_during_the_start_leaves_nothing(detached, own_state):
    parent = python(
        f"""
        from infra.embedded import Stack
        Stack({str(own_state)!r}, detached={detached}).start()
        print("up", flush=True)
        """
    )
    path = own_state / "run" / "redis.json"
    deadline = time.monotonic() + 60
    while (record := Record.read(path)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert record is not None
    parent.send_signal(signal.SIGINT)  # Kafka needs seconds more
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert out == ""
    assert [one.detail for one in Stack(own_state).status()] == ["stopped"] * 3
    assert not (own_state / "services.yaml").exists()


def test_a_folder_in_use_is_refused_and_what_a_killed_run_left_is_ended(own_state):
    parent = python(OWNER.format(state=str(own_state), then="time.sleep(600)"))
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    with pytest.raises(SettingsError, match=f"in use by process {parent.pid}.*DPDL_STATE_DIR"):
        Stack(own_state, services=["redis"]).start()
    left = read_record(own_state, "redis")
    # The guard cannot act while it is stopped: what the next run finds is a real orphan.
    left.guard.send(signal.SIGSTOP)
    parent.kill()
    parent.wait(10)
    assert left.service.alive()
    with Stack(own_state, services=["redis"]) as stack:
        assert not left.service.alive()
        assert stack.pid("redis") not in (None, left.service.pid)
    left.guard.send(signal.SIGKILL)


# -- up, status, down -----------------------------------------------------------------------------


def test_up_stays_is_used_and_goes_with_down(own_state, monkeypatch):
    monkeypatch.setenv("DPDL_KAFKA_BOOTSTRAP", "plant.example:9092")
    said = io.StringIO()
    console = Console(file=said, width=160)
    parent = python(
        "from cluster.stack import up; from infra.settings import *; up(load_settings())"
    )
    out, _ = parent.communicate(timeout=120)
    assert parent.returncode == 0
    assert "configured elsewhere" in out
    assert "plant.example:9092" in out

    settings = load_settings()
    assert settings.kafka.bootstrap == "plant.example:9092"
    assert settings.kafka.sasl_password is None
    assert not (own_state / "run" / "kafka.json").exists()
    assert valkey(settings).ping()

    before = read_record(own_state, "redis").service
    with cluster.stack.open_stack(settings) as used:  # as the demo does
        assert used.pid("redis") == before.pid
    assert before.alive()
    assert load_settings().redis.port == settings.redis.port

    found = cluster.stack.show_services(settings, console)
    assert found[0].detail.startswith("configured elsewhere: Kafka at plant.example:9092")
    assert [one.detail for one in found[1:]] == ["running", "running"]
    assert [one.healthy for one in found] == [False, True, True]
    cluster.stack.down(settings, console)
    assert not before.alive()
    assert "2 services stopped" in said.getvalue()
    assert load_settings().redis.host == ""
    cluster.stack.down(settings, console)
    assert "no service was running" in said.getvalue()


# -- things that go wrong -------------------------------------------------------------------------


def test_a_remembered_port_that_is_taken_is_replaced_and_told_to_clients(own_state):
    with Stack(own_state, services=["redis"]):
        settings = load_settings()
        valkey(settings).set("kept", "yes")
        old = settings.redis.port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", old))
        other.listen()
        with Stack(own_state, services=["redis"]):
            settings = load_settings()
            assert settings.redis.port != old
            assert valkey(settings).get("kept") == b"yes"


def test_a_service_that_cannot_start_is_one_line_with_its_own_words(own_state):
    with Stack(own_state, services=["redis"]):
        pass
    data = own_state / "redis" / "data" / "appendonlydir"
    next(data.glob("*.manifest")).write_text("no manifest\n")
    with pytest.raises(ServiceUnavailable) as caught:
        Stack(own_state, services=["redis"]).start()
    line = str(caught.value)
    assert line.startswith('Valkey ended while it started: "')
    assert "manifest" in line.lower()
    assert "\n" not in line
    assert Stack(own_state).pid("redis") is None


def test_a_failed_start_leaves_nothing_of_the_others(own_state, monkeypatch):
    """SeaweedFS is up by the time that Valkey gives up; both must be gone."""
    blocker = ports.choose(set())
    monkeypatch.setattr(ports, "is_free", lambda port: True)  # the race: taken after the check
    with socket.socket() as other:
        other.bind(("127.0.0.1", blocker))
        other.listen()
        stack = Stack(own_state, services=["redis", "s3"], ports={"redis": blocker}, deadline_s=30)
        with pytest.raises(ServiceUnavailable, match=r"Valkey .* a port is taken"):
            stack.start()
    assert [one.detail for one in stack.status()] == ["stopped"] * 3
    assert not (own_state / "services.yaml").exists()


def test_a_jar_with_another_hash_is_refused(tmp_path):
    jar = next(jar for jar in jvm.read_jars() if jar.artifact == "slf4j-api")
    changed = jvm.Jar(jar.group, jar.artifact, jar.version, "0" * 64)
    with pytest.raises(DataError, match=f"sha256 {jar.sha256}, wanted 0000"):
        jvm.class_path(tmp_path, lambda _: None, [changed])
    assert not list((tmp_path / "jars").glob("*.jar"))


def test_the_first_start_of_all_serves_and_its_stop_leaves_nothing(tmp_path):
    """Fresh folder, fetched jars: formatting, keys and three services; and a stop in order."""
    began = time.monotonic()
    with Stack(tmp_path / "state") as stack:
        took = time.monotonic() - began
        found = stack.status()
        groups = yaml.safe_load((tmp_path / "state" / "services.yaml").read_text())
        pids = [one.pid for one in found]
    assert [one.healthy for one in found] == [True] * 3
    assert set(groups) == set(SERVICE_NAMES)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]
    print(
        f"\nfirst start {took:.1f} s; "
        + ", ".join(f"{one.name} {one.memory_bytes / 1e6:.0f} MB" for one in found)
    )
