"""What `dpdl models prune` deletes, on a real S3: versions of a few bytes."""

import io
from datetime import timedelta

import pytest

from infra import decisions
from infra.model_store import ModelStore
from infra.s3_client import ensure_buckets, make_minio
from pipelines import registry
from pipelines.registry import Registry
from pipelines.run_record import list_runs

pytestmark = [pytest.mark.integration, pytest.mark.storage]


@pytest.fixture
def store(settings):
    ensure_buckets(settings)
    return ModelStore(settings)


def put(settings, store, version, decision=None):
    store.put_version("lines", version, {"a": version.encode()}, {"data": {}})
    if decision:
        found = decisions.Decision(version, None, decision, "", {}, {})
        decisions.record(settings, "lines", found)


def test_only_what_nothing_leads_to_is_deleted(settings, store, monkeypatch):
    """v-1 > v-2 > v-3 > v-4, and back to v-3: v-4 is led to by nothing; three were held."""
    pointer = None
    for version in ("v-1", "v-2", "v-3", "v-4"):
        put(settings, store, version, "promoted")
        pointer = store.move_pointer("lines", version, pointer, by="test", why="")
    store.move_pointer("lines", "v-3", pointer, by="test", why="back")
    for version in ("held-1", "held-2", "held-3"):
        put(settings, store, version, "held")
    put(settings, store, "train-9")  # the gate may be at it now
    client, bucket = make_minio(settings), settings.s3.models_bucket
    for key in (
        "lines/versions/half/config.json",
        "lines/runs/v-1/run.json",
        "lines/runs/v-1/checkpoint_1/weights",
        "lines/runs/train-9/run.json",
        "lines/runs/train-9/checkpoint_1/weights",
    ):
        client.put_object(bucket, key, io.BytesIO(b"x"), 1)

    assert Registry(settings, "lines").prune(keep=2) == ("held-1", "v-4", "runs/v-1")
    left = ["held-2", "held-3", "train-9", "v-1", "v-2", "v-3"]
    assert store.list_versions("lines") == left
    assert list_runs(settings, "lines") == ["train-9"]
    assert store.fetch("lines", "v-1")

    monkeypatch.setattr(registry, "UNDECIDED_FOR", timedelta(seconds=-5))
    assert Registry(settings, "lines").prune(keep=0) == ("train-9", "held-3", "held-2", "half")
    assert store.list_versions("lines") == ["v-1", "v-2", "v-3"]
    assert Registry(settings, "lines").prune(keep=0) == ()
