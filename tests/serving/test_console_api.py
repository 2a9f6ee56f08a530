"""The console's API without a cluster: logins, pictures of an S3 that hangs, and a status while
Redis is away."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fastapi import HTTPException, Request

from infra.errors import ServiceUnavailable
from infra.settings import load_settings
from serving import archive
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


def wall(evidence, pictures=4, readers=2):
    """A console that asks `evidence` for pictures; `one()` is what a browser gets of it."""
    one = SimpleNamespace(_evidence=evidence, _pictures=asyncio.Semaphore(pictures))
    one._readers = ThreadPoolExecutor(readers)
    return lambda: Console.evidence(one, "frames", "0", "7-1", "frame")


def test_pictures_of_an_s3_that_hangs_take_no_thread_of_other_pages():
    hang = threading.Event()
    one = wall(SimpleNamespace(get=lambda key: hang.wait(10) and b"\xff\xd8\xff"))

    async def page():
        pictures = [asyncio.create_task(one()) for _ in range(6)]
        done, waiting = await asyncio.wait(pictures, timeout=0.2)
        hang.set()
        return done, await asyncio.gather(*waiting)

    refused, given = asyncio.run(page())
    assert [each.exception().status_code for each in refused] == [503, 503]
    assert "S3" in next(iter(refused)).exception().detail
    assert [each.media_type for each in given] == ["image/jpeg"] * 4


def test_a_picture_is_given_up_soon_and_says_why(monkeypatch):
    monkeypatch.setattr(archive, "SHOW_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and never answers
        monkeypatch.setenv("DPDL_S3_ENDPOINT", f"127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("DPDL_S3_ACCESS_KEY", "any")
        monkeypatch.setenv("DPDL_S3_SECRET_KEY", "any")
        one, began = wall(archive.EvidenceBucket(load_settings(), hurried=True)), time.monotonic()
        with pytest.raises(HTTPException, match="S3 gives no picture") as refused:
            asyncio.run(one())
    assert refused.value.status_code == 503
    assert time.monotonic() - began < 2.0
