"""Encoded bytes to square RGB arrays: the one decode path of the whole product.

Training, evaluation and the stream all call `decode_image`, so a model never meets pixels that
were resized differently from those it learnt. Knows nothing of where bytes come from. Imports no
torch to decode: a process that does nothing else (serving/consume.py) is spared its 600 MB.
Letters: N images, B batch, S side of the square in pixels.

What is done to an image, always and in this order:
1. its header is read and its size bounded, and a JPEG's scans, before any pixel is decoded;
2. it is decoded: JPEG by simplejpeg at the smallest scale that still covers S, PNG by OpenCV,
   BMP, GIF, PPM, TIFF and WebP by Pillow;
3. 16 bit becomes 8 bit by v / 257 rounded, grey is repeated, alpha is dropped, CMYK goes through
   Pillow's conversion, and EXIF orientation is ignored: a camera does not turn its head between
   frames, and turning pixels by a tag would let a tag change a score (TIFF's own orientation says
   how its rows are stored, and is followed);
4. it is squashed to S x S without a crop: linear up to a factor of 2, area means above it, and a
   side that grows while the other shrinks so far is linear after it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MAX_SCANS = 64
"""Of a JPEG: each passes over all pixels, however few bytes it has. Encoders write at most 18."""
MAX_STRAY = 16
"""Bytes of any value before a JPEG's end marker, which some cameras leave there (USB cameras, cheap
MJPEG); of one value, padding, there may be more. What a damaged picture leaves over is longer as a
rule, and of many values."""

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_PPM = (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset({*_JPEG, *_PPM, ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
"""Endings, in lower case, of files that decode_image() reads."""

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the encoded image

_STRIP_ROWS = 256
_NEARLY_BLACK = (
    "an image of 16 bits has no value of 4096 or more, of 65535 that are white, and is read as "
    "nearly black: if a camera stores 10 or 12 bits so, scale its values up by 64 or 16"
)
"""A warning, of which Python shows one to a process; a picture that is as dark may be right."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""One that begins a segment, or the end: neither stuffing, fill bytes, restarts nor the start."""
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_PILLOW_FORMATS = ("BMP", "GIF", "PPM", "TIFF", "WEBP")


