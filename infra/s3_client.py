"""S3 by two clients, one set of settings: minio for objects, pyarrow for Parquet.

Plain S3 only (SeaweedFS, MinIO, AWS, Ceph): path-style addresses, signature v4, conditional PUT.
Waits are bounded: 10 s to connect, 30 s for an answer, one more try where the server is ill.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from infra.errors import (
    AuthFailed,
    DataError,
    DpdlError,
    NotFound,
    PointerConflict,
    ServiceUnavailable,
    SettingsError,
)
from infra.settings import S3Settings, Settings

CONNECT_TIMEOUT_S = 10.0
"""urllib3 also sends a request's body under it: two seconds cut 30 MB uploads on a busy machine."""
READ_TIMEOUT_S = 30.0
EVIDENCE_RULE = "evidence"

_AUTH_CODES = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccountProblem"}
# pyarrow raises OSError with AWS's own words.
_AUTH_WORDS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
_MISSING_CODES = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "ResourceNotFound"}
_CONFLICT_CODES = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted"}


def make_minio(
    settings: Settings, *, read_timeout_s: float = READ_TIMEOUT_S, tries: int = 2
) -> Minio:
    """A client for objects; connects on first use. Thread-safe. Errors: SettingsError."""
    s3 = _known(settings)
    tls: dict[str, Any] = {}
    if s3.secure:
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": str(s3.tls_ca) if s3.tls_ca else None}
    # Status codes are retried too, but only where that cannot act twice: a conditional PUT that
    # was answered with 500 may be in, so its caller looks instead (conditional_put).
    retry = urllib3.Retry(
        total=tries - 1,
        backoff_factor=0.2,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=("GET", "HEAD"),
    )
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(
            connect=min(CONNECT_TIMEOUT_S, read_timeout_s), read=read_timeout_s
        ),
        maxsize=16,
        retries=retry,
        **tls,
    )
    return _Minio(
        s3.endpoint,
        access_key=s3.access_key,
        secret_key=_secret(s3),
        secure=s3.secure,
        region=s3.region,
        http_client=pool,
    )


class _Minio(Minio):
    def __del__(self) -> None:
        # At the interpreter's end minio clears a pool whose modules are half gone, and complains.
        with suppress(ImportError):
            super().__del__()  # type: ignore[no-untyped-call]


