"""S3's refusals as our errors: which of them are worth another try."""

from __future__ import annotations

import pytest
import urllib3
from minio.error import S3Error

from infra.errors import DataError, DpdlError, ServiceUnavailable
from infra.s3_client import s3_errors
from infra.settings import S3Settings


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (429, "ErrTooManyRequest", ServiceUnavailable),
        (500, "InternalError", ServiceUnavailable),
        (503, "SlowDownWrite", ServiceUnavailable),
        (503, "ServerBusy", ServiceUnavailable),
        (507, "XMinioStorageFull", ServiceUnavailable),
        (400, "RequestTimeout", ServiceUnavailable),
        (400, "MalformedXML", DataError),
        (501, "NotImplemented", DataError),
    ],
)
def test_what_a_busy_or_full_server_refuses_can_be_tried_again(
    status: int, code: str, wanted: type[DpdlError]
) -> None:
    answer = urllib3.HTTPResponse(status=status)
    with pytest.raises(wanted, match=code), s3_errors(S3Settings(endpoint="s3.plant:9000")):
        raise S3Error(answer, code, "said", "/bucket/key", "1", "2")
