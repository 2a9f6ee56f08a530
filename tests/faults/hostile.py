"""Records that a hostile or broken sender could write, and what must become of each.

`allowed` holds the reasons of which one must stand in its dead letter; "" among them: a score is
right too (a flipped bit may leave a JPEG that decodes, CMYK and 16 bit are legitimate).
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from frames import jpeg, picture
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "dpdl_core"))
from costly import many_directories, many_scans

from infra.kafka_client import MAX_RECORD_BYTES
from infra.messages import MAX_FRAME_BYTES

Rng = np.random.Generator
Headers = list[tuple[str, bytes]]

SCORED = ""
DAMAGED = frozenset({"truncated", "corrupt", "not-an-image", "unsupported", "too-large"})


@dataclass(frozen=True, slots=True)
class Hostile:
    kind: str
    value: bytes | None
    allowed: frozenset[str]
    key: bytes | None = b"hostile"
    headers: Headers = field(default_factory=list)


def png(rng: Rng, *, deep: bool = False) -> bytes:
    pixels = picture(rng, defect=False)
    return cv2.imencode(".png", pixels.astype(np.uint16) * 257 if deep else pixels)[1].tobytes()


def truncated(rng: Rng) -> Hostile:
    whole = (jpeg, png)[rng.integers(2)](rng)
    # At least one byte of the marker or chunk at the end is missing.
    return Hostile("truncated", whole[: rng.integers(1, len(whole) - 2)], DAMAGED)


def flipped_png(rng: Rng) -> Hostile:
    """Every bit of a PNG is under a checksum, its signature or its structure."""
    return Hostile("bit-flipped PNG", _flip(rng, png(rng)), DAMAGED | {"animated"})


def flipped_jpeg(rng: Rng) -> Hostile:
    return Hostile("bit-flipped JPEG", _flip(rng, jpeg(rng)), DAMAGED | {SCORED})


def _flip(rng: Rng, data: bytes) -> bytes:
    spoilt = bytearray(data)
    spoilt[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(spoilt)


def wrong_type(rng: Rng) -> Hostile:
    heads = (
        b"%PDF-1.7\n",
        b"\x1f\x8b\x08\x00",
        b"<svg xmlns='x'/>",
        b"PK\x03\x04",
        b"\x7fELF",
        b"{",
    )
    return Hostile("wrong type", heads[rng.integers(len(heads))] + rng.bytes(500), DAMAGED)


def noise(rng: Rng) -> Hostile:
    return Hostile("noise", b"\x00" + rng.bytes(int(rng.integers(1, 2000))), DAMAGED)


def empty(rng: Rng) -> Hostile:
    return Hostile("empty", (b"", None)[rng.integers(2)], frozenset({"empty"}))


def png_bomb(rng: Rng) -> Hostile:
    """30,000 x 30,000 in its header and two megabytes of zeros that inflate a thousandfold."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", _ZEROS), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return Hostile("PNG of 30,000 x 30,000", data, frozenset({"too-large"}))


_ZEROS = zlib.compress(bytes(200_000_000), 1)


def jpeg_bomb(rng: Rng) -> Hostile:
    data = bytearray(jpeg(rng))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 30_000, 30_000)
    return Hostile("JPEG of 30,000 x 30,000", bytes(data), frozenset({"too-large"}))


def jpeg_of_many_scans(rng: Rng) -> Hostile:
    """Hundreds of passes over its pixels, each of a hundred bytes."""
    return Hostile("JPEG of 300 scans", _SCANS, frozenset({"corrupt"}))


_SCANS = many_scans(300, 2000)


def tiff_of_many_directories(rng: Rng) -> Hostile:
    """Names its one picture again and again; counting them takes the square of their number."""
    return Hostile("TIFF of 5,000 directories", _DIRECTORIES, frozenset({"animated"}))


_DIRECTORIES = many_directories(5_000)


def bomb_within_bounds(rng: Rng) -> Hostile:
    """64 million pixels of 16 bit in 400 KB: legitimate, and the dearest that there is."""
    return Hostile("16-bit PNG of 8,000 x 8,000", _DEEP_BOMB, frozenset({SCORED}))


_DEEP_BOMB = cv2.imencode(".png", np.zeros((8000, 8000, 3), np.uint16))[1].tobytes()


def cmyk(rng: Rng) -> Hostile:
    out = io.BytesIO()
    Image.fromarray(picture(rng, defect=False)).convert("CMYK").save(out, "JPEG")
    return Hostile("CMYK JPEG", out.getvalue(), frozenset({SCORED}))


def deep(rng: Rng) -> Hostile:
    return Hostile("16-bit PNG", png(rng, deep=True), frozenset({SCORED}))


