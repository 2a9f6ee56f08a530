"""Versions and their pointer on a real S3: complete or invisible, verified, moved by one."""

from __future__ import annotations

import io
import json
import threading
from datetime import timedelta
from typing import Any

import pytest
from minio import Minio

from infra.embedded import Stack
from infra.errors import (
    DataError,
    NotFound,
    PointerConflict,
    ServiceUnavailable,
    VersionBroken,
    VersionExists,
)
from infra.model_store import FORMAT, ModelStore, Pointer, new_version_id
from infra.s3_client import conditional_put, ensure_buckets, get, make_minio, sha256
from infra.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.storage]
FILES = {"weights.safetensors": bytes(range(256)) * 4096, "config.json": b'{"image_size": 224}'}


@pytest.fixture
def store(settings: Settings) -> ModelStore:
    ensure_buckets(settings)
    return ModelStore(settings)


@pytest.fixture
def client(settings: Settings) -> Minio:
    return make_minio(settings)


def promote(store: ModelStore, version: str, expected: Pointer | None) -> Pointer:
    return store.move_pointer("m", version, expected, by="anna", why="better")


def test_a_version_comes_back_as_it_was_stored(store: ModelStore) -> None:
    store.put_version("m", "v-1", FILES, {"parent": None, "data": {"train": "etag"}})
    assert store.fetch("m", "v-1") == FILES
    manifest = store.manifest("m", "v-1")
    assert (manifest["model"], manifest["version"], manifest["format"]) == ("m", "v-1", FORMAT)
    assert manifest["data"] == {"train": "etag"}
    assert manifest["files"]["config.json"]["sha256"] == sha256(FILES["config.json"])
    assert store.list_versions("m") == ["v-1"]
    assert store.list_versions("other") == []


def test_ids_sort_by_time_and_differ(store: ModelStore) -> None:
    ids = [new_version_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert [each[:22] for each in ids] == sorted(each[:22] for each in ids)
    store.put_version("m", ids[0], FILES, {})


def test_storing_the_same_again_is_harmless_and_other_files_are_refused(
    store: ModelStore,
) -> None:
    store.put_version("m", "v-1", FILES, {"kind": "first"})
    store.put_version("m", "v-1", FILES, {"kind": "second"})
    assert store.manifest("m", "v-1")["kind"] == "first"
    with pytest.raises(VersionExists, match="never change"):
        store.put_version("m", "v-1", {**FILES, "config.json": b"{}"}, {})
    assert store.fetch("m", "v-1") == FILES


def test_a_half_written_version_is_invisible_and_can_be_finished(
    store: ModelStore, client: Minio, settings: Settings
) -> None:
    bucket = settings.s3.models_bucket
    left = {"weights.safetensors": b"cut off", "config.json": FILES["config.json"]}
    for file, data in left.items():
        conditional_put(client, bucket, f"m/versions/v-1/{file}", data)
    assert store.list_versions("m") == []
    for ask in (store.manifest, store.fetch):
        with pytest.raises(NotFound, match="no version 'v-1'"):
            ask("m", "v-1")
    with pytest.raises(NotFound):
        promote(store, "v-1", None)
    store.put_version("m", "v-1", FILES, {})
    assert store.fetch("m", "v-1") == FILES


def test_what_killed_writers_left_is_removed_once_it_is_old(
    store: ModelStore, client: Minio, settings: Settings
) -> None:
    store.put_version("m", "v-1", FILES, {})
    conditional_put(client, settings.s3.models_bucket, "m/versions/v-2/config.json", b"{}")
    assert store.remove_half_written("m", older_than=timedelta(hours=1)) == []
    assert store.remove_half_written("m", older_than=timedelta(seconds=-5)) == ["v-2"]
    assert store.remove_half_written("m", older_than=timedelta(seconds=-5)) == []
    assert store.fetch("m", "v-1") == FILES


@pytest.mark.parametrize("altered", [b"", b"x", FILES["config.json"].replace(b"4", b"5")])
def test_an_altered_file_is_refused(
    store: ModelStore, client: Minio, settings: Settings, altered: bytes
) -> None:
    store.put_version("m", "v-1", FILES, {})
    client._put_object(settings.s3.models_bucket, "m/versions/v-1/config.json", altered)
    with pytest.raises(VersionBroken, match=r"config.json has sha256 .* it was altered"):
        store.fetch("m", "v-1")


def test_a_missing_file_is_refused(store: ModelStore, client: Minio, settings: Settings) -> None:
    store.put_version("m", "v-1", FILES, {})
    client.remove_object(settings.s3.models_bucket, "m/versions/v-1/config.json")
    with pytest.raises(VersionBroken, match=r"config.json is missing"):
        store.fetch("m", "v-1")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": FORMAT + 1}, "known up to"),
        ({"format": None}, "format"),
        ({"version": "v-0"}, "copied"),
        ("not json", "no JSON"),
        ([1], "no JSON object"),
        ({"files": {"config.json": {"sha256": "x"}}}, "files"),
        ({"files": ["config.json"]}, "files"),
        ({"files": {"a": {"object": "../v-0/a", "bytes": 1, "sha256": "x"}}}, "object"),
    ],
)
def test_a_foreign_manifest_is_refused(
    store: ModelStore, client: Minio, settings: Settings, change: Any, found: str
) -> None:
    store.put_version("m", "v-1", FILES, {})
    content = {**store.manifest("m", "v-1"), **change} if isinstance(change, dict) else change
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    client._put_object(settings.s3.models_bucket, "m/versions/v-1/manifest.json", data)
    with pytest.raises(VersionBroken, match=found):
        store.fetch("m", "v-1")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "a b"])
