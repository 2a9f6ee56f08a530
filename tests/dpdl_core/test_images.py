"""The decode path against Pillow, and against bytes that no camera should send."""

import io
import pickle
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpdl_core.images import ArraySource, ImageRejected, decode_image

sys.path.insert(0, str(Path(__file__).parent))
from costly import many_directories, many_scans


def picture(width=320, height=256) -> Image.Image:
    """Smooth, with different channels: resampling kernels must agree on it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [
        127 + 120 * np.sin(x / 37),
        127 + 120 * np.cos(y / 29),
        127 + 120 * np.sin((x + y) / 53),
    ]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


JPEG = encode(picture(), "JPEG", quality=92)
PNG = encode(picture(), "PNG")


def expected(data: bytes, size: int) -> np.ndarray:
    """Oracle: full decode by Pillow and its antialiased bilinear resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
@pytest.mark.parametrize("size", [64, 100, 224, 300])
def test_equals_a_plain_decode(kind, size):
    data = encode(picture(), kind)
    got = decode_image(data, size)
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    error = np.abs(got - expected(data, size))
    assert error.mean() < 2  # grey levels of 255: kernels differ, channels and places must not
    assert np.quantile(error, 0.99) < 10


def test_large_jpeg_at_reduced_scale_equals_a_plain_decode():
    data = encode(picture(1280, 1024), "JPEG", quality=92)
    assert np.abs(decode_image(data, 224) - expected(data, 224)).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_other_pixel_modes(mode, kind):
    allowed = {"PNG": ("1", "L", "LA", "P", "RGBA"), "JPEG": ("1", "L", "CMYK")}
    if mode not in allowed.get(kind, ("1", "L", "LA", "P", "RGBA", "CMYK")):
        pytest.skip(f"{kind} has no {mode}")
    data = encode(picture().convert(mode, dither=Image.Dither.NONE), kind)
    assert np.abs(decode_image(data, 64) - expected(data, 64)).mean() < 3


def test_cmyk_white_is_white_as_adobe_writes_it():
    # Adobe stores inverted ink; taken literally, white would come out black.
    data = encode(Image.new("CMYK", (40, 40), (0, 0, 0, 0)), "JPEG")
    assert decode_image(data, 8).min() > 250


def test_bits_that_are_stored_at_the_wrong_end_are_warned_of():
    """12 bits in 16 become nearly black: a model of them would see nothing, and nobody know why."""
    for values, warned in ((4095, True), (4096, False), (0, False)):
        data = encode(Image.fromarray(np.full((8, 8), values, np.uint16)), "PNG")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            decode_image(data, 8)
        assert [("scale its values" in str(one.message)) for one in told] == [True] * warned


def test_16_bit_is_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = decode_image(encode(Image.fromarray(ramp), kind), 64).astype(int)
        assert np.array_equal(got[:, :, 0], np.rint(ramp / 257).astype(int))
        assert np.array_equal(got[:, :, 0], got[:, :, 2])


def pnm(kind: str, white: int, values: np.ndarray) -> bytes:
    """A PGM (P2, P5) or PPM (P3, P6) as its specification has it."""
    head = f"{kind} {values.shape[1]} {values.shape[0]} {white}\n".encode()
    if kind in ("P2", "P3"):
        return head + " ".join(map(str, values.ravel())).encode()
    return head + values.astype(">u2" if white > 255 else "u1").tobytes()


