"""A connection to Redis: our deadlines, credentials and errors. Knows nothing of what is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis import exceptions as rex
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from infra.errors import (
    AuthFailed,
    DataError,
    DpdlError,
    ServiceUnavailable,
    SettingsError,
    StoreFull,
)
from infra.settings import RedisSettings, Settings

CONNECT_TIMEOUT_S = 2.0
REPLY_TIMEOUT_S = 5.0
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+ .*)", re.DOTALL)
"""How Redis before 7 tells what a command inside a script met: redis-py has no class for it."""


def make_redis(settings: Settings, *, retries: int = 1) -> redis.Redis:
    """A connected client that answers str; commands wait at most REPLY_TIMEOUT_S.

    Errors: AuthFailed, ServiceUnavailable, SettingsError.
    """
    where = settings.redis
    if not where.host:
        raise settings.unknown("Redis", "DPDL_REDIS_HOST and DPDL_REDIS_PORT")
    client = redis.Redis(
        host=where.host,
        port=where.port,
        db=where.db,
        username=where.username or None,
        password=where.password.get_secret_value() if where.password else None,
        decode_responses=True,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=REPLY_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        # Refused, and nothing done: the connection is dropped, with no retries too. After a
        # failover the name stands for another server than the one that it was opened to.
        retry_on_error=[rex.ReadOnlyError, rex.MasterDownError],
        **_tls(where),
    )
    with redis_errors(where):
        client.ping()
    return client


def eviction_policy(settings: Settings) -> str:
    """By which policy Redis drops keys when it is full; "" where it drops none, or may not say.

    Errors: as make_redis.
    """
    with make_redis(settings) as client, redis_errors(settings.redis):
        try:
            found = cast("dict[str, Any]", client.info("memory"))
        except rex.NoPermissionError:  # our own ACL (redis_client.py) has no INFO
            return ""
    policy = str(found.get("maxmemory_policy", ""))
    return policy if found.get("maxmemory") and policy != "noeviction" else ""


def _tls(where: RedisSettings) -> dict[str, Any]:
    if not where.tls:
        return {}
    for field in ("tls_ca", "tls_cert", "tls_key"):
        path = getattr(where, field)
        if path and not path.is_file():
            raise SettingsError(f"redis.{field}={path}: no such file")
    return {
        "ssl": True,
        "ssl_ca_certs": str(where.tls_ca) if where.tls_ca else None,
        "ssl_certfile": str(where.tls_cert) if where.tls_cert else None,
        "ssl_keyfile": str(where.tls_key) if where.tls_key else None,
        "ssl_check_hostname": where.tls_check_hostname,
    }


@contextmanager
def redis_errors(where: RedisSettings) -> Iterator[None]:
    """Turn redis-py's errors into ours, for any call on a client."""
    try:
        yield
    except rex.RedisError as error:
        raise _translated(error, where) from error


def _translated(error: rex.RedisError, where: RedisSettings) -> DpdlError:
    place = f"Redis at {where.host}:{where.port}"
    inside = _IN_SCRIPT.search(str(error))
    said = inside[1] if inside else str(error)
    if isinstance(error, (rex.AuthenticationError, rex.AuthorizationError, rex.NoPermissionError)):
        # With no password at all Redis answers a lecture on its HELLO command.
        why = "it wants a password" if "HELLO" in said else said
        return AuthFailed(
            f"{place} refused user {where.username or 'default'} ({why}): check redis.username, "
            "redis.password and the user's ACL"
        )
    if isinstance(error, rex.OutOfMemoryError) or said.startswith("OOM"):
        return StoreFull(
            f"{place} is at its memory limit ({said}): raise maxmemory or lower stream.scores_kept"
        )
    # InvalidResponse: whatever listens there, it is no Redis.
    unavailable = (rex.ConnectionError, rex.TimeoutError, rex.ReadOnlyError, rex.InvalidResponse)
    # MISCONF: Redis cannot persist (a full disk) and refuses writes; MASTERDOWN: a lone replica.
    refuses = said.startswith(
        ("MISCONF", "MASTERDOWN", "LOADING", "NOREPLICAS", "READONLY", "BUSY")
    )
    if isinstance(error, unavailable) or refuses:
        return ServiceUnavailable(
            f"{place} is not available ({said}): check that it runs (`dpdl status`), and that "
            "redis.host and redis.port name the primary"
        )
    return DataError(f"{place} refused a command ({said}): is redis.prefix used by others?")
