"""Live cameras' buffers, pauses, addresses and the file of many cameras. No network, no Kafka."""

import itertools
import threading

import av
import numpy as np
import pytest
from kafka.errors import KafkaTimeoutError

from cluster import camera, feeds
from cluster.camera import OutgoingFrame
from cluster.feeds import Buffer, CameraCount, CameraSpec, load_cameras, pause_s, run_cameras
from cluster.sources import Address, Picture, parse_source, video_pictures, video_rate
from dpdl_core.images import decode_image
from infra.errors import AuthFailed, DataError, SettingsError
from infra.settings import Settings

SECRET = "rtsp://viewer:open-sesame@10.0.0.5:554/stream1"


def frame(image):
    return OutgoingFrame("line-1", image, "")


def filled(images, *, frames=1000, size=1000):
    count = CameraCount("line-1")
    buffer = Buffer(count, frames=frames, size=size)
    for image in images:
        buffer.put(frame(image))
    buffer.close()
    return [each.image for each in buffer], count.dropped


def test_a_full_buffer_drops_its_oldest_frames_and_counts_them():
    images = [bytes([i]) for i in range(10)]
    assert filled(images, frames=4) == (images[6:], 6)
    assert filled(images, frames=10) == (images, 0)


def test_bytes_bound_a_buffer_too_even_for_one_frame():
    assert filled([b"a" * 60, b"b" * 60], size=100) == ([b"b" * 60], 1)
    assert filled([b"a" * 200], size=100) == ([], 1)


def test_a_reader_waits_for_frames_and_ends_when_the_buffer_is_closed():
    buffer = Buffer(CameraCount("line-1"), frames=9, size=99)
    got = []
    reader = threading.Thread(target=lambda: got.extend(f.image for f in buffer))
    reader.start()
    buffer.put(frame(b"1"))
    buffer.put(frame(b"2"))
    buffer.close()
    reader.join(5)
    assert not reader.is_alive()
    assert got == [b"1", b"2"]


def live(monkeypatch, send):
    """A camera of an endless address whose frames `send` takes: (count, what was said)."""

    def pictures(address, over, fps):
        while not over.wait(0.01):
            yield Picture(0, lambda: b"image")
        yield Picture(0, lambda: b"the one that was being read")

    def stream(settings, frames, *, on_sent, on_lost, **_):
        send(frames, on_sent)

    monkeypatch.setattr(feeds, "live_pictures", pictures)
    monkeypatch.setattr(feeds, "stream", stream)
    stop, counts, said = threading.Event(), [], []
    spec = CameraSpec(camera="line-1", source=Address("rtsp://10.0.0.5/1"))
    run_cameras(Settings(), [spec], stop=stop, say=said.append, counts=counts)
    for thread in threading.enumerate():
        if thread.name == "read line-1":
            thread.join(5)
            assert not thread.is_alive()
    return counts[0], said


def test_a_live_camera_that_failed_is_not_shown_as_live_by_its_reader(monkeypatch):
    def send(frames, on_sent):
        next(iter(frames))
        raise DataError("no topic")

    count, _ = live(monkeypatch, send)
    assert (count.state, count.why) == ("failed", "no topic")


def test_a_live_camera_that_kafka_refuses_is_tried_again(monkeypatch):
    """A person mends it at the broker; until then its frames wait, the oldest are dropped."""
    monkeypatch.setattr(feeds, "LAST_PAUSE_S", 0.05)
    tries = []

    def send(frames, on_sent):
        tries.append(next(iter(frames)))
        if len(tries) < 3:
            raise AuthFailed("Kafka refuses the login")
        on_sent(tries[-1])

    count, said = live(monkeypatch, send)
    assert (count.state, count.sent, len(tries)) == ("ended", 1, 3)
    assert len([line for line in said if "refuses the login; frames wait" in line]) == 2


def test_frames_that_a_broker_that_is_away_never_got_are_counted_at_the_end(monkeypatch):
    """The one in hand when sending fails, and those in the buffer when it is over."""
    made = []

    class Away:
        def send(self, *_, **__):
            made.append(0)
            raise KafkaTimeoutError

    monkeypatch.setattr(camera, "make_producer", lambda _: Away())
    monkeypatch.setattr(camera, "close_producer", lambda *_: None)
    put, over = Buffer.put, threading.Event()
    given = []

    def counted(buffer, frame):
        given.append(frame)
        put(buffer, frame)
        if len(given) == 5:
            over.set()

    monkeypatch.setattr(Buffer, "put", counted)

    def pictures(address, ended, fps):
        for _ in range(5):
            yield Picture(0, lambda: b"image")
        ended.wait(5)

    monkeypatch.setattr(feeds, "live_pictures", pictures)
    monkeypatch.setattr(feeds, "pause_s", lambda *_, **__: 3600.0)
    counts = []
    spec = CameraSpec(camera="line-1", source=Address("rtsp://10.0.0.5/1"))
    run_cameras(Settings(), [spec], stop=over, say=lambda _: None, counts=counts)
    assert made
    assert (counts[0].sent, counts[0].dropped) == (0, 5)