def test_names_are_plain(store: ModelStore, name: str) -> None:
    with pytest.raises(DataError, match="name"):
        store.put_version(name, "v-1", FILES, {})
    with pytest.raises(DataError, match="name"):
        store.put_version("m", "v-1", {name: b"x"}, {})


def test_the_pointer_moves_and_remembers(store: ModelStore) -> None:
    for version in ("v-1", "v-2"):
        store.put_version("m", version, FILES, {})
    assert store.current("m") is None
    first = promote(store, "v-1", None)
    assert (first.version, first.previous, first.by, first.why) == ("v-1", None, "anna", "better")
    assert store.current("m") == first
    second = promote(store, "v-2", first)
    back = store.move_pointer("m", str(second.previous), second, by="ben", why="rollback")
    assert store.current("m") == back
    assert [(move.version, move.by) for move in back.moves] == [
        ("v-1", "anna"),
        ("v-2", "anna"),
        ("v-1", "ben"),
    ]
    assert back.previous == "v-2"
    assert [move.at for move in back.moves] == sorted(move.at for move in back.moves)


def test_a_pointer_seen_too_early_moves_nothing(store: ModelStore) -> None:
    for version in ("v-1", "v-2", "v-3"):
        store.put_version("m", version, FILES, {})
    first = promote(store, "v-1", None)
    second = promote(store, "v-2", first)
    for stale in (first, None):
        with pytest.raises(PointerConflict, match=r"is v-2 now: look again"):
            promote(store, "v-3", stale)
    assert store.current("m") == second


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_racers_exactly_one_wins(settings: Settings, store: ModelStore, begun: bool) -> None:
    racers = 8
    for n in range(racers):
        store.put_version("m", f"v-{n}", {"config.json": b"%d" % n}, {})
    seen = promote(store, "v-0", None) if begun else None
    barrier = threading.Barrier(racers)
    won: list[Pointer] = []
    lost: list[str] = []

    def race(version: str) -> None:
        mine = ModelStore(settings)
        mine.current("m")  # connected before the start
        barrier.wait(30)
        try:
            won.append(promote(mine, version, seen))
        except PointerConflict as error:
            lost.append(str(error))

    threads = [threading.Thread(target=race, args=(f"v-{n}",)) for n in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(lost)) == (1, racers - 1)
    assert store.current("m") == won[0]
    assert len(won[0].moves) == (2 if begun else 1)


def test_of_two_writers_of_one_version_the_whole_of_one_is_there(
    settings: Settings, store: ModelStore
) -> None:
    """Same id, other bytes: no mixture, whoever comes first where."""
    barrier = threading.Barrier(4)
    refused: list[int] = []

    def write(n: int) -> None:
        files = {f"part-{k}": bytes([n]) * 50_000 for k in range(6)}
        mine = ModelStore(settings)
        mine.current("m")
        barrier.wait(30)
        try:
            mine.put_version("m", "v-1", files, {"writer": n})
        except VersionExists:
            refused.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winner = store.manifest("m", "v-1")["writer"]
    assert sorted([*refused, winner]) == [0, 1, 2, 3]
    assert set(store.fetch("m", "v-1").values()) == {bytes([winner]) * 50_000}


def test_a_move_whose_answer_was_lost_is_known_as_ones_own(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request arrives twice, as when a proxy repeats it; the second finds the first."""
    store.put_version("m", "v-1", FILES, {})
    send = conditional_put

    def twice(*args: Any, **options: Any) -> str:
        send(*args, **options)
        return send(*args, **options)

    monkeypatch.setattr("infra.model_store.conditional_put", twice)
    pointer = promote(store, "v-1", None)
    assert store.current("m") == pointer
    assert len(pointer.moves) == 1


def test_a_newer_versions_pointer_is_read_unless_its_format_is_newer(
    store: ModelStore, client: Minio, settings: Settings
) -> None:
    store.put_version("m", "v1", {"a": b"x"}, {})
    pointer = store.move_pointer("m", "v1", None, by="ann", why="")
    bucket, key = settings.s3.models_bucket, "m/current.json"
    content = json.loads(get(client, bucket, key)[0])
    content["moves"][0]["ticket"] = "QA-17"
    data = json.dumps(content).encode()
    client.put_object(bucket, key, io.BytesIO(data), len(data))
    found = store.current("m")
    assert found is not None
    assert found.moves == pointer.moves
    data = json.dumps(content | {"format": 2}).encode()
    client.put_object(bucket, key, io.BytesIO(data), len(data))
    with pytest.raises(VersionBroken, match="format 2, known up to 1: update dpdl"):
        store.current("m")


@pytest.mark.parametrize("data", [b"{}", b"no", b'{"moves": []}', b'{"moves": [{"version": 1}]}'])
def test_an_unreadable_pointer_is_told(
    store: ModelStore, client: Minio, settings: Settings, data: bytes
) -> None:
    conditional_put(client, settings.s3.models_bucket, "m/current.json", data)
    with pytest.raises(VersionBroken, match=r"m/current.json"):
        store.current("m")


def test_versions_survive_sigkill(store: ModelStore, stack: Stack, settings: Settings) -> None:
    store.put_version("m", "v-1", FILES, {})
    pointer = promote(store, "v-1", None)
    stack.kill("s3")
    try:
        with pytest.raises(ServiceUnavailable):
            store.current("m")
    finally:
        stack.start_service("s3")
    assert store.fetch("m", "v-1") == FILES
    assert store.current("m") == pointer
    assert get(make_minio(settings), settings.s3.models_bucket, "m/current.json")[1] == pointer.etag
