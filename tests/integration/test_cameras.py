"""Live cameras over real sockets: an RTSP server (H.264 and MJPEG) that dies and comes back, an
HTTP camera, and frames that arrive in a real Kafka."""

from __future__ import annotations

import http.server
import itertools
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from kafka import TopicPartition
from kafka.admin import ConfigResource

from cluster.feeds import CameraSpec, run_cameras
from cluster.sources import Address, CameraLost, live_pictures
from infra.kafka_client import end_offsets, ensure_topics, make_admin, make_consumer
from infra.messages import MAX_FRAME_BYTES

pytestmark = pytest.mark.integration

PYTHON = "/usr/bin/python3"
SERVER = """
import sys, gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
source = "videotestsrc is-live=true"
source += " ! video/x-raw,format=I420,width=320,height=240,framerate=15/1 ! "
kinds = {
    "/mjpeg": "jpegenc ! rtpjpegpay name=pay0 pt=26",
    "/h264": "x264enc tune=zerolatency key-int-max=15 ! rtph264pay name=pay0 pt=96",
}
for path, rest in kinds.items():
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch("( " + source + rest + " )")
    factory.set_shared(True)
    server.get_mount_points().add_factory(path, factory)
server.attach(None)
GLib.MainLoop().run()
"""


def has_rtsp_server():
    probe = 'import gi; gi.require_version("GstRtspServer", "1.0")'
    try:
        done = subprocess.run([PYTHON, "-c", probe], capture_output=True, timeout=30)
    except OSError:
        return False
    return done.returncode == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(true, seconds, what):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds} s: no {what}"
        time.sleep(0.1)


@contextmanager
def running(settings, *specs):
    """Cameras in the background; gives their counts and what was said."""
    stop, counts, said = threading.Event(), [], []
    thread = threading.Thread(
        target=run_cameras,
        args=(settings, specs),
        kwargs={"stop": stop, "say": said.append, "counts": counts},
    )
    thread.start()
    try:
        wait_until(lambda: len(counts) == len(specs), 5, "counts")
        yield counts, said
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def frames_in_kafka(settings):
    consumer = make_consumer(settings)
    ends = end_offsets(settings, settings.kafka.topic)
    places = [TopicPartition(settings.kafka.topic, number) for number in ends]
    consumer.assign(places)
    for place in places:
        consumer.seek(place, 0)
    records = []
    while len(records) < sum(ends.values()):
        for batch in consumer.poll(timeout_ms=1000).values():
            records += batch
    consumer.close()
    return records


