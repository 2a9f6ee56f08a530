"""StreamedImages: one order, the same batches whether cached or read again in each pass."""

import numpy as np
import pytest
import torch

from pipelines.sources import Decoded, RowRef, StreamedImages, stack

SIZE = 4


def row(number):
    return RowRef("k", number, f"{number:064x}", 0, "", "", f"image-{number}")


class Reader:
    """Pieces of uneven length, image i filled with the value i; counts its passes."""

    def __init__(self, *lengths):
        self.lengths, self.passes = lengths, 0

    def __call__(self):
        self.passes += 1
        start = 0
        for length in self.lengths:
            values = np.arange(start, start + length, dtype=np.uint8)
            images = np.broadcast_to(values[:, None, None, None], (length, SIZE, SIZE, 3)).copy()
            images.flags.writeable = False  # as Ray hands them out
            yield Decoded(images, [row(i) for i in range(start, start + length)])
            start += length


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cached", "streamed"])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_every_image_comes_once_in_order_in_full_batches(cache_bytes, batch_size):
    source = StreamedImages(Reader(3, 0, 7, 1), SIZE, expected=11, cache_bytes=cache_bytes)
    for _ in range(2):
        batches = list(source.batches(batch_size))
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(11))
        assert batches[0].dtype == torch.uint8
        assert batches[0].shape[1:] == (SIZE, SIZE, 3)
    assert source.num_images == 11
    assert [r.row for r in source.rows] == list(range(11))


def test_what_fits_is_read_once_and_what_does_not_in_each_pass():
    fits, large = Reader(5), Reader(5)
    kept = StreamedImages(fits, SIZE, expected=5)
    streamed = StreamedImages(large, SIZE, expected=5, cache_bytes=5 * SIZE * SIZE * 3 - 1)
    for source in (kept, streamed):
        list(source.batches(2))
        list(source.batches(2))
    assert (fits.passes, large.passes) == (1, 3)


def test_rows_that_did_not_decode_leave_no_gap():
    source = StreamedImages(Reader(3), SIZE, expected=5)  # the index said five
    assert source.num_images == 3
    assert torch.cat(list(source.batches(2))).shape[0] == 3


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_no_images_are_no_batches(cache_bytes):
    source = StreamedImages(Reader(), SIZE, expected=0, cache_bytes=cache_bytes)
    assert list(source.batches(8)) == []
    assert stack(source).shape[0] == 0


def test_stack_holds_all():
    assert stack(StreamedImages(Reader(2, 2), SIZE, expected=4))[:, 0, 0, 0].tolist() == [
        0,
        1,
        2,
        3,
    ]
