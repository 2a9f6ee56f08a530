"""Frames from folders, what a frame is called, and one that is acknowledged late."""

import threading
from types import SimpleNamespace

import pytest
from kafka.errors import KafkaTimeoutError
from kafka.future import Future

from cluster import camera
from cluster.camera import OutgoingFrame, content_type, folder_frames, stream
from infra.errors import DataError, ServiceUnavailable
from infra.settings import Settings


def test_a_folder_is_read_in_the_order_of_names_and_byte_for_byte(tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xffb")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.PNG").write_bytes(b"a")
    (tmp_path / "notes.txt").write_text("no image")
    frames = list(folder_frames(tmp_path, "line-1"))
    assert [(f.source, f.image, f.camera) for f in frames] == [
        ("b.jpg", b"\xff\xd8\xffb", "line-1"),
        ("sub/a.PNG", b"a", "line-1"),
    ]


def test_files_of_every_kind_that_is_decoded_are_sent(tmp_path):
    for name in ("a.jfif", "b.GIF", "c.pgm"):
        (tmp_path / name).write_bytes(b"x")
    assert len(list(folder_frames(tmp_path, "line-1"))) == 3


def test_where_all_is_taken_as_normal_folders_below_are_asked_for(tmp_path):
    """nok/crack/ is not what a person means who names the folder above it."""
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "nok" / "crack").mkdir(parents=True)
    assert len(list(folder_frames(tmp_path, "line-1", recursive=False))) == 1
    (tmp_path / "nok" / "crack" / "b.png").write_bytes(b"b")
    with pytest.raises(DataError, match=r"1 images lie .* nok/crack/b\.png: .* --recursive"):
        list(folder_frames(tmp_path, "line-1", recursive=False))
    assert len(list(folder_frames(tmp_path, "line-1"))) == 2


def test_a_folder_without_images_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no images found; wanted files ending in .*\.jpg"):
        list(folder_frames(tmp_path, "line-1"))


def test_a_camera_id_that_cannot_be_a_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="control characters"):
        list(folder_frames(tmp_path, "line\n1"))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"plain text", "application/octet-stream"),
    ],
)
def test_content_type_goes_by_the_first_bytes(start, name):
    assert content_type(start) == name


def test_a_frame_that_is_acknowledged_while_its_sender_gives_up_is_sent_and_not_lost(monkeypatch):
    class Asked(Future):
        def get(self, timeout):
            raise KafkaTimeoutError

    futures = [Asked(), Asked()]
    left = iter(futures)
    producer = SimpleNamespace(send=lambda *_, **__: next(left))

    def close(producer, timeout_s):
        futures[1].success(SimpleNamespace(topic="frames", partition=0, offset=7))

    monkeypatch.setattr(camera, "make_producer", lambda _: producer)
    monkeypatch.setattr(camera, "close_producer", close)
    sent, lost = [], []
    frames = [OutgoingFrame("line-1", b"image", "a"), OutgoingFrame("line-1", b"image", "b")]
    with pytest.raises(ServiceUnavailable):
        stream(
            Settings(),
            frames,
            frames_per_second=None,
            stop=threading.Event(),
            on_sent=sent.append,
            on_lost=lost.append,
        )
    assert [(each.frame_id, each.source) for each in sent] == [("frames/0/7", "b")]
    assert lost == [1]
