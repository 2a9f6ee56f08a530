"""What a run leaves: epochs as lines, a picture, and numbers that mean the same image for ever."""

import io

import torch
from PIL import Image

from pipelines.run_record import LOSSES, draw, epochs_from_lines, epochs_to_lines
from pipelines.sources import RowGroup, RowRef
from pipelines.train_keeper import Numbers

EPOCHS = [
    {
        "epoch": number,
        "loss": 2.0 / number,
        "energy_of_normals": 0.1,
        "data_wait_share": 0.02,
        **dict.fromkeys(LOSSES, 0.5),
        **({"renewal": {"kept": 3}} if number == 2 else {}),
    }
    for number in (1, 2, 3)
]


def test_epochs_there_and_back():
    assert epochs_from_lines(epochs_to_lines(EPOCHS)) == EPOCHS
    assert epochs_from_lines(b"") == []


def size(picture):
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        return image.size


def test_the_picture_has_curves_where_there_were_epochs_and_scores_always():
    scores = [0.1, 0.2, 0.3], [(0.2, 0), (0.9, 1)]
    wide = draw(EPOCHS, *scores, 0.5)
    assert wide == draw(EPOCHS, *scores, 0.5)  # a version is written once: the same bytes again
    assert size(wide)[0] > size(draw([], *scores, 0.5))[0]
    size(draw([], [0.1], [], 0.5))


def test_numbers_follow_the_order_of_objects_whoever_reads_them():
    numbers = Numbers()
    numbers.add([RowGroup("a", 0, 3), RowGroup("a", 1, 2), RowGroup("b", 0, 4)])
    numbers.add([RowGroup("new", 0, 2)])
    rows = [RowRef(key, row, "", 0, "", "", "") for key, row in (("b", 1), ("a", 4), ("new", 0))]
    assert torch.equal(numbers.of(rows), torch.tensor([6, 4, 9]))