@pytest.mark.parametrize("white", [1, 100, 254, 255, 256, 1023, 4095, 65534, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_portable_maps_of_any_white(kind, white):
    """Oracle: the grey level of v is 255 v / white, to within the rounding."""
    values = np.linspace(0, white, 64 * 64).round().astype(int).reshape(64, 64)
    if kind in ("P3", "P6"):
        values = np.stack([values, white - values, values.T], 2)
    got = decode_image(pnm(kind, white, values), 64)
    want = values * 255 / white
    want = want if want.ndim == 3 else np.stack([want] * 3, 2)
    assert np.abs(got - want).max() < 0.51  # P2 above 255 is rounded twice


def test_portable_maps_of_12_bit_take_no_seconds():
    data, began_s = pnm("P5", 4095, np.full((2048, 2448), 4095)), time.process_time()
    assert decode_image(data, 64).min() == 255
    assert time.process_time() - began_s < 2  # Pillow takes ten


def test_portable_maps_that_are_cut_short_or_exceed_their_white():
    whole = pnm("P5", 4095, np.full((8, 8), 4095))
    for data in (whole[:-1], whole[:20], pnm("P6", 99, np.zeros((8, 8, 3)))[:-1]):
        with pytest.raises(ImageRejected) as rejected:
            decode_image(data, 8)
        assert rejected.value.reason == "truncated"
    assert decode_image(pnm("P5", 4095, np.full((8, 8), 65535)), 8).min() == 255


def test_a_colour_profile_that_is_amiss_fills_no_log_and_changes_no_pixel(capfd):
    profile = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"\0\0\0\x80" + b"x" * 124))
    gamma = png_chunk(b"gAMA", struct.pack(">I", 100_000))
    got = decode_image(PNG[:33] + profile + gamma + PNG[33:], 64)
    assert np.array_equal(got, decode_image(PNG, 64))
    assert capfd.readouterr().err == ""


def test_transparent_pixels_keep_their_colour():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :, 0] = 200
    assert decode_image(encode(Image.fromarray(rgba), "PNG"), 16)[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_ignored(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = picture(64, 64)
    turned = decode_image(encode(image, kind, exif=exif), 64)
    assert np.array_equal(turned, decode_image(encode(image, kind), 64))


def test_squashes_without_a_crop():
    wide = np.zeros((50, 400, 3), np.uint8)
    wide[:, :4] = 255
    wide[:, -4:] = 255
    got = decode_image(encode(Image.fromarray(wide), "PNG"), 100)
    assert got[:, 0].min() > 200
    assert got[:, -1].min() > 200


def test_fine_stripes_become_grey_and_do_not_alias():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    got = decode_image(encode(Image.fromarray(stripes), "PNG"), 64).astype(int)
    assert np.abs(got - 127).max() <= 2


def area_means(length: int, size: int) -> np.ndarray:
    """(size, length): each row averages what its cell of the source covers."""
    edges = np.arange(size + 1) * length / size
    pixels = np.arange(length)
    low = np.maximum(edges[:-1, None], pixels)
    return np.clip(np.minimum(edges[1:, None], pixels + 1) - low, 0, None) * size / length


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("short", "long"), [(100, 4000), (1, 449), (223, 2240), (60, 700)])
@pytest.mark.parametrize("upright", [False, True])
def test_oblong_pictures_do_not_alias(kind, short, long, upright):
    """Oracle: means along the side that shrinks, as a matrix; interpolation by numpy along the
    other, between the centres of pixels."""
    rows = np.linspace(40, 250, short) * np.ones((long, 1))  # a slope along the short side
    lines = (np.arange(long) % 18 == 0)[:, None] * rows
    wide = np.repeat(np.rint(lines.T)[:, :, None], 3, axis=2).astype(np.uint8)
    image = Image.fromarray(wide.swapaxes(0, 1) if upright else wide)
    data = encode(image, kind, **({"quality": 100} if kind == "JPEG" else {}))
    source = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, :, 1].astype(float)
    shrunk = (source.T if upright else source) @ area_means(long, 224).T
    centres = (np.arange(224) + 0.5) * short / 224 - 0.5
    want = np.stack([np.interp(centres, np.arange(short), column) for column in shrunk.T], 1)
    got = decode_image(data, 224)[:, :, 1].astype(float)
    # Both steps round, and decoders of JPEG differ by a level or two.
    assert np.abs((got.T if upright else got) - want).max() < (1.1 if kind == "PNG" else 3.1)


