"""What `dpdl models prune` deletes, on a real S3: versions of a few bytes."""

import io
from datetime import timedelta

import pytest
from minio import Minio

from infra import decisions, model_store
from infra.errors import NotFound
from infra.model_store import ModelStore
from infra.s3_client import conditional_put, ensure_buckets, make_minio
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
    store.move_pointer("lines", "v-3", pointer, by="test", why="", back=True)
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


def test_broken_versions_are_listed_and_pruned_with_the_others(settings, store, monkeypatch):
    """One of a newer format, one that is no JSON, one without what is not always there."""
    put(settings, store, "v-1", "promoted")
    store.move_pointer("lines", "v-1", None, by="test", why="the first")
    put(settings, store, "v-2", "held")
    client, bucket = make_minio(settings), settings.s3.models_bucket
    for version, manifest in (("newer", b'{"format": 999}'), ("torn", b"{")):
        key = f"lines/versions/{version}/manifest.json"
        client.put_object(bucket, key, io.BytesIO(manifest), len(manifest))
    listed = {one.version: one.why for one in Registry(settings, "lines").list()}
    assert set(listed) == {"newer", "torn", "v-1", "v-2"}
    assert listed["newer"].startswith("broken: ")
    assert "update dpdl" in listed["newer"]
    assert listed["torn"].startswith("broken: ")
    assert not listed["v-1"].startswith("broken")
    with pytest.raises(NotFound, match="'line' has no version; models there are: lines"):
        Registry(settings, "line").list()

    assert Registry(settings, "lines").prune(keep=0) == ("v-2",)  # the two are of today
    monkeypatch.setattr(registry, "UNDECIDED_FOR", timedelta(seconds=-5))
    assert set(Registry(settings, "lines").prune(keep=0)) == {"newer", "torn"}
    assert store.list_versions("lines") == ["v-1"]


def test_what_is_promoted_while_others_go_stays_and_so_does_its_way_back(
    settings, store, monkeypatch
):
    put(settings, store, "v-1", "promoted")
    pointer = store.move_pointer("lines", "v-1", None, by="test", why="")
    for version in ("held-1", "held-2", "held-3", "held-4"):
        put(settings, store, version, "held")
    remove, moves = ModelStore.remove_version, iter(("held-2", "held-1"))

    def remove_and_promote(self, name, version):
        nonlocal pointer
        gone = remove(self, name, version)
        for promoted in moves:
            pointer = store.move_pointer("lines", promoted, pointer, by="somebody", why="")
        return gone

    monkeypatch.setattr(ModelStore, "remove_version", remove_and_promote)
    assert Registry(settings, "lines").prune(keep=0) == ("held-4", "held-3")
    assert store.list_versions("lines") == ["held-1", "held-2", "v-1"]
    assert store.fetch("lines", "held-1")


def test_what_is_promoted_while_it_goes_stays(settings, store, monkeypatch):
    """After the look at the pointer, before the first of its objects is gone."""
    put(settings, store, "v-1", "promoted")
    pointer = store.move_pointer("lines", "v-1", None, by="test", why="")
    put(settings, store, "held-1", "held")
    put(settings, store, "held-2", "held")
    remove = Minio.remove_object

    def promote_and_remove(self, bucket, key):
        if "held-1/manifest" in key:
            store.move_pointer("lines", "held-1", pointer, by="somebody", why="")
        remove(self, bucket, key)

    with monkeypatch.context() as patch:
        patch.setattr(Minio, "remove_object", promote_and_remove)
        assert Registry(settings, "lines").prune(keep=0) == ("held-2",)
    assert store.current("lines").version == "held-1"
    assert store.fetch("lines", "held-1") == {"a": b"held-1"}


def test_what_goes_while_it_is_promoted_is_not_current(settings, store, monkeypatch):
    """After its manifest was read, before the pointer moves."""
    put(settings, store, "held-1", "held")
    put(settings, store, "v-1", "promoted")

    def prune_and_put(*args, **kwargs):
        patch.undo()
        assert store.remove_version("lines", "held-1")
        return conditional_put(*args, **kwargs)

    for before in (None, "v-1"):
        put(settings, store, "held-1", "held")
        expected = before and store.move_pointer("lines", before, None, by="test", why="")
        with monkeypatch.context() as patch:
            patch.setattr(model_store, "conditional_put", prune_and_put)
            with pytest.raises(NotFound):
                store.move_pointer("lines", "held-1", expected or None, by="somebody", why="")
        current = store.current("lines")
        assert (current.version if current else None) == before


def test_a_version_whose_removal_was_cut_off_does_not_exist(settings, store, monkeypatch):
    """Killed after the first of its objects."""
    store.put_version("lines", "held-1", {name: b"x" for name in ("a", "b", "z")}, {"data": {}})
    remove = Minio.remove_object

    def remove_and_die(self, *args):
        remove(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Minio, "remove_object", remove_and_die)
        with pytest.raises(KeyboardInterrupt):
            store.remove_version("lines", "held-1")
    assert store.list_versions("lines") == []
    assert store.remove_half_written("lines", older_than=timedelta(seconds=-5)) == ["held-1"]
