"""The whole stream against its parts: decode alone, scoring alone, and all of it, in one run.

The same images, the stream's own decoder with its threads, and the scorer's own code on as many
threads as it has. The whole has Kafka, Redis, S3 and Ray Serve on the same cores besides, so the
ratio says what everything around the model costs. Everything is made for it and thrown away: own
services, a model fitted on the images in seconds (what it has learnt changes nothing about its
speed).
"""

from __future__ import annotations

import itertools
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

from cluster.accounting import take_account, wait_until_scored
from cluster.camera import OutgoingFrame, folder_frames, stream
from cluster.stack import open_stack, own_state_folder
from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.drift import Drift
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, decode_image
from dpdl_core.model import Dpdl
from infra.kafka_client import end_offsets, ensure_topics
from infra.messages import KafkaRecord
from infra.model_store import ModelStore
from infra.s3_client import ensure_buckets
from infra.settings import Settings, load_settings
from serving import app as stream_app
from serving.batch import Plan, Polled
from serving.decode import Decoder
from serving.score import cpu_threads, score_batch
from serving.versions import InUse

MODEL = "bench"
DISTINCT = 64
"""Different images; they are sent again and again."""
CAMERAS = 8
WARM_FRAMES = 128
STALL_S = 120.0


@dataclass(frozen=True, kw_only=True)
class BenchStreamOptions:
    frames: int = 1000
    """Streamed and counted; scoring and decode alone take as many."""
    data: Path | None = None
    """A folder of images; None: made-up JPEGs of 640 x 512."""


def bench_stream(options: BenchStreamOptions, console: Console) -> dict[str, Any]:
    """Run it; the report's rates are in frames per second. Errors: DpdlError."""
    images = _images(options.data)
    with own_state_folder("bench") as settings, open_stack(settings):
        settings = load_settings()  # now with the services' addresses and keys
        model = _model(images)
        thresholds = {"default": 1e9, "cameras": {}, "false_alarm_rate": 0.01}
        files = artifact.pack(model, thresholds=thresholds, metrics={})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(cpu_threads())
        console.print("decode alone", style="dim")
        decode_fps = _decode_alone(settings, images, options.frames, model.config.image_size)
        console.print("scoring alone", style="dim")
        score_fps = _score_alone(settings, files, images, options.frames, device)
        console.print("the whole stream", style="dim")
        stream_fps, account = _stream(settings, files, images, options.frames)
    slower = min(decode_fps, score_fps)
    return {
        "decode_fps": decode_fps,
        "score_fps": score_fps,
        "stream_fps": stream_fps,
        "ratio": stream_fps / slower,
        "frames": options.frames,
        **account,
        "image_bytes": round(float(np.mean([len(image) for image in images]))),
        "settings": asdict(model.config) | {"stream": settings.stream.model_dump()},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "scorer_threads": cpu_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _images(folder: Path | None) -> list[bytes]:
    if folder is not None:
        return [frame.image for frame in itertools.islice(folder_frames(folder, "bench"), DISTINCT)]
    rng = np.random.default_rng(0)
    made = []
    for _ in range(DISTINCT):
        coarse = rng.integers(60, 190, (16, 20, 3), dtype=np.uint8)
        fine = rng.normal(0, 6, (512, 640, 1))
        pixels = cv2.resize(coarse, (640, 512), interpolation=cv2.INTER_CUBIC) + fine
        made.append(bytes(cv2.imencode(".jpg", pixels.clip(0, 255).astype(np.uint8))[1]))
    return made


def _model(images: Sequence[bytes]) -> Dpdl:
    config = replace(recipe("edge"), weights="random", head_iterations=1, folds=2, pseudo_normals=8)
    pixels = np.stack([decode_image(image, config.image_size) for image in images])
    return fit(config, ArraySource(pixels), pixels[:2], seed=0)


def _decode_alone(settings: Settings, images: Sequence[bytes], count: int, size: int) -> float:
    """Frames per second of the stream's own decoder, in batches as the stream has them."""
    decoder, plan = Decoder(settings.stream.decode_threads), Plan(size)
    most = settings.stream.max_batch
    records: list[KafkaRecord] = [_Record(images[i % len(images)], i) for i in range(count)]
    batches = [Polled(list(records[i : i + most]), []) for i in range(0, count, most)]
    try:
        decoder(batches[0], plan)
        began = time.perf_counter()
        for batch in batches:
            decoder(batch, plan)
        return count / (time.perf_counter() - began)
    finally:
        decoder.close()


@dataclass(frozen=True, slots=True)
class _Record:
    """As Kafka would give it."""

    value: bytes
    offset: int
    topic: str = "bench"
    partition: int = 0
    timestamp: int = 0
    key: bytes = b"camera"
    headers: tuple[tuple[str, bytes], ...] = ()


def _score_alone(
    settings: Settings, files: dict[str, bytes], images: Sequence[bytes], count: int, device: str
) -> float:
    """Frames per second of what the scorer does with a call, called without Ray."""
    loaded = artifact.unpack(files, device=device)
    held = InUse("bench-1", loaded, time.time(), Drift(None))
    size, most = loaded.model.config.image_size, settings.stream.max_batch
    pixels = np.stack([decode_image(image, size) for image in images])

    def score(first: int) -> None:
        rows = np.arange(first, min(first + most, count)) % len(pixels)
        score_batch(held, MODEL, pixels[rows], ["camera"] * len(rows), {}, device)

    with torch.inference_mode():
        score(0)
        began = time.perf_counter()
        for first in range(0, count, most):
            score(first)
        return count / (time.perf_counter() - began)


def _stream(
    settings: Settings, files: dict[str, bytes], images: Sequence[bytes], count: int
) -> tuple[float, dict[str, int]]:
    """Frames per second from the first frame sent to the last published, all sent at once."""
    ensure_topics(settings)
    ensure_buckets(settings)
    store = ModelStore(settings)
    store.put_version(MODEL, "bench-1", files, {"kind": "train", "parent": None, "line": []})
    store.move_pointer(MODEL, "bench-1", None, by="bench", why="measured")
    import ray

    try:
        stream_app.deploy(settings, model_name=MODEL, say=lambda _: None)
        _send(settings, images, WARM_FRAMES)
        wait_until_scored(settings, end_offsets(settings, settings.kafka.topic), stall_s=STALL_S)
        start = end_offsets(settings, settings.kafka.topic)
        began = time.perf_counter()
        _send(settings, images, count)
        wait_until_scored(settings, end_offsets(settings, settings.kafka.topic), stall_s=STALL_S)
        seconds = time.perf_counter() - began
        account = take_account(settings, start)
        return count / seconds, {"lost": account.lost, "duplicated": account.duplicated}
    finally:
        if ray.is_initialized():
            stream_app.shutdown()
            ray.shutdown()


def _send(settings: Settings, images: Sequence[bytes], count: int) -> None:
    frames = (
        OutgoingFrame(f"camera-{i % CAMERAS}", images[i % len(images)], "") for i in range(count)
    )
    stream(
        settings,
        frames,
        frames_per_second=None,
        stop=threading.Event(),
        on_sent=lambda _: None,
    )
