"""Who may look at the console: whoever has the token; without one, this machine."""

import pytest

from serving.console.access import COOKIE, Access, refused_change

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