@pytest.mark.parametrize("data", [JPEG, PNG])
def test_crop_is_in_pixels_of_the_source(data):
    box = (64, 32, 192, 160)
    got = decode_image(data, 128, crop=box).astype(int)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").crop(box)).astype(int)
    assert np.abs(got - want).mean() < 2
    with pytest.raises(ImageRejected, match="box"):
        decode_image(data, 128, crop=(0, 0, 400, 100))


@pytest.mark.parametrize("stray", [b"\0", b"\0" * 8, b"\0" * 3000, b"\x7f\x03\x91\x22\x45\x17\x80"])
@pytest.mark.parametrize("crop", [None, (64, 32, 192, 160)])
def test_bytes_that_cameras_leave_before_the_end_marker_change_nothing(stray, crop):
    data = JPEG[:-2] + stray + JPEG[-2:]
    assert np.array_equal(decode_image(data, 64, crop=crop), decode_image(JPEG, 64, crop=crop))


def test_stray_bytes_elsewhere_and_what_looks_like_more_of_the_picture_are_corrupt():
    flipped, restarts = bytearray(JPEG), encode(picture(), "JPEG", restart_marker_blocks=8)
    flipped[3142] ^= 0x10  # the picture is complete before its bytes are
    at = restarts.index(b"\xff\xd3")
    for data in (
        JPEG[:-2] + JPEG[-42:-2] + JPEG[-2:],
        bytes(flipped),
        bytes(flipped[:-2]) + b"\0" * 8 + JPEG[-2:],
        JPEG[: JPEG.index(b"\xff\xda")] + b"\0\0\0" + JPEG[JPEG.index(b"\xff\xda") :],
        restarts[:at] + b"\0\0" + restarts[at:],
        JPEG[:-400] + b"\0" * 50 + JPEG[-2:],
    ):
        with pytest.raises(ImageRejected) as rejected:
            decode_image(data, 64)
        assert rejected.value.reason == "corrupt"


def test_many_scans_are_refused_before_they_cost_anything():
    assert decode_image(many_scans(64, 256), 64).shape == (64, 64, 3)
    # Only the picture's own count: a film behind its end may hold any bytes.
    assert decode_image(many_scans(64, 256) + b"\xff\xda\x00\x02" * 64, 64).shape == (64, 64, 3)
    data, began_s = many_scans(300, 8000), time.process_time()
    assert len(data) < 200_000
    with pytest.raises(ImageRejected, match="scans") as rejected:
        decode_image(data, 64)
    assert rejected.value.reason == "corrupt"
    assert time.process_time() - began_s < 1  # decoding takes seven


def test_many_directories_are_not_walked():
    data, began_s = many_directories(20_000), time.process_time()
    with pytest.raises(ImageRejected) as rejected:
        decode_image(data, 64)
    assert rejected.value.reason == "animated"
    assert time.process_time() - began_s < 1  # the time of a walk grows with the square


