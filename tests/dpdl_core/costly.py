"""Small images that are legal and cost seconds to a decoder that goes where they lead."""

import io
import struct

from PIL import Image


def many_scans(num: int, side: int) -> bytes:
    """A flat grey progressive JPEG: each coefficient in scans of its own, bit by bit."""
    whole = _encoded("JPEG", side, progressive=True)
    first = whole.index(b"\xff\xc4", whole.index(b"\xff\xda"))  # where the scan of DC ends
    scan = whole[first : whole.index(b"\xff\xc4", first + 4)]
    sos = scan.index(b"\xff\xda")
    bits = [
        (k, 0 if low == 13 else low + 1, low) for k in range(1, 64) for low in range(13, -1, -1)
    ]
    more = (
        scan[: sos + 7] + bytes([k, k, high << 4 | low]) + scan[sos + 10 :]
        for k, high, low in bits[: num - 1]
    )
    return whole[:first] + b"".join(more) + b"\xff\xd9"


def many_directories(num: int) -> bytes:
    """A TIFF that names its one picture `num` times over."""
    first = _encoded("TIFF", 8)
    (at,) = struct.unpack_from("<I", first, 4)
    (tags,) = struct.unpack_from("<H", first, at)
    directory = first[at : at + 2 + 12 * tags]
    start, step = len(first), len(directory) + 4
    chain = (directory + struct.pack("<I", start + step * (i + 1)) for i in range(num - 1))
    last = directory + bytes(4)
    return first[:4] + struct.pack("<I", start) + first[8:] + b"".join(chain) + last


def _encoded(kind: str, side: int, **options: bool) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, kind, **options)
    return out.getvalue()