def make_filesystem(settings: Settings) -> S3FileSystem:
    """A file system for pyarrow and Ray; paths begin with the bucket. Errors: SettingsError."""
    s3 = _known(settings)
    return S3FileSystem(
        access_key=s3.access_key,
        secret_key=_secret(s3),
        region=s3.region,
        scheme="https" if s3.secure else "http",
        endpoint_override=s3.endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        tls_ca_file_path=str(s3.tls_ca) if s3.secure and s3.tls_ca else None,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _known(settings: Settings) -> S3Settings:
    s3 = settings.s3
    if not s3.endpoint:
        raise settings.unknown("S3", "DPDL_S3_ENDPOINT=HOST:PORT")
    if not s3.access_key or s3.secret_key is None:
        raise SettingsError(f"S3 at {s3.endpoint} needs s3.access_key and s3.secret_key")
    if s3.tls_ca and not s3.tls_ca.is_file():
        raise SettingsError(f"s3.tls_ca={s3.tls_ca}: no such file")
    return s3


def _secret(s3: S3Settings) -> str:
    assert s3.secret_key is not None  # _known
    return s3.secret_key.get_secret_value()


def ensure_buckets(settings: Settings) -> None:
    """Create the three buckets where missing. Errors: AuthFailed, ServiceUnavailable,
    SettingsError."""
    client, s3 = make_minio(settings), settings.s3
    with s3_errors(s3):
        for bucket in (s3.data_bucket, s3.models_bucket, s3.evidence_bucket):
            if not client.bucket_exists(bucket):
                _make_bucket(client, bucket)


def expire_evidence(settings: Settings) -> None:
    """Let evidence, old and new, expire after stream.evidence_days. Errors: as ensure_buckets.

    For the stream alone to call: what some laptop's settings say must not delete a plant's alerts.
    Rules that others have set on the bucket stay.
    """
    client, bucket = make_minio(settings), settings.s3.evidence_bucket
    rule = Rule(
        ENABLED,
        rule_filter=Filter(prefix=""),
        rule_id=EVIDENCE_RULE,
        expiration=Expiration(days=settings.stream.evidence_days),
    )
    with s3_errors(settings.s3):
        found = client.get_bucket_lifecycle(bucket)
        others = [each for each in found.rules if each.rule_id != EVIDENCE_RULE] if found else []
        client.set_bucket_lifecycle(bucket, LifecycleConfig([*others, rule]))


def _make_bucket(client: Minio, bucket: str) -> None:
    try:
        client.make_bucket(bucket)
    except S3Error as error:  # someone else was quicker
        if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise


def conditional_put(
    client: Minio,
    bucket: str,
    key: str,
    data: bytes,
    *,
    if_match: str | None = None,
) -> str:
    """Write an object only if nobody has written it meanwhile; returns the new ETag.

    if_match: the ETag that must be there now; None: there must be no object yet. The only place
    where this is done: minio 7 has no public call for it.
    Errors: PointerConflict when the condition does not hold, or, with None, when the connection
    broke and there is an object: perhaps the caller's own. After any other error (wrap the
    call in s3_errors) the object may or may not be written: read it before trying again.
    """
    condition: dict[str, str | list[str] | tuple[str]]
    condition = {"If-None-Match": "*"} if if_match is None else {"If-Match": f'"{if_match}"'}
    try:
        written = client._put_object(bucket, key, data, headers=condition)
    except S3Error as error:
        if error.code in _CONFLICT_CODES or (if_match and error.code in _MISSING_CODES):
            raise PointerConflict(
                f"{bucket}/{key} has changed since it was read: look at it again"
            ) from error
        raise
    except urllib3.exceptions.HTTPError as error:
        # MinIO refuses before it has read the body, and a large one then breaks off in the middle.
        if if_match is None and _exists(client, bucket, key):
            raise PointerConflict(f"{bucket}/{key} is there already: look at it") from error
        raise
    return str(written.etag)


def _exists(client: Minio, bucket: str, key: str) -> bool:
    try:
        client.stat_object(bucket, key)
        return True
    except S3Error as error:
        if error.code in _MISSING_CODES:
            return False
        raise


def get(client: Minio, bucket: str, key: str) -> tuple[bytes, str]:
    """An object's bytes and ETag. Raises minio's S3Error; wrap in s3_errors (NotFound)."""
    response = client.get_object(bucket, key)
    try:
        return response.read(), response.headers.get("etag", "").strip('"')
    finally:
        response.close()
        response.release_conn()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def s3_errors(s3: S3Settings) -> Iterator[None]:
    """Turn errors of minio, urllib3 and pyarrow into ours, for any call on a client."""
    try:
        yield
    except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _translated(error, s3) from error


def _translated(error: Exception, s3: S3Settings) -> DpdlError:
    where = f"S3 at {s3.endpoint}"
    text, code = _told(error)
    if code in _AUTH_CODES or any(word in text for word in _AUTH_WORDS):
        return AuthFailed(
            f"{where} refused access key {s3.access_key} ({text}): check s3.access_key, "
            "s3.secret_key and what the key may do"
        )
    if code in _MISSING_CODES or isinstance(error, FileNotFoundError):
        return NotFound(f"{where} does not have it ({text})")
    unavailable = (urllib3.exceptions.HTTPError, ServerError, InvalidResponseError, OSError)
    if _is_busy(error) or isinstance(error, unavailable):
        return ServiceUnavailable(
            f"{where} is not available ({text}): check that it runs (`dpdl status`), s3.endpoint "
            "and s3.secure"
        )
    return DataError(f"{where} refused a request ({text})")


def _is_busy(error: Exception) -> bool:
    """Full and not yet ready too: every server has codes of its own for them, by few statuses."""
    if not isinstance(error, S3Error):
        return False
    status = error.response.status
    return status == 429 or (status >= 500 and status != 501) or error.code == "RequestTimeout"


def _told(error: Exception) -> tuple[str, str]:
    """What an error says, in one line, and S3's code for it where there is one."""
    if isinstance(error, S3Error):
        return f"{error.code}: {error.message} {error.resource or ''}".strip(), str(error.code)
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    text = " ".join(str(error).split())
    # urllib3 begins with the repr of a connection, pyarrow ends with a request's id.
    return text.rsplit("object at", 1)[-1].split(">: ")[-1].split(" (Request ID")[0], ""
