"""Waiting for a service: until it is back, no longer than the deadline, and for nothing else."""

import pytest

from infra.errors import AuthFailed, ServiceUnavailable
from pipelines.patience import LAST_WAIT_S, patiently


def failing(times, error):
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


def test_it_goes_on_until_the_service_is_back():
    told, slept = [], []
    away = ServiceUnavailable("S3 is away")
    got = patiently(failing(7, away), deadline_s=1e6, waiting=told.append, sleep=slept.append)
    assert got == 8
    assert told == [away] * 7
    assert slept == sorted(slept)
    assert slept[-1] == LAST_WAIT_S


def test_it_gives_up_at_the_deadline_with_the_last_error():
    with pytest.raises(ServiceUnavailable, match="S3 is away"):
        patiently(
            failing(9, ServiceUnavailable("S3 is away")),
            deadline_s=0.5,
            waiting=lambda _: None,
            sleep=lambda _: pytest.fail("a pause would pass the deadline"),
        )


def test_what_waiting_cannot_mend_is_raised_at_once():
    with pytest.raises(AuthFailed):
        patiently(
            failing(1, AuthFailed("wrong key")),
            deadline_s=1e6,
            waiting=lambda _: pytest.fail("nobody should wait"),
        )
