"""Where a camera's frames come from: a folder, a video file, or a camera's RTSP or HTTP address.

Knows PyAV and files; nothing of Kafka. A frame that is a JPEG already (an MJPEG camera's) passes
through byte for byte; any other is encoded once. A password in an address stays in here: what
others see, in messages too, is `Address.shown`.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import av
import simplejpeg

from infra.errors import DataError
from infra.settings import referred_secret

SCHEMES = ("rtsp", "rtsps", "http", "https")
PASSWORD_NAMES = (
    *("pwd", "psw", "pass", "passwd", "passwort", "password", "passphrase", "passcode"),
    *("loginpas", "loginpass", "token", "key", "apikey", "secret"),
)
"""What cameras' makers call a parameter of an address that is one, in any case of letters."""
OPEN_S = 10.0
"""A camera that has not answered for so long is tried again."""
READ_S = 10.0
"""A camera that sends nothing for so long is lost."""
SNAPSHOT_FPS = 1.0
"""Pictures a second of a camera that gives one at a time, where no rate is asked for."""
JPEG_QUALITY = 90
JPEG_START = b"\xff\xd8\xff"

_PASSWORD = re.compile(rf"[/?#;&,_](?:{'|'.join(PASSWORD_NAMES)})=", re.IGNORECASE)
"""Anywhere behind the host: /user=admin_password=... is a path, and so is /live;pwd=..."""
_PARAMETERS = re.compile(r"[^/;&,]*(?:=|%3d).*", re.IGNORECASE | re.DOTALL)
"""Of a path, from the first on: where a value ends, its camera alone knows."""

av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines hold addresses with their passwords


@dataclass(frozen=True, slots=True)
class Address:
    """A live camera."""

    url: str = field(repr=False)
    """With its password, if it has one."""

    @property
    def shown(self) -> str:
        """Without user, password, and parameters, which may hold them."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{_PARAMETERS.sub('', parts.path)}"


Source = Path | Address


class CameraLost(Exception):
    """A live camera does not answer, or sends no more. The message holds no address."""


def parse_source(text: str, *, on_command_line: bool = False) -> Source:
    """A folder, a file, an address; or `env:NAME` or `file:PATH` that holds an address.

    Raises DataError, in one line, for what is none of them, and for a password on the command
    line, where every user of the machine can read it.
    """
    kind, colon, _ = text.partition(":")
    if colon and kind in ("env", "file"):
        address = referred_secret(text)
        if urlsplit(address).scheme not in SCHEMES:
            raise DataError(f"{text} holds no camera's address: wanted {'://, '.join(SCHEMES)}://")
        return Address(address)
    if urlsplit(text).scheme in SCHEMES:
        if on_command_line and holds_password(text):
            raise DataError(
                f"{Address(text).shown}: its password would stand in the list of processes; put "
                "the address into a file and give file:PATH, or into a variable and give env:NAME"
            )
        return Address(text)
    path = Path(text)
    if not path.exists():
        raise DataError(f"{text}: no such file or folder, and no address ({', '.join(SCHEMES)})")
    return path


def holds_password(url: str) -> bool:
    parts = urlsplit(url)
    behind_the_host = unquote(parts._replace(scheme="", netloc="").geturl())
    return parts.password is not None or _PASSWORD.search(behind_the_host) is not None


@dataclass(frozen=True, slots=True)
class Picture:
    """One frame as it was read; its bytes are made when asked for, so skipped ones cost little."""

    captured_at_ns: int
    jpeg: Callable[[], bytes]


def video_rate(path: Path) -> float:
    """Frames per second of a video file. DataError when it is none."""
    with _opened(str(path), path.name) as container:
        rate = container.streams.video[0].average_rate
        return float(rate) if rate else 25.0


def video_pictures(path: Path) -> Iterator[Picture]:
    """The frames of a video file, as fast as they are taken. DataError when it is none."""
    with _opened(str(path), path.name) as container:
        yield from _pictures(container)


def live_pictures(
    address: Address, stop: threading.Event, fps: float | None = None
) -> Iterator[Picture]:
    """A live camera's frames until it is lost, which raises CameraLost, or `stop` is set.

    One that answers with a single picture is asked again, `fps` times a second.
    """
    options = {"rtsp_transport": "tcp"} if address.url.startswith("rtsp") else {}
    while not stop.is_set():
        asked_s, num_pictures, single = time.monotonic(), 0, False
        try:
            with av.open(address.url, options=options, timeout=(OPEN_S, READ_S)) as container:
                if not container.streams.video:
                    raise CameraLost("it sends no video")
                single = container.format.name.endswith("_pipe")  # jpeg_pipe, png_pipe, ...
                for picture in _pictures(container):
                    if stop.is_set():
                        return
                    num_pictures += 1
                    yield picture
        except (av.FFmpegError, OSError) as error:
            # The end of a picture that came without its length is an error to FFmpeg.
            if not (single and num_pictures):
                raise CameraLost(error.strerror or type(error).__name__) from None
        if not (single and num_pictures):
            raise CameraLost("its stream ended")
        stop.wait(max(0.0, asked_s + 1 / (fps or SNAPSHOT_FPS) - time.monotonic()))


def _opened(url: str, shown: str) -> Any:
    try:
        container = av.open(url)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{shown}: no video that can be read ({error.strerror})") from None
    if not container.streams.video:
        container.close()
        raise DataError(f"{shown}: holds no video")
    return container


def _pictures(container: Any) -> Iterator[Picture]:
    stream = container.streams.video[0]
    passes = stream.codec_context.name == "mjpeg"
    for packet in container.demux(stream):
        if not packet.size and passes:
            continue
        now = time.time_ns()
        if passes:
            data = bytes(packet)
            if data.startswith(JPEG_START):
                yield Picture(now, lambda data=data: data)  # type: ignore[misc]
            continue
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            continue  # a damaged packet costs its own frame; the next key frame mends the rest
        for frame in decoded:
            yield Picture(now, lambda frame=frame: _encoded(frame))  # type: ignore[misc]


def _encoded(frame: Any) -> bytes:
    pixels = frame.to_ndarray(format="rgb24")
    return bytes(simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB"))