def test_pauses_grow_to_a_bound_and_differ():
    low = [pause_s(attempt, jitter=0) for attempt in range(12)]
    high = [pause_s(attempt, jitter=1) for attempt in range(12)]
    assert low == sorted(low)
    assert high[0] == 0.5
    assert max(high) == 15.0
    assert all(a < b for a, b in zip(low, high, strict=True))
    assert pause_s(10**6, jitter=1) == 15.0


def test_a_password_is_neither_shown_nor_taken_from_the_command_line(tmp_path, monkeypatch):
    source = parse_source(SECRET)
    assert isinstance(source, Address)
    assert source.shown == "rtsp://10.0.0.5:554/stream1"
    assert "sesame" not in repr(source)
    with pytest.raises(DataError, match="env:NAME") as refused:
        parse_source(SECRET, on_command_line=True)
    assert "sesame" not in str(refused.value)
    (tmp_path / "address").write_text(SECRET + "\n")
    with pytest.raises(SettingsError, match=r"address holds a secret and has mode 0644.*chmod"):
        parse_source(f"file:{tmp_path / 'address'}")
    (tmp_path / "address").chmod(0o440)  # as Kubernetes mounts it for a group
    monkeypatch.setenv("LINE_1", SECRET)
    for reference in (f"file:{tmp_path / 'address'}", "env:LINE_1"):
        assert parse_source(reference, on_command_line=True) == source


def test_what_is_no_source_is_told(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        parse_source(str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match="env:NOT_SET_ANYWHERE: empty or not set"):
        parse_source("env:NOT_SET_ANYWHERE")
    (tmp_path / "words").write_text("open sesame")
    (tmp_path / "words").chmod(0o600)
    with pytest.raises(DataError, match="holds no camera's address") as refused:
        parse_source(f"file:{tmp_path / 'words'}")
    assert "open sesame" not in str(refused.value)


def test_many_cameras_from_one_file(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_text(
        f"cameras:\n- {{id: line-1, source: '{SECRET}', fps: 5}}\n- {{id: line-2, source: .}}\n"
    )
    with pytest.raises(SettingsError, match=r"cameras\.yaml holds a secret and has mode 0644"):
        load_cameras(path)
    path.chmod(0o600)
    first, second = load_cameras(path)
    assert (first.camera, first.source, first.fps) == ("line-1", Address(SECRET), 5.0)
    assert (second.camera, second.fps) == ("line-2", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cameras: []", "cameras: List should have at least 1"),
        ("cameras: [{id: a}]", "cameras.0.source: Field required"),
        ("cameras: [{id: a, source: ., fsp: 3}]", "cameras.0.fsp: Extra inputs"),
        ("cameras: [{id: a, source: ., fps: 0}]", "cameras.0.fps: Input should be greater"),
        ("cameras: [{id: a, source: .}, {id: a, source: .}]", "a stands there more than once"),
        ('cameras: [{id: "a\\n", source: .}]', "control characters"),
        ("cameras: [", "no YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_where(tmp_path, text, message):
    path = tmp_path / "cameras.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as refused:
        load_cameras(path)
    assert "\n" not in str(refused.value)


def test_a_slip_does_not_print_a_cameras_password(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_text('cameras:\n  - {id: a, source: "rtsp://admin:hunter2@10.0.0.1/x}\n')
    with pytest.raises(DataError, match="no YAML in line") as refused:
        load_cameras(path)
    assert "hunter2" not in str(refused.value)


def make_video(path, codec, pixel_format, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = pixel_format
        for level in frames:
            picture = av.VideoFrame.from_ndarray(
                np.full((64, 64, 3), level, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("codec", "pixel_format"), [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")])
def test_a_video_file_gives_every_frame_as_a_jpeg(tmp_path, codec, pixel_format):
    path = tmp_path / "line.avi"
    levels = list(range(20, 220, 20))
    make_video(path, codec, pixel_format, levels)
    images = [picture.jpeg() for picture in video_pictures(path)]
    seen = [float(decode_image(image, 32).mean()) for image in images]
    assert len(seen) == len(levels)
    assert all(abs(a - b) < 6 for a, b in zip(seen, levels, strict=True))
    assert video_rate(path) == pytest.approx(10)


def test_a_frame_of_an_mjpeg_camera_passes_byte_for_byte(tmp_path):
    path = tmp_path / "line.avi"
    make_video(path, "mjpeg", "yuvj420p", [50, 150])
    with av.open(str(path)) as container:
        raw = [bytes(p) for p in itertools.islice(container.demux(video=0), 2)]
    assert [picture.jpeg() for picture in video_pictures(path)] == raw


def test_a_file_that_is_no_video_is_told(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no video")
    with pytest.raises(DataError, match=r"notes\.txt: no video that can be read"):
        list(video_pictures(path))