def png_chunk(kind: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


def huge_png(width: int, height: int) -> bytes:
    """A small file whose header promises width x height: a decompression bomb."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return PNG[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def huge_jpeg(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def huge_bmp(width: int, height: int) -> bytes:
    data = bytearray(encode(picture(8, 8), "BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"PyRGBA 2 2 99\n" + bytes(16), "unsupported"),
        (b"Pf 2 2 -1\n" + bytes(16), "unsupported"),
        (b"a letter to the editor" * 10, "not-an-image"),
        (b"\x00" * 5000, "not-an-image"),
        (b"%PDF-1.7 ....", "not-an-image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-2], "truncated"),
        (JPEG[:100], "truncated"),
        (JPEG[:3], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-1], "truncated"),
        (PNG[:8], "truncated"),
        (PNG[:50] + b"\x00" + PNG[51:], "corrupt"),
        (encode(picture(), "BMP")[:5000], "truncated"),
        (huge_png(50_000, 50_000), "too-large"),
        (huge_png(2**31 - 1, 2**31 - 1), "too-large"),
        (huge_png(0, 10), "corrupt"),
        (huge_png(64, 64), "corrupt"),
        (huge_jpeg(60_000, 60_000), "too-large"),
        (huge_bmp(30_000, 30_000), "too-large"),
        (huge_bmp(9_000, 9_000), "too-large"),
        (bytes(33 * 2**20), "too-large"),
        (
            encode(picture(32, 32), "GIF", save_all=True, append_images=[picture(32, 40)]),
            "animated",
        ),
        (
            encode(
                picture(32, 32), "PNG", save_all=True, append_images=[Image.new("RGB", (32, 32))]
            ),
            "animated",
        ),
        (
            encode(picture(32, 32), "TIFF", save_all=True, append_images=[picture(32, 32)]),
            "animated",
        ),
        (encode(picture(32, 32).convert("F"), "TIFF"), "unsupported"),
    ],
)
def test_hostile_bytes_are_rejected_by_reason(data, reason):
    with pytest.raises(ImageRejected) as rejected:
        decode_image(data, 64)
    assert rejected.value.reason == reason
    assert "\n" not in str(rejected.value)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [encode(picture(48, 40), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]
    ),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=12),
    st.floats(0.05, 1),
)
def test_bit_flips_decode_or_are_rejected_and_nothing_else(data, flips, share):
    damaged = bytearray(data[: max(1, int(len(data) * share))])
    for place, bit in flips:
        damaged[place % len(damaged)] ^= 1 << bit
    try:
        got = decode_image(bytes(damaged), 32, max_pixels=10**6)
    except ImageRejected:
        return
    assert got.shape == (32, 32, 3)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", JPEG[:40], PNG[:40], b"BM", b"II*\x00"]))
def test_arbitrary_bytes_behind_real_beginnings(tail, head):
    try:
        decode_image(head + tail, 16, max_pixels=10**6)
    except ImageRejected:
        return


def test_png_bit_flips_never_pass(tmp_path):
    """Every chunk has a checksum: damage inside one is always seen, never a wrong picture."""
    whole = decode_image(PNG, 64)
    for place in range(8, len(PNG), max(1, len(PNG) // 60)):
        damaged = bytearray(PNG)
        damaged[place] ^= 0x10
        try:
            got = decode_image(bytes(damaged), 64)
        except ImageRejected:
            continue
        assert np.array_equal(got, whole)


def test_bounds_are_the_callers_to_tighten():
    with pytest.raises(ImageRejected, match="too-large"):
        decode_image(JPEG, 64, max_pixels=320 * 256 - 1)
    with pytest.raises(ImageRejected, match="too-large"):
        decode_image(JPEG, 64, max_bytes=len(JPEG) - 1)
    decode_image(JPEG, 64, max_pixels=320 * 256, max_bytes=len(JPEG))
    with pytest.raises(ValueError, match="size=0"):
        decode_image(JPEG, 0)


def test_rejection_survives_pickling():
    with pytest.raises(ImageRejected) as rejected:
        decode_image(b"no", 64)
    copy = pickle.loads(pickle.dumps(rejected.value))
    assert (copy.reason, str(copy)) == (rejected.value.reason, str(rejected.value))


def test_array_source_batches_again_and_again():
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    source = ArraySource(images, [4, 0, 2])
    assert source.num_images == 3
    for _ in range(2):
        batches = list(source.batches(2))
        assert [len(b) for b in batches] == [2, 1]
        assert torch.equal(torch.cat(batches), torch.from_numpy(images[[4, 0, 2]]))
    same = torch.cat(list(ArraySource(torch.from_numpy(images)).batches(2)))
    assert torch.equal(same, torch.from_numpy(images))
    with pytest.raises(ValueError, match="uint8"):
        ArraySource(images.astype(np.float32))
    with pytest.raises(ValueError, match="need"):
        ArraySource(images[:, :, :, 0])
