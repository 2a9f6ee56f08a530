"""Real servers for the integration tests: one stack for the whole session, own names per test."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml
from minio import Minio

from infra.embedded import Stack
from infra.redis_client import ResultStore
from infra.settings import Settings, load_settings

sys.path.insert(0, str(Path(__file__).parent))
from minio_server import MinioServer

MakeSettings = Callable[[Path, pytest.MonkeyPatch], AbstractContextManager[Settings]]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Kafka, SeaweedFS and Valkey, up. stack.kill(NAME), pause, resume, start_service(NAME).

    With DPDL_TEST_S3=minio a real MinIO alone, for the tests marked `storage`: `make test-minio`.
    """
    state_dir = tmp_path_factory.mktemp("stack") / "state"
    if os.environ.get("DPDL_TEST_S3") == "minio":
        chosen = Stack(state_dir, services=["s3"], instead=[MinioServer()])
    else:
        chosen = Stack(state_dir)
    with chosen as running:
        yield running


@pytest.fixture
def settings(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings whose topics, group, buckets and Redis prefix no other test uses."""
    with make_settings(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def store(settings: Settings) -> Iterator[ResultStore]:
    found = ResultStore(settings)
    yield found
    found.close()


@pytest.fixture(scope="session")
def make_settings(stack: Stack) -> MakeSettings:
    """(folder, monkeypatch) -> a context with such settings, for fixtures of other scopes."""
    return lambda folder, monkeypatch: _own_settings(stack, folder, monkeypatch)


@contextmanager
def _own_settings(
    stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """They come from a file named by DPDL_CONFIG, so processes that the test starts read the same
    (settings.worker_env() names both files). Topics and buckets do not exist yet.
    """
    own = f"t{uuid.uuid4().hex[:10]}"
    config = {
        "kafka": {"topic": f"{own}.frames", "dead_topic": f"{own}.frames.dead", "group": own},
        "redis": {"prefix": own},
        "s3": {f"{kind}_bucket": f"{own}-{kind}" for kind in ("data", "models", "evidence")},
    }
    path = folder / "dpdl.yaml"
    path.write_text(yaml.safe_dump(config))
    for name in [name for name in os.environ if name.startswith("DPDL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DPDL_CONFIG", str(path))
    monkeypatch.setenv("DPDL_STATE_DIR", str(stack.state_dir))
    found = load_settings()
    yield found
    _remove_buckets(found, own)


def _remove_buckets(settings: Settings, prefix: str) -> None:
    """A bucket takes whole volumes of the small S3: give them back."""
    secret = settings.s3.secret_key
    assert secret is not None
    client = Minio(
        settings.s3.endpoint,
        access_key=settings.s3.access_key,
        secret_key=secret.get_secret_value(),
        secure=False,
    )
    for bucket in client.list_buckets():
        if bucket.name.startswith(prefix):
            for item in client.list_objects(bucket.name, recursive=True):
                client.remove_object(bucket.name, item.object_name)
            client.remove_bucket(bucket.name)
