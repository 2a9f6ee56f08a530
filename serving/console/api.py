"""Console: one page and a small JSON API over what the stream left in Redis and S3.

Reads only. Everything is bounded: pages by count, evidence by size, waits by time. Camera ids and
topics are hostile input: they are JSON here and text nodes in the page, never markup.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI

log = logging.getLogger("dpdl.console")

MAX_PAGE = 500
STATUS_S = 5.0
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>DPDL</title>
<link rel="stylesheet" href="console.css"><form class="login" method="post" action="login">
<label>Token <input name="token" type="password" autocomplete="current-password" autofocus></label>
<button>Open the console</button></form></html>"""

api = FastAPI(title="DPDL alerts", version="1", docs_url=None, redoc_url=None,
              openapi_url="/api/v1/openapi.json")  # fmt: skip