def animated(rng: Rng) -> Hostile:
    form = ("GIF", "PNG", "WEBP")[rng.integers(3)]
    first, *rest = (Image.fromarray(picture(rng, defect=False, side=48)) for _ in range(3))
    out = io.BytesIO()
    first.save(out, form, save_all=True, append_images=rest, duration=40)
    return Hostile(f"animated {form}", out.getvalue(), frozenset({"animated"}))


def no_key(rng: Rng) -> Hostile:
    return Hostile("no key", jpeg(rng), frozenset({"no-key"}), key=(None, b"")[rng.integers(2)])


def bad_key(rng: Rng) -> Hostile:
    keys = (b"\xff\xfe\xfd", b"a" * 200, b"cam\x00era", b" cam", b"cam\n", b"\xed\xa0\x80")
    return Hostile("bad key", jpeg(rng), frozenset({"bad-key"}), key=keys[rng.integers(len(keys))])


def bad_headers(rng: Rng) -> Hostile:
    cases: list[tuple[Headers, str]] = [
        ([("dpdl-schema", b"one")], "bad-schema"),
        ([("dpdl-schema", b"0")], "bad-schema"),
        ([("dpdl-schema", b"")], "bad-schema"),
        ([("dpdl-schema", b"2")], "schema-too-new"),
        ([("dpdl-schema", b"9" * 19)], "schema-too-new"),
        ([("captured-at", b"yesterday")], "bad-captured-at"),
        ([("captured-at", b"-1")], "bad-captured-at"),
        ([("captured-at", b"1e9")], "bad-captured-at"),
        ([("captured-at", b"9" * 19)], "bad-captured-at"),
        ([("captured-at", "\u0663".encode())], "bad-captured-at"),
        ([("content-type", b"image/\xff")], "bad-content-type"),
        ([("content-type", b"image/png\r\nX: y")], "bad-content-type"),
        ([("content-type", b"x" * 1000)], "bad-content-type"),
    ]
    headers, reason = cases[rng.integers(len(cases))]
    headers = [(NotUtf8(), b""), *headers, ("dead-frame", b"forged")]
    return Hostile(f"header: {reason}", jpeg(rng), frozenset({reason}), headers=headers)


class NotUtf8(str):
    """A header's name that only a sender in C could write."""

    def encode(self, *_: str) -> bytes:
        return b"x-\xff\xfe"


def odd_headers(rng: Rng) -> Hostile:
    """Headers that mean nothing to us are nobody's business, whatever their names."""
    names = ("x-\u00e4\u00f6", "", NotUtf8(), NotUtf8())
    headers = [(names[rng.integers(len(names))], rng.bytes(50)), ("dead-reason", b"forged")]
    return Hostile("odd headers", jpeg(rng), frozenset({SCORED}), headers=headers)


def forty_megabytes(rng: Rng) -> Hostile:
    return Hostile("40 MB", jpeg(rng) + bytes(40_000_000), frozenset({"too-large"}))


def just_too_large(rng: Rng) -> Hostile:
    """The most that the topic takes: its limit counts the whole batch around the record."""
    value = jpeg(rng) + bytes(MAX_RECORD_BYTES - 10_000)
    return Hostile("just below the topic's limit", value, frozenset({"too-large"}))


def largest_frame(rng: Rng) -> Hostile:
    """As large as a frame may be, with rubbish behind the picture."""
    value = jpeg(rng)
    value += bytes(MAX_FRAME_BYTES - len(value))
    return Hostile("a frame of 32 MiB", value, frozenset({SCORED, "corrupt"}))


SMALL: tuple[Callable[[Rng], Hostile], ...] = (
    truncated,
    flipped_png,
    flipped_jpeg,
    wrong_type,
    noise,
    empty,
    jpeg_bomb,
    jpeg_of_many_scans,
    tiff_of_many_directories,
    cmyk,
    deep,
    animated,
    no_key,
    bad_key,
    bad_headers,
    odd_headers,
)
LARGE: tuple[Callable[[Rng], Hostile], ...] = (
    png_bomb,
    bomb_within_bounds,
    forty_megabytes,
    just_too_large,
    largest_frame,
)
LARGE_EVERY = 200


def hostile(num_records: int, seed: int = 0) -> Iterator[Hostile]:
    """All kinds in turn; every LARGE_EVERY-th is a large one."""
    rng = np.random.default_rng(seed)
    for i in range(num_records):
        large, at = divmod(i, LARGE_EVERY)
        kinds = LARGE if at == LARGE_EVERY - 1 else SMALL
        yield kinds[(large if kinds is LARGE else i) % len(kinds)](rng)