@pytest.mark.skipif(
    not has_rtsp_server(), reason="needs gir1.2-gst-rtsp-server-1.0 (tests/apt.txt)"
)
def test_rtsp_cameras_are_read_lost_and_found_again(settings, tmp_path):
    ensure_topics(settings)
    port = free_port()
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    start = lambda: subprocess.Popen([PYTHON, str(script), str(port)])  # noqa: E731
    specs = [
        CameraSpec(camera=kind, source=Address(f"rtsp://me:open-sesame@127.0.0.1:{port}/{kind}"))
        for kind in ("mjpeg", "h264")
    ]
    server = start()
    try:
        with running(settings, *specs) as (counts, said):
            wait_until(lambda: all(c.sent >= 10 for c in counts), 60, "frames of both cameras")
            server.kill()
            server.wait()
            wait_until(lambda: all(c.state == "lost" for c in counts), 30, "loss of both cameras")
            before = [c.sent for c in counts]
            server = start()
            wait_until(
                lambda: all(c.sent >= b + 10 for c, b in zip(counts, before, strict=True)),
                60,
                "frames after the return",
            )
    finally:
        server.kill()
        server.wait()
    assert [c.losses for c in counts] == [1, 1]
    assert [c.dropped for c in counts] == [0, 0]
    assert [c.state for c in counts] == ["ended", "ended"]
    assert not [line for line in said if "sesame" in line]
    records = frames_in_kafka(settings)
    for count in counts:
        mine = [r for r in records if r.key.decode() == count.camera]
        assert len(mine) == count.sent
        captured = [int(dict(r.headers)["captured-at"]) for r in mine]
        assert captured == sorted(captured)
        picture = cv2.imdecode(np.frombuffer(mine[0].value, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (240, 320, 3)


class HttpCamera(http.server.BaseHTTPRequestHandler):
    """multipart/x-mixed-replace, as cheap cameras send it."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        try:
            for image in self.server.images:
                self.wfile.write(
                    b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(image)
                )
                self.wfile.write(image + b"\r\n")
                time.sleep(0.05)
        except OSError:
            pass  # the reader has enough

    def log_message(self, *args):
        pass


def test_an_http_camera_passes_its_jpegs_untouched(settings):
    ensure_topics(settings)
    images = [
        bytes(cv2.imencode(".jpg", np.full((48, 64, 3), level, np.uint8))[1])
        for level in range(10, 250, 8)
    ]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpCamera) as server:
        server.images = images
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Address(f"http://127.0.0.1:{server.server_address[1]}/video")
        with running(settings, CameraSpec(camera="http", source=source)) as (counts, _):
            wait_until(lambda: counts[0].losses >= 1, 30, "end of the first connection")
        server.shutdown()
    values = [record.value for record in frames_in_kafka(settings)]
    assert values[: len(images) - 1] == images[: len(images) - 1]


class Snapshots(HttpCamera):
    """A camera that gives one picture each time it is asked."""

    def do_GET(self):
        image = self.server.images[self.server.asked % len(self.server.images)]
        self.server.asked += 1
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        if "length" in self.path:
            self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)


@pytest.mark.parametrize("path", ["snapshot.jpg?length", "cgi-bin/snapshot"])
def test_a_camera_of_single_pictures_is_asked_again_at_its_rate(path):
    images = [
        bytes(cv2.imencode(".jpg", np.full((48, 64, 3), level, np.uint8))[1])
        for level in range(10, 250, 40)
    ]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Snapshots) as server:
        server.images, server.asked = images, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = Address(f"http://127.0.0.1:{server.server_address[1]}/{path}")
        began_s = time.monotonic()
        pictures = itertools.islice(live_pictures(address, threading.Event(), 10.0), len(images))
        assert [picture.jpeg() for picture in pictures] == images
        assert time.monotonic() - began_s > (len(images) - 1) / 10
        server.shutdown()
    with pytest.raises(CameraLost):
        next(live_pictures(address, threading.Event()))


def test_one_cameras_end_is_not_anothers(settings, tmp_path):
    ensure_topics(settings)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]))
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video")
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    (unreadable / "0.jpg").symlink_to(tmp_path / "gone.jpg")
    specs = [
        CameraSpec(camera="broken", source=broken),
        CameraSpec(camera="folder", source=folder, fps=100),
        CameraSpec(camera="unreadable", source=unreadable),
    ]
    counts, said = [], []
    run_cameras(settings, specs, stop=threading.Event(), say=said.append, counts=counts)
    assert [(c.camera, c.state, c.sent) for c in counts] == [
        ("broken", "failed", 0),
        ("folder", "ended", 5),
        ("unreadable", "failed", 0),
    ]
    assert "no video that can be read" in counts[0].why
    assert "0.jpg" in counts[2].why


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_broker_that_is_away_for_longer_than_a_frame_waits(settings, stack, monkeypatch):
    """Frames in flight are given up and counted; the camera goes on with another producer."""
    ensure_topics(settings)
    monkeypatch.setattr("infra.kafka_client.REQUEST_TIMEOUT_S", 4.0)
    monkeypatch.setattr("infra.kafka_client.DELIVERY_TIMEOUT_S", 5.0)
    monkeypatch.setattr("cluster.camera.IN_FLIGHT", 5)
    images = [
        bytes(cv2.imencode(".jpg", np.full((48, 64, 3), n % 256, np.uint8))[1]) + b"%d" % n
        for n in range(2000)
    ]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpCamera) as server:
        server.images = images
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Address(f"http://127.0.0.1:{server.server_address[1]}/video")
        specs = [CameraSpec(camera=f"http-{n}", source=source) for n in range(2)]
        with running(settings, *specs) as (counts, said):
            wait_until(lambda: all(c.sent >= 5 for c in counts), 30, "frames")
            stack.pause("kafka")
            try:
                wait_until(lambda: all(c.dropped >= 10 for c in counts), 60, "frames given up")
            finally:
                stack.resume("kafka")
            held = [c.sent for c in counts]
            wait_until(
                lambda: all(c.sent >= h + 10 for c, h in zip(counts, held, strict=True)),
                60,
                "frames after the pause",
            )
        server.shutdown()
    assert not [each for each in threading.enumerate() if "network-thread" in each.name]
    assert [c.state for c in counts] == ["ended"] * 2
    away = [line for line in said if "frames wait, the oldest are dropped" in line]
    assert len(away) >= 2
    records = frames_in_kafka(settings)
    for count in counts:
        mine = [record for record in records if record.key.decode() == count.camera]
        # What was given up may have arrived all the same; nothing comes twice.
        assert count.sent <= len(mine) <= count.sent + count.dropped
        assert len({record.value for record in mine}) == len(mine)


def topic_of_the_plant(settings, **configs):
    """Underscores in place of dots."""
    admin = make_admin(settings)
    configs = {name.replace("_", "."): str(value) for name, value in configs.items()}
    topic = {"num_partitions": 1, "replication_factor": 1, "configs": configs}
    admin.create_topics({settings.kafka.topic: topic})
    admin.wait_for_topics([settings.kafka.topic])
    admin.close()


def pictures(large_at, count=12):
    """JPEGs of under 2 kB, and at some places one of over 50 kB."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (256, 256, 3), np.uint8)
    flat = (np.full((48, 64, 3), 20 * n, np.uint8) for n in range(count))
    shown = [noise if n in large_at else image for n, image in enumerate(flat)]
    return [bytes(cv2.imencode(".jpg", image)[1]) for image in shown]


def test_a_frame_beyond_the_topics_own_limit_is_left_out_and_the_camera_goes_on(settings):
    topic_of_the_plant(settings, max_message_bytes=20_000)
    images = pictures({2, 3, 7})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpCamera) as server:
        server.images = images
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Address(f"http://127.0.0.1:{server.server_address[1]}/video")
        with running(settings, CameraSpec(camera="http", source=source)) as (counts, said):
            wait_until(lambda: counts[0].losses >= 2, 30, "end of the second connection")
        server.shutdown()
    [count] = counts
    assert count.state == "ended"
    assert count.refused >= 6
    [line] = [each for each in said if "max.message.bytes" in each]
    assert str(len(images[2])) in line
    assert "\n" not in line
    values = [record.value for record in frames_in_kafka(settings)]
    assert len(values) == count.sent
    small = [image for image in images if len(image) < 20_000]
    assert values[: len(small)] == small


def test_frames_of_a_time_that_the_topic_refuses_are_left_out_until_it_takes_them(settings):
    """As of a machine whose clock is wrong; here every record is too old for the topic."""
    topic_of_the_plant(settings, message_timestamp_before_max_ms=0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpCamera) as server:
        server.images = pictures({})
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Address(f"http://127.0.0.1:{server.server_address[1]}/video")
        with running(settings, CameraSpec(camera="http", source=source)) as (counts, said):
            wait_until(lambda: counts[0].refused >= 3, 30, "refused frames")
            later = {"message.timestamp.before.max.ms": "86400000"}
            admin = make_admin(settings)
            admin.alter_configs([ConfigResource("topic", settings.kafka.topic, later)])
            admin.close()
            wait_until(lambda: counts[0].sent >= 3, 30, "frames that are taken")
        server.shutdown()
    [count] = counts
    assert count.state == "ended"
    assert len([each for each in said if "set this machine's clock" in each]) == 1
    assert len(frames_in_kafka(settings)) == count.sent


def test_a_folder_with_a_frame_too_large_sends_the_others_and_fails(settings, tmp_path):
    topic_of_the_plant(settings, max_message_bytes=20_000)
    images = pictures({4})
    for number, image in enumerate(images):
        (tmp_path / f"{number:02}.jpg").write_bytes(image)
    (tmp_path / "beyond.jpg").write_bytes(b"\xff\xd8\xff" + bytes(MAX_FRAME_BYTES))
    spec = CameraSpec(camera="folder", source=tmp_path, fps=500)
    counts, said = [], []
    run_cameras(settings, [spec], stop=threading.Event(), say=said.append, counts=counts)
    assert (counts[0].state, counts[0].sent, counts[0].refused) == ("failed", len(images) - 1, 2)
    assert "04.jpg" in said[0] or "beyond.jpg" in said[0]
    assert [record.value for record in frames_in_kafka(settings)] == images[:4] + images[5:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_broker_makes_a_live_camera_drop_and_come_back(settings, stack, monkeypatch):
    """Little fits into the buffer, so a pause of the broker must cost frames, and be counted."""
    monkeypatch.setattr("cluster.feeds.BUFFER_FRAMES", 5)
    monkeypatch.setattr("cluster.camera.IN_FLIGHT", 5)
    ensure_topics(settings)
    image = bytes(cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpCamera) as server:
        server.images = [image] * 400
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Address(f"http://127.0.0.1:{server.server_address[1]}/video")
        with running(settings, CameraSpec(camera="http", source=source)) as (counts, _):
            wait_until(lambda: counts[0].sent >= 5, 30, "frames")
            stack.pause("kafka")
            try:
                wait_until(lambda: counts[0].dropped >= 5, 30, "dropped frames")
                held = counts[0].sent
            finally:
                stack.resume("kafka")
            wait_until(lambda: counts[0].sent >= held + 10, 30, "frames after the pause")
        server.shutdown()
    assert len(frames_in_kafka(settings)) == counts[0].sent
