"""The cameras of a fault run, as a process of their own: frames at a steady rate, and their log.

    python tests/faults/frames.py LOG PREFIX NUM_FRAMES FRAMES_PER_SECOND

A line of LOG is one record that Kafka has acknowledged: camera, captured-at, "good" or "bad".
captured-at is unique and rises, so it names a frame from here to Redis and to the dead letters by
nothing that the stream counts itself. SIGTERM ends the stream early, in good order.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from infra.kafka_client import make_producer
from infra.messages import frame_headers
from infra.settings import load_settings

NUM_CAMERAS = 8
BAD_EVERY = 25
DEFECT_EVERY = 10
IN_FLIGHT = 1000


def picture(rng: np.random.Generator, *, defect: bool, side: int = 80) -> NDArray[np.uint8]:
    pixels = (120 + 15 * rng.standard_normal((side, side, 3))).clip(0, 255).astype(np.uint8)
    if defect:
        x, y = rng.integers(10, side - 30, 2)
        pixels[y : y + 20, x : x + 20] = 255
    return pixels


def jpeg(rng: np.random.Generator, *, defect: bool = False) -> bytes:
    pixels = picture(rng, defect=defect)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def send(log: TextIO, prefix: str, num_frames: int, fps: float, stop: threading.Event) -> None:
    settings = load_settings()
    rng = np.random.default_rng(7)
    good, odd = ([jpeg(rng, defect=defect) for _ in range(64)] for defect in (False, True))
    producer = make_producer(settings)
    waiting: deque[tuple[str, Any]] = deque()

    def settle(down_to: int) -> None:
        while waiting and (len(waiting) > down_to or waiting[0][1].is_done):
            line, future = waiting.popleft()
            future.get(timeout=120)
            log.write(line)
            log.flush()

    due, captured_ns = time.monotonic(), 0
    for i in range(num_frames):
        if stop.wait(max(0.0, due - time.monotonic())):
            break
        due = max(due + 1 / fps, time.monotonic() - 1)
        value, kind = (odd if i % DEFECT_EVERY == 0 else good)[i % 64], "good"
        if i % BAD_EVERY == BAD_EVERY - 1:
            value, kind = value[: len(value) // 3], "bad"
        number = i % NUM_CAMERAS
        camera = f"{prefix}-{number}"
        captured_ns = max(captured_ns + 1, time.time_ns())
        future = producer.send(
            settings.kafka.topic,
            key=camera.encode(),
            value=value,
            headers=frame_headers(captured_ns, "image/jpeg"),
            # By hand, so that every partition has some cameras.
            partition=number % settings.kafka.partitions,
        )
        waiting.append((f"{camera} {captured_ns} {kind}\n", future))
        settle(IN_FLIGHT)
    settle(0)
    producer.close(timeout=5)


if __name__ == "__main__":
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    with Path(sys.argv[1]).open("w") as file:
        send(file, sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), ending)
