"""The console's API without a cluster: logins, and a status while Redis is away."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from fastapi import HTTPException, Request

from infra.errors import ServiceUnavailable
from serving.console.access import Access
from serving.console.api import Console

HELD = Console.login.__globals__
"""What the module held when Serve copied the class: a patch of the module would not reach it."""


def login_of(*parts: bytes, ends: bool = True) -> Request:
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive():
        if left:
            return left.pop(0)
        if ends:
            return {"type": "http.request", "body": b"", "more_body": False}
        return await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/login", "headers": [], "scheme": "http"}
    return Request(scope | {"query_string": b""}, receive)


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setattr(HELD["api"].state, "access", Access("secret"), raising=False)
    return SimpleNamespace(_logins=asyncio.Semaphore(2))


def test_a_token_that_comes_in_pieces_lets_in(console):
    answer = asyncio.run(Console.login(console, login_of(b"token=", b"secret")))
    assert answer.status_code == 303


def test_a_login_that_never_ends_is_given_up(console, monkeypatch):
    monkeypatch.setitem(HELD, "LOGIN_BODY_S", 0.05)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(Console.login(console, login_of(b"token=", ends=False)))
    assert refused.value.status_code == 408


def test_more_logins_than_a_few_are_refused_at_once(console):
    async def guess() -> list[object]:
        logins = [Console.login(console, login_of(b"token=wrong")) for _ in range(6)]
        return await asyncio.gather(*logins, return_exceptions=True)

    began = time.monotonic()
    codes = [each.status_code for each in asyncio.run(guess())]
    assert sorted(codes) == [401, 401, 429, 429, 429, 429]
    assert time.monotonic() - began < 1.9  # none waited for another's second


def test_the_status_is_told_while_redis_is_away(monkeypatch):
    class Away:
        def dead_letters(self):
            raise ServiceUnavailable("Redis is away")

    async def asked(handle, method):
        return {"trouble": f"{handle}: Redis is away"}

    monkeypatch.setitem(HELD, "_asked", asked)
    one = SimpleNamespace(_results=Away(), _watch=SimpleNamespace(waiting={}))
    one._scorer, one._consumer = "scorer", "consumer"
    one._dead_letters = lambda: Console._dead_letters(one)
    told = asyncio.run(Console.status(one))
    assert told["consumer"]["trouble"] == "consumer: Redis is away"
    assert told["dead_letters"] is None
