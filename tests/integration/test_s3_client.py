"""S3 clients on a real server: conditions, buckets, credentials, deadlines."""

from __future__ import annotations

import threading
import time
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from pydantic import SecretStr

from infra.errors import AuthFailed, NotFound, PointerConflict, ServiceUnavailable, SettingsError
from infra.s3_client import (
    conditional_put,
    ensure_buckets,
    expire_evidence,
    get,
    make_filesystem,
    make_minio,
    s3_errors,
)
from infra.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.storage]


def changed(settings: Settings, **fields: Any) -> Settings:
    return settings.model_copy(update={"s3": settings.s3.model_copy(update=fields)})


def test_buckets_are_made_once_and_evidence_expires(settings: Settings) -> None:
    ensure_buckets(settings)
    ensure_buckets(settings)
    client, s3 = make_minio(settings), settings.s3
    for bucket in (s3.data_bucket, s3.models_bucket, s3.evidence_bucket):
        assert client.bucket_exists(bucket)
        assert client.get_bucket_lifecycle(bucket) is None


def test_evidence_expires_by_the_streams_settings_and_others_rules_stay(settings: Settings) -> None:
    ensure_buckets(settings)
    client, bucket = make_minio(settings), settings.s3.evidence_bucket
    own = Rule(
        ENABLED, rule_filter=Filter(prefix="old/"), rule_id="own", expiration=Expiration(days=3)
    )
    client.set_bucket_lifecycle(bucket, LifecycleConfig([own]))

    def days() -> dict[str | None, int | None]:
        found = client.get_bucket_lifecycle(bucket)
        assert found is not None
        return {rule.rule_id: rule.expiration and rule.expiration.days for rule in found.rules}

    expire_evidence(settings)
    assert days() == {"own": 3, "evidence": 30}
    stream = settings.stream.model_copy(update={"evidence_days": 365})
    expire_evidence(settings.model_copy(update={"stream": stream}))
    ensure_buckets(settings)  # as an import or a training does, with what its own settings say
    assert days() == {"own": 3, "evidence": 365}


def test_two_processes_may_make_the_buckets(settings: Settings) -> None:
    errors: list[Exception] = []

    def make() -> None:
        try:
            ensure_buckets(settings)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_a_conditional_put_holds_its_condition(settings: Settings) -> None:
    ensure_buckets(settings)
    client, bucket = make_minio(settings), settings.s3.models_bucket
    first = conditional_put(client, bucket, "key", b"1")
    for condition in (None, "0" * 32):
        with pytest.raises(PointerConflict, match="look at it again"):
            conditional_put(client, bucket, "key", b"2", if_match=condition)
    assert get(client, bucket, "key") == (b"1", first)
    second = conditional_put(client, bucket, "key", b"2", if_match=first)
    assert get(client, bucket, "key") == (b"2", second)
    with pytest.raises(PointerConflict):
        conditional_put(client, bucket, "key", b"3", if_match=first)
    with pytest.raises(PointerConflict):
        conditional_put(client, bucket, "no such key", b"3", if_match=first)
    with s3_errors(settings.s3), pytest.raises(Exception, match="NoSuchKey"):
        get(client, bucket, "no such key")


def test_a_large_object_that_is_there_is_a_conflict_too(settings: Settings) -> None:
    """MinIO refuses it before it has read the body: the client sees a broken connection."""
    ensure_buckets(settings)
    client, bucket = make_minio(settings), settings.s3.models_bucket
    conditional_put(client, bucket, "key", b"1")
    for _ in range(3):
        with s3_errors(settings.s3), pytest.raises(PointerConflict):
            conditional_put(client, bucket, "key", bytes(40 << 20))
    assert get(client, bucket, "key")[0] == b"1"


def test_parquet_goes_through_pyarrow(settings: Settings) -> None:
    ensure_buckets(settings)
    filesystem, bucket = make_filesystem(settings), settings.s3.data_bucket
    table = pa.table({"image": [b"a", b"b"], "label": [0, 1]})
    pq.write_table(table, f"{bucket}/set/train/part-0.parquet", filesystem=filesystem)
    assert pq.read_table(f"{bucket}/set/train", filesystem=filesystem).equals(table)
    with pytest.raises(NotFound, match=r"nowhere\.parquet"), s3_errors(settings.s3):
        filesystem.open_input_file(f"{bucket}/nowhere.parquet")


@pytest.mark.parametrize(
    "fields", [{"secret_key": SecretStr("wrong-secret")}, {"access_key": "nobody"}]
)
def test_wrong_keys_are_one_line(settings: Settings, fields: dict[str, Any]) -> None:
    ensure_buckets(settings)
    wrong = changed(settings, **fields)
    with pytest.raises(AuthFailed, match=r"s3\.access_key") as by_minio:
        ensure_buckets(wrong)
    everything = pyarrow.fs.FileSelector(settings.s3.data_bucket)
    with pytest.raises(AuthFailed, match=r"s3\.access_key") as by_arrow, s3_errors(wrong.s3):
        make_filesystem(wrong).get_file_info(everything)
    for raised in (by_minio, by_arrow):
        assert "\n" not in str(raised.value)
        assert "wrong-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "fields", [{"endpoint": "127.0.0.1:1"}, {"endpoint": "nowhere.invalid:9"}, {"secure": True}]
)
def test_no_s3_there_is_an_error_in_time(settings: Settings, fields: dict[str, Any]) -> None:
    elsewhere = changed(settings, **fields)
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="dpdl status") as by_minio:
        ensure_buckets(elsewhere)
    with pytest.raises(ServiceUnavailable) as by_arrow, s3_errors(elsewhere.s3):
        make_filesystem(elsewhere).get_file_info("bucket/key")
    assert time.monotonic() - started < 20
    assert "\n" not in str(by_minio.value) + str(by_arrow.value)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"endpoint": ""}, "DPDL_S3_ENDPOINT"),
        ({"secret_key": None}, r"s3\.secret_key"),
        ({"tls_ca": "/nowhere/ca.pem"}, "no such file"),
    ],
)
def test_what_is_missing_is_named(settings: Settings, fields: dict[str, Any], found: str) -> None:
    values = {**settings.s3.model_dump(), **fields}
    incomplete = settings.model_copy(update={"s3": type(settings.s3)(**values)})
    for make in (make_minio, make_filesystem):
        with pytest.raises(SettingsError, match=found):
            make(incomplete)
