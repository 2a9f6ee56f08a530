"""Redis' refusals as our errors, as Redis 6.2 words them too."""

from __future__ import annotations

import pytest
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from infra.errors import DataError, DpdlError, ServiceUnavailable, StoreFull
from infra.redis_connection import redis_errors
from infra.settings import RedisSettings

OOM = "OOM command not allowed when used memory > 'maxmemory'."
READONLY = "READONLY You can't write against a read only replica."
MISCONF = "MISCONF Redis is configured to save RDB snapshots, but it is currently not able to."


def in_script(said: str) -> ResponseError:
    """As 6.2.14 answers EVALSHA; redis-py has taken ERR away."""
    where = "(call to f_62e6aac9c7520a78c28f012748b42ed670fff5d3): @user_script:1: @user_script: 1"
    return ResponseError(f"Error running script {where}: -{said}")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OutOfMemoryError(OOM), StoreFull),
        (ReadOnlyError(READONLY), ServiceUnavailable),
        (ResponseError(MISCONF), ServiceUnavailable),
        (in_script(OOM), StoreFull),
        (in_script(READONLY), ServiceUnavailable),
        (in_script(MISCONF), ServiceUnavailable),
        (in_script("NOREPLICAS Not enough good replicas to write."), ServiceUnavailable),
        (in_script("LOADING Redis is loading the dataset in memory"), ServiceUnavailable),
        (in_script("WRONGTYPE Operation against a key holding the wrong kind"), DataError),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind"), DataError),
    ],
)
def test_what_passes_can_be_tried_again_also_from_within_a_script(
    error: Exception, wanted: type[DpdlError]
) -> None:
    with pytest.raises(DpdlError) as found, redis_errors(RedisSettings(host="redis.plant")):
        raise error
    assert type(found.value) is wanted
    assert "user_script" not in str(found.value)
