"""Who may look: whoever has the token; where none is set, anyone on this machine.

With a token everyone is asked for it, from this machine too: behind a proxy on the same host all
the world comes from loopback, and not every proxy says for whom.

Without one a caller counts as local only when the connection comes from loopback, no proxy says
that it stands between (nginx by itself says nothing: behind any proxy a token is needed), and the
address in the browser's bar is a loopback name too: without the last, a web page from elsewhere
could reach the console through a name that it points at 127.0.0.1 (DNS rebinding).

What changes something needs more: a page from elsewhere can make this machine's browser send a
request (CSRF), but neither with a header of its own choosing nor with our origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

COOKIE = "dpdl_session"
CHANGE_HEADER = "x-dpdl"
"""To be sent, with any value, with every request that changes something."""


class Access:
    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def wanted(self) -> str:
        """What who may not look is told."""
        if self._token is None:
            return "only this machine is answered, and not through a proxy: set serve.token"
        return "a token is needed: Authorization: Bearer"

    def allows(
        self, client: str | None, headers: Mapping[str, str], cookies: Mapping[str, str]
    ) -> bool:
        """client: the peer's address as the HTTP server saw it."""
        if self._token is None:
            return _local(client, headers)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        session = self.session()
        return session is not None and hmac.compare_digest(
            cookies.get(COOKIE, "").encode(), session.encode()
        )

    def is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())

    def session(self) -> str | None:
        """What the cookie holds: proves that the token was given, and does not contain it."""
        if self._token is None:
            return None
        return hmac.new(self._token.encode(), b"dpdl console", hashlib.sha256).hexdigest()


def refused_change(headers: Mapping[str, str]) -> str:
    """Why a request may not change anything, "" where it may."""
    if headers.get("authorization", "").lower().startswith("bearer "):
        return ""  # no browser sends one of its own accord
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "a page from elsewhere may not change anything here"
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return f"origin {origin[:100]!a} is not this console"
    if CHANGE_HEADER not in headers:
        return f"a header is wanted with changes: {CHANGE_HEADER}: 1"
    return ""


def _local(client: str | None, headers: Mapping[str, str]) -> bool:
    said = ("forwarded", "via", "x-real-ip", "x-forwarded-")
    if any(name.lower().startswith(said) for name in headers):
        return False
    return _is_loopback(client or "") and _is_loopback(_host_name(headers.get("host", "")))


def _host_name(host: str) -> str:
    """Without its port: "127.0.0.1:8000", "[::1]:8000", "localhost"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