class ImageRejected(ValueError):
    """Bytes that are not one usable image; `reason` is a slug for counters and headers.

    Reasons: empty, too-large, not-an-image, truncated, corrupt, animated, unsupported.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageRejected], tuple[str, str]]:
        # Exceptions cross process borders in Ray; the default would pass one argument of two.
        return type(self), (self.reason, str(self).removeprefix(f"{self.reason}: "))


def decode_image(
    data: bytes,
    size: int,
    *,
    crop: Box | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Encoded image -> RGB uint8 (size, size, 3), contiguous and the same for the same bytes.

    crop cuts a box (left, top, right, bottom; pixels of the encoded image) before the resize, for
    data sets whose samples are parts of a picture. Raises ImageRejected, and nothing else, for
    whatever the bytes are; ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: need at least 1 pixel")
    if not data:
        raise ImageRejected("empty", "0 bytes")
    if len(data) > max_bytes:
        raise ImageRejected("too-large", f"{len(data)} bytes, at most {max_bytes} are read")
    if data[:3] == b"\xff\xd8\xff":
        pixels = _decode_jpeg(data, size, crop, max_pixels)
    elif data[:8] == _PNG_SIGNATURE:
        pixels = _cut(_decode_png(data, max_pixels), crop)
    else:
        pixels = _cut(_decode_pillow(data, max_pixels), crop)
    return _resize(pixels, size)


def _bound(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageRejected("corrupt", f"the header says {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageRejected(
            "too-large", f"{width}x{height} pixels, at most {max_pixels} are decoded"
        )


def _cut(pixels: Pixels, crop: Box | None) -> Pixels:
    if crop is None:
        return pixels
    left, top, right, bottom = crop
    height, width = pixels.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ImageRejected("corrupt", f"the box {crop} is not inside {width}x{height} pixels")
    return pixels[top:bottom, left:right]


def _resize(pixels: Pixels, size: int) -> Pixels:
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(pixels)
    # Linear looks at 2x2 pixels: beyond a factor of 2 it would skip some, and alias.
    shrinks = max(height, width) > 2 * size
    if shrinks and min(height, width) < size:
        # OpenCV takes means only where no side grows, and else is linear in both.
        pixels = cv2.resize(
            pixels, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA
        )  # type: ignore[assignment]
        shrinks = False
    return cv2.resize(  # type: ignore[return-value]
        pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def _decode_jpeg(data: bytes, size: int, crop: Box | None, max_pixels: int) -> Pixels:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _bound(width, height, max_pixels)
        _check_scans(data)
        if colorspace in ("CMYK", "YCCK"):
            return _cut(_decode_pillow(data, max_pixels, formats=("JPEG",)), crop)
        if crop is not None:  # a box in source pixels has no place in a reduced decode
            return _cut(_scans(data), crop)
        return _scans(data, min_height=min(size, height), min_width=min(size, width), min_factor=1)
    except ImageRejected:
        raise
    except (ValueError, MemoryError) as error:  # simplejpeg is strict: libjpeg's warnings too
        cut_short = "Premature end" in str(error) or b"\xff\xda" not in data
        raise ImageRejected("truncated" if cut_short else "corrupt", f"JPEG: {error}") from None


def _scans(data: bytes, **options: int) -> Pixels:
    """Strict but for bytes before the end marker that are no part of the picture. ValueError."""
    try:
        return simplejpeg.decode_jpeg(data, **options)  # type: ignore[no-any-return]
    except ValueError as error:
        told, end = _STRAY.search(str(error)), data.rfind(b"\xff\xd9")
        stray = data[end - int(told[1]) : end] if told else b""
        if not stray or (len(stray) > MAX_STRAY and len(set(stray)) > 1):
            raise
        # Strict again: the message was of the last thing found amiss, perhaps not of the first.
        whole = data[: end - len(stray)] + data[end:]
        return simplejpeg.decode_jpeg(whole, **options)  # type: ignore[no-any-return]


def _check_scans(data: bytes) -> None:
    """A flat picture of many scans is a few bytes a scan, and seconds of work."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return  # metadata and what follows the end may hold more, the picture cannot
    num_scans, at = 0, 2
    while marker := _JPEG_MARKER.search(data, at):  # as libjpeg goes from one to the next
        kind, at = marker[0][1], marker.end()
        if kind == 0xD9:
            return
        num_scans += kind == 0xDA
        if num_scans > MAX_SCANS:
            raise ImageRejected("corrupt", f"JPEG: more than {MAX_SCANS} scans")
        at += int.from_bytes(data[at : at + 2], "big")


