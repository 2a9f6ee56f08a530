"""Who may look at the console: whoever has the token; without one, this machine."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from ray import serve

from serving.console.access import COOKIE, Access, refused_change
from serving.console.api import api

LOCAL = {"host": "127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("client", "host"),
    [("127.0.0.1", "127.0.0.1:8000"), ("::1", "[::1]:8000"), ("127.0.0.1", "localhost")],
)
def test_this_machine_needs_no_token(client, host):
    assert Access(None).allows(client, {"host": host}, {})


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("10.0.0.7", {"host": "plant:8000"}),
        ("10.0.0.7", LOCAL),
        ("127.0.0.1", {"host": "evil.example:8000"}),  # DNS rebinding
        ("127.0.0.1", {**LOCAL, "x-forwarded-for": "10.0.0.7"}),  # a proxy before us
        ("127.0.0.1", {**LOCAL, "x-forwarded-proto": "https"}),
        ("127.0.0.1", {**LOCAL, "X-Real-IP": "10.0.0.7"}),
        ("127.0.0.1", {**LOCAL, "via": "1.1 varnish"}),
        ("127.0.0.1", {}),
        (None, LOCAL),
        ("", LOCAL),
    ],
)
def test_without_a_token_nobody_else_may(client, headers):
    assert not Access(None).allows(client, headers, {})


@pytest.mark.parametrize(
    ("client", "headers"),
    # The second may come through a proxy on this machine that does not say so.
    [("10.0.0.7", {"host": "plant:8000"}), ("127.0.0.1", LOCAL), (None, {})],
)
def test_with_a_token_everyone_needs_it(client, headers):
    access = Access("secret")
    assert not access.allows(client, headers, {})
    assert not access.allows(client, {**headers, "authorization": "Bearer wrong"}, {})
    assert not access.allows(client, {**headers, "authorization": "Basic secret"}, {})
    assert not access.allows(client, headers, {COOKIE: "secret"})
    assert access.allows(client, {**headers, "authorization": "Bearer secret"}, {})
    assert access.allows(client, headers, {COOKIE: access.session()})


def test_without_a_token_nothing_is_one():
    access = Access(None)
    assert not access.allows("10.0.0.7", {**LOCAL, "authorization": "Bearer "}, {COOKIE: ""})
    assert not access.is_token("")


def test_the_cookie_does_not_hold_the_token():
    assert "secret" not in Access("secret").session()


OURS = {"host": "127.0.0.1:8000", "x-dpdl": "1"}


@pytest.mark.parametrize(
    "headers",
    [
        OURS,
        {**OURS, "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"host": "plant:8000", "authorization": "Bearer secret"},
    ],
)
def test_our_own_pages_and_programs_may_change_things(headers):
    assert refused_change(headers) == ""


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"host": "127.0.0.1:8000"}, "x-dpdl: 1"),
        ({**OURS, "sec-fetch-site": "cross-site"}, "elsewhere"),
        ({**OURS, "sec-fetch-site": "same-site"}, "elsewhere"),
        ({**OURS, "origin": "http://evil.example"}, "evil.example"),
        ({**OURS, "origin": "http://127.0.0.1:9000"}, "9000"),
        ({**OURS, "origin": "null"}, "null"),
        ({**OURS, "authorization": "Basic x", "origin": "http://evil.example"}, "evil"),
    ],
)
def test_pages_from_elsewhere_may_not(headers, why):
    assert why in refused_change(headers)


BROWSER = {"accept": "text/html,*/*;q=0.8"}
PICTURE = "/api/v1/frames/dpdl.frames/0/7"


@pytest.fixture
def client(monkeypatch):
    """Of a console whose token is "secret", on another machine; what it shows is not asked for."""
    console = SimpleNamespace(_logins=asyncio.Semaphore(1))
    context = SimpleNamespace(servable_object=console)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(api, "state", SimpleNamespace(access=Access("secret")))
    return TestClient(api, base_url="http://plant:8000", follow_redirects=False)


def test_a_link_to_a_picture_asks_for_the_token_and_goes_on_to_the_picture(client):
    asked = client.get(PICTURE, headers=BROWSER)
    assert asked.status_code == 303
    form = client.get(asked.headers["location"])
    assert (form.status_code, b'name="token"' in form.content) == (200, True)
    assert client.get(PICTURE).status_code == 401  # a program is told in JSON
    for elsewhere in ("https://evil.example", "//evil.example", "/evil.example"):
        moved = client.post("/login", params={"to": elsewhere}, data={"token": "secret"})
        assert moved.headers["location"] == "/"
    given = client.post(asked.headers["location"], data={"token": "secret"})
    assert (given.status_code, given.headers["location"]) == (303, PICTURE)
    cookie = given.headers["set-cookie"].lower()
    assert "samesite=lax" in cookie  # a link from Grafana brings it
    assert "httponly" in cookie


def test_a_wrong_token_is_said_to_be_wrong(client):
    assert b"not the token" not in client.get("/").content
    again = client.post("/login", data={"token": "guess"})
    assert (again.status_code, b"That is not the token." in again.content) == (401, True)


def test_where_there_is_no_token_none_is_asked_for(client):
    api.state.access = Access(None)
    for answer in (
        client.get("/"),
        client.get(PICTURE, headers=BROWSER),
        client.get("/login"),
        client.post("/login", data={"token": "x"}),
    ):
        assert b"Set serve.token" in answer.content
        assert b"<form" not in answer.content
    assert "set serve.token" in client.get("/api/v1/alerts").json()["detail"]
