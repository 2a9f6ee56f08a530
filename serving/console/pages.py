"""The console's own files, and pictures from outside, as responses. Knows no request."""

from importlib.resources import files

from fastapi import Response

from serving.archive import image_type

SCRIPTS = ("alerts", "app", "camera", "chart", "dom", "login", "versions", "viewer", "wall")
STATIC = {"console.css": "text/css; charset=utf-8"} | {
    f"{name}.js": "text/javascript; charset=utf-8" for name in SCRIPTS
}


def file(name: str) -> bytes:
    return (files("serving.console") / name).read_bytes()


def login(said: str = "") -> bytes:
    """The form for the token; said: what was wrong with the last one."""
    return file("login.html").replace(b'<p role="alert">', f'<p role="alert">{said}'.encode())


def picture(data: bytes, *, lasting: bool = True) -> Response:
    """lasting: its address never stands for another one."""
    kind = image_type(data)
    # What is no known picture is never shown in the page's origin.
    shown = "inline" if kind.startswith("image/") else "attachment"
    headers = {
        "Cache-Control": "private, max-age=86400, immutable" if lasting else "no-store",
        "Content-Disposition": shown,
    }
    return Response(data, media_type=kind, headers=headers)