def _decode_png(data: bytes, max_pixels: int) -> Pixels:
    data = _checked_png(data, max_pixels)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageRejected("corrupt", f"PNG: {error.err}") from None
    if bgr is None:
        raise ImageRejected("corrupt", "PNG: the pixel data cannot be decompressed")
    return cv2.cvtColor(_to_rgb8(bgr), cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def _checked_png(data: bytes, max_pixels: int) -> bytes:
    """Walk the chunks: bound IHDR's size, verify every checksum, refuse an animation.

    OpenCV hands out half-decoded pictures for some broken files, so it is not asked first. It gets
    what the picture is made of alone: of a colour profile it makes nothing, but libpng writes a
    line to the log for one that is amiss, and a camera's is so in every frame.
    """
    kept = [_PNG_SIGNATURE]
    position = len(_PNG_SIGNATURE)
    seen_header = False
    while True:
        if position + 12 > len(data):
            raise ImageRejected("truncated", f"PNG: ends at byte {len(data)} without IEND")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ImageRejected("truncated", f"PNG: {len(data)} bytes, {kind!r} ends at {end}")
        (wanted,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(data[position + 4 : end - 4]) != wanted:
            raise ImageRejected("corrupt", f"PNG: checksum of {kind!r} at byte {position}")
        if not seen_header:
            if kind != b"IHDR" or length != 13:
                raise ImageRejected("corrupt", f"PNG: starts with {kind!r}, not IHDR")
            width, height = struct.unpack_from(">II", data, position + 8)
            _bound(width, height, max_pixels)
            seen_header = True
        elif kind == b"acTL":
            raise ImageRejected("animated", "PNG: several frames in one file")
        if kind[:1].isupper() or kind == b"tRNS":  # critical, and transparency
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end


def _decode_pillow(
    data: bytes, max_pixels: int, *, formats: tuple[str, ...] = _PILLOW_FORMATS
) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:  # reads the header only
            _bound(image.width, image.height, max_pixels)
            if _has_second(image):
                raise ImageRejected("animated", f"{image.format}: several images in one file")
            if image.format == "PPM" and image.tile[0].codec_name == "ppm":
                return _scaled_ppm(image, data)
            return _pillow_to_rgb8(image)
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        raise ImageRejected("not-an-image", f"starts with {data[:8]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected("too-large", str(error)) from None
    except Exception as error:
        # Pillow's parsers raise OSError, SyntaxError, struct.error, IndexError and more for
        # damaged input; a poison frame must not be able to choose which of them ends the stream.
        cut_short = "truncated" in str(error)
        raise ImageRejected(
            "truncated" if cut_short else "corrupt", f"{type(error).__name__}: {error}"
        ) from None


def _has_second(image: Image.Image) -> bool:
    """Without n_frames, which walks all the images that a file claims to hold."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _scaled_ppm(image: ImageFile.ImageFile, data: bytes) -> Pixels:
    """A binary PGM or PPM whose white is another value than 255 or, grey, 65535.

    The figures are Pillow's, which takes ten seconds for 5 million pixels: it scales each in
    Python.
    """
    tile, bands = image.tile[0], len(image.getbands())
    assert isinstance(tile.args, tuple)
    mode, white = tile.args
    if mode not in ("L", "RGB"):
        raise ImageRejected("unsupported", f"PPM: pixels of mode {mode}; save L or RGB")
    depth = np.dtype(np.uint8 if white < 256 else ">u2")
    count = image.width * image.height * bands
    found = (len(data) - tile.offset) // depth.itemsize
    if found < count:
        raise ImageRejected("truncated", f"PPM: {found} values, the header says {count}")
    values = np.frombuffer(data, depth, count, tile.offset)
    grey = np.rint(np.arange(white + 1) / white * 255).astype(np.uint8)
    pixels = grey.take(values, mode="clip").reshape(image.height, image.width, bands)
    return _to_rgb8(pixels[:, :, 0] if bands == 1 else pixels)


def _pillow_to_rgb8(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        return _to_rgb8(np.asarray(image, dtype=np.uint16))
    if image.mode == "I" and image.format == "PPM":  # grey of 16 bit, scaled to 65535
        return _to_rgb8(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        raise ImageRejected("unsupported", f"{image.format}: 32-bit pixels; save 8 or 16 bit")
    return np.asarray(image.convert("RGB"))


def _to_rgb8(pixels: npt.NDArray[np.generic]) -> Pixels:
    """uint8 or uint16 (H, W) or (H, W, 3) -> uint8 (H, W, 3); 65535 becomes 255 and 0 stays 0.

    The order of channels stays.
    """
    if pixels.dtype == np.uint16:
        deep, pixels = pixels, np.empty(pixels.shape, np.uint8)
        if 0 < deep.max() < 4096:
            warnings.warn(_NEARLY_BLACK, stacklevel=2)
        # By strips: as a whole, 64 million pixels would take 2 GB on the way.
        for top in range(0, len(deep), _STRIP_ROWS):
            rows = slice(top, top + _STRIP_ROWS)
            pixels[rows] = (deep[rows].astype(np.uint32) + 128) // 257
    elif pixels.dtype != np.uint8:
        raise ImageRejected("unsupported", f"pixels of type {pixels.dtype}; save 8 or 16 bit")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels  # type: ignore[return-value]


class ImageSource(Protocol):
    """Images in a fixed order that can be read again and again, in batches."""

    @property
    def num_images(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """uint8 (B, S, S, 3) RGB; B = batch_size but for the last batch."""
        ...


class ArraySource:
    """An ImageSource over an array in memory (or a memory map), or over some of its rows."""

    def __init__(
        self,
        images: Pixels | torch.Tensor,
        indices: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """images uint8 (N, S, S, 3); indices picks and orders rows without copying them all."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}: need (N, S, S, 3)")
        if str(images.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"images are {images.dtype}: need uint8")
        self._images = images
        self._indices = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64)

    @property
    def num_images(self) -> int:
        return len(self._indices)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        import torch

        for start in range(0, len(self._indices), batch_size):
            rows = self._indices[start : start + batch_size]
            if isinstance(self._images, torch.Tensor):
                yield self._images[torch.from_numpy(rows)]
            else:
                yield torch.from_numpy(self._images[rows])
