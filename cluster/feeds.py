"""Cameras that run: from their sources into Kafka, one apart from the other.

Delivery: a file or folder waits for the broker, a minute for each frame, and then ends as failed;
what it sent is counted. A live camera cannot wait: at most BUFFER_FRAMES frames or BUFFER_BYTES
bytes of it are kept; beyond that its oldest unsent frame is dropped and counted. A lost camera is
tried again with a growing, jittered pause, for ever; so is a broker that is away, and at the last
pause one that refuses us, for live cameras.
A frame that is refused is left out and counted. Each camera has a thread and a producer of its
own, so none waits for another's trouble.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.camera import OutgoingFrame, SentFrame, folder_frames, stream, too_large
from cluster.sources import (
    Address,
    CameraLost,
    Source,
    holds_password,
    live_pictures,
    parse_source,
    video_pictures,
    video_rate,
)
from infra.errors import AuthFailed, DataError, DpdlError, ServiceUnavailable
from infra.messages import check_camera
from infra.settings import Settings, no_yaml, require_private

BUFFER_FRAMES = 256
BUFFER_BYTES = 64 * 2**20
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 15.0
REFUSED_SAID_S = 60.0
"""At most one line in so long for a camera's frames that are refused: it may be each of them."""
STEADY_S = 10.0
"""A camera that gave frames for so long starts with the first pause again."""
FOLDER_FPS = 5.0

Say = Callable[[str], None]
State = Literal["starting", "live", "lost", "ended", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraSpec:
    """One camera to run."""

    camera: str
    source: Source
    fps: float | None = None
    """At most so many frames per second; None: as they come (folders: FOLDER_FPS; snapshots:
    SNAPSHOT_FPS)."""


@dataclass(slots=True)
class CameraCount:
    """What became of a camera's frames so far."""

    camera: str
    sent: int = 0
    """Acknowledged by the broker."""
    dropped: int = 0
    """Of a live camera, while the broker was slow or away."""
    refused: int = 0
    """Larger than a frame may be or than the topic takes, or of a time that it does not take."""
    losses: int = 0
    """How often the camera was lost."""
    state: State = "starting"
    why: str = ""
    """Of "lost" and "failed"."""


class Buffer:
    """A live camera's unsent frames: when it is full the oldest goes. One reader, one writer."""

    def __init__(self, count: CameraCount, *, frames: int, size: int) -> None:
        self._count, self._max_frames, self._max_bytes = count, frames, size
        self._frames: deque[OutgoingFrame] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def put(self, frame: OutgoingFrame) -> None:
        with self._changed:
            if self._closed:
                return
            self._frames.append(frame)
            self._bytes += len(frame.image)
            while len(self._frames) > self._max_frames or self._bytes > self._max_bytes:
                self._bytes -= len(self._frames.popleft().image)
                self._count.dropped += 1
            self._changed.notify()

    def close(self) -> None:
        """No more comes; what is in it can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drop(self) -> None:
        """No more comes, and what is in it is counted as dropped."""
        self.close()
        with self._changed:
            self._count.dropped += len(self._frames)
            self._frames.clear()

    def __iter__(self) -> Iterator[OutgoingFrame]:
        """Frames as they come, until closed and empty."""
        while True:
            with self._changed:
                while not self._frames and not self._closed:
                    self._changed.wait()
                if not self._frames:
                    return
                frame = self._frames.popleft()
                self._bytes -= len(frame.image)
            yield frame


class Refusals:
    """Counts a camera's frames that are refused, and names one now and then."""

    def __init__(self, count: CameraCount, say: Say) -> None:
        self._count, self._say = count, say
        self._quiet_until = 0.0

    def __call__(self, frame: OutgoingFrame, why: str) -> None:
        self._count.refused += 1
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + REFUSED_SAID_S
            self._say(f"{frame.camera}: {why}. Left out, {self._count.refused} so far")


def pause_s(attempt: int, *, jitter: float) -> float:
    """Before try number `attempt` (from 0); jitter in [0, 1] spreads cameras lost together."""
    return float(min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 20)) * (0.5 + 0.5 * jitter))


def run_cameras(
    settings: Settings,
    specs: Sequence[CameraSpec],
    *,
    stop: threading.Event,
    say: Say,
    counts: list[CameraCount],
) -> None:
    """Run all cameras until Ctrl-C or `stop`, or until every file and folder has been sent.

    `counts` gets one entry per camera at once and is kept up to date. What ends one camera for
    good is said, stands in its count, and ends no other.
    """
    counts.extend(CameraCount(spec.camera) for spec in specs)
    threads = [
        threading.Thread(
            target=_run, args=(settings, spec, count, stop, say), name=f"camera {spec.camera}"
        )
        for spec, count in zip(specs, counts, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        _join(threads)
    except KeyboardInterrupt:
        stop.set()
        _join(threads)


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # an untimed join would keep Ctrl-C from the main thread


def _run(
    settings: Settings, spec: CameraSpec, count: CameraCount, stop: threading.Event, say: Say
) -> None:
    refused = Refusals(count, say)
    try:
        if isinstance(spec.source, Address):
            _run_live(settings, spec, spec.source, count, stop, say, refused)
        else:
            _run_file(settings, spec, spec.source, count, stop, refused)
            if count.refused:
                raise DataError(f"{count.refused} of its frames were refused")
        count.state = "ended"
    except Exception as error:  # a thread that dies unsaid would leave its camera "live" for ever
        count.state, count.why = "failed", _said(error)
        say(f"{spec.camera}: {count.why}")


def _said(error: Exception) -> str:
    expected = isinstance(error, (DpdlError, CameraLost, OSError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _run_file(
    settings: Settings,
    spec: CameraSpec,
    path: Path,
    count: CameraCount,
    stop: threading.Event,
    refused: Refusals,
) -> None:
    if path.is_dir():
        frames, rate = folder_frames(path, spec.camera), FOLDER_FPS
    else:
        frames, rate = _video_frames(path, spec.camera), video_rate(path)
    count.state = "live"
    stream(
        settings,
        frames,
        frames_per_second=spec.fps or rate,
        stop=stop,
        on_sent=lambda sent: _sent(count, sent),
        on_refused=refused,
    )


def _video_frames(path: Path, camera: str) -> Iterator[OutgoingFrame]:
    for number, picture in enumerate(video_pictures(path)):
        yield OutgoingFrame(camera, picture.jpeg(), f"{path.name}#{number}")


def _run_live(
    settings: Settings,
    spec: CameraSpec,
    address: Address,
    count: CameraCount,
    stop: threading.Event,
    say: Say,
    refused: Refusals,
) -> None:
    buffer = Buffer(count, frames=BUFFER_FRAMES, size=BUFFER_BYTES)
    # The camera's own: a reader that outlived it would show what has failed as live.
    over = threading.Event()
    # A read may take READ_S; what is in the buffer is not to wait for it.
    threading.Thread(target=_close_at, args=(stop, buffer), daemon=True).start()
    threading.Thread(
        target=_read_live,
        args=(spec, address, buffer, count, over, say, refused),
        name=f"read {spec.camera}",
        daemon=True,  # FFmpeg may sit in a read for READ_S; the end of the command does not wait
    ).start()
    try:
        _send_live(settings, spec, buffer, count, stop, say, refused)
    finally:
        over.set()
        buffer.drop()


def _send_live(
    settings: Settings,
    spec: CameraSpec,
    buffer: Buffer,
    count: CameraCount,
    stop: threading.Event,
    say: Say,
    refused: Refusals,
) -> None:
    attempt = 0
    while True:
        before = count.sent
        try:
            stream(
                settings,
                buffer,
                frames_per_second=None,
                stop=threading.Event(),  # the buffer ends it: what was read is still sent
                on_sent=lambda sent: _sent(count, sent),
                on_refused=refused,
                on_lost=lambda number: _dropped(count, number),
            )
            return
        except (ServiceUnavailable, AuthFailed) as error:
            attempt = 0 if count.sent > before else attempt + 1
            pause = pause_s(attempt, jitter=random.random())
            if isinstance(error, AuthFailed):  # only a person can change it
                pause = LAST_PAUSE_S
            say(f"{spec.camera}: {error}; frames wait, the oldest are dropped")
            if stop.wait(pause):
                return


def _read_live(
    spec: CameraSpec,
    address: Address,
    buffer: Buffer,
    count: CameraCount,
    over: threading.Event,
    say: Say,
    refused: Refusals,
) -> None:
    attempt = 0
    while not over.is_set():
        started = time.monotonic()
        try:
            _read_until_lost(spec, address, buffer, count, over, say, refused)
            break
        except Exception as lost:  # a picture that cannot be encoded is no reason to stay blind
            if over.is_set():
                break
            attempt = 0 if time.monotonic() - started > STEADY_S else attempt + 1
            pause = pause_s(attempt, jitter=random.random())
            count.losses += count.state == "live"
            count.state, count.why = "lost", _said(lost)
            say(f"{spec.camera}: {address.shown}: {count.why}; trying again in {pause:.1f} s")
            over.wait(pause)


def _close_at(stop: threading.Event, buffer: Buffer) -> None:
    stop.wait()
    buffer.close()


def _read_until_lost(
    spec: CameraSpec,
    address: Address,
    buffer: Buffer,
    count: CameraCount,
    over: threading.Event,
    say: Say,
    refused: Refusals,
) -> None:
    due = 0.0
    for picture in live_pictures(address, over, spec.fps):
        if count.state != "live" and not over.is_set():
            count.state, count.why = "live", ""
            say(f"{spec.camera}: {address.shown}: live")
        now = time.monotonic()
        if spec.fps is not None:
            if now < due:
                continue
            due = max(due, now - 1 / spec.fps) + 1 / spec.fps
        frame = OutgoingFrame(spec.camera, picture.jpeg(), address.shown, picture.captured_at_ns)
        why = too_large(frame)
        if why is None:
            buffer.put(frame)
        else:
            refused(frame, why)  # here: one alone may be larger than the buffer


def _sent(count: CameraCount, sent: SentFrame) -> None:
    count.sent += 1


def _dropped(count: CameraCount, number: int) -> None:
    count.dropped += number


# -- many cameras from one file ---------------------------------------------------------------


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    source: str
    """As parse_source() takes it."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None


class _Cameras(BaseModel):
    model_config = ConfigDict(extra="forbid")

    cameras: Annotated[list[_Entry], Field(min_length=1)]


def load_cameras(path: Path) -> list[CameraSpec]:
    """Cameras of a YAML file (docs/cameras.md).

    Errors, in one line: DataError for what is wrong in it; SettingsError where an address in it
    holds a password and others may read it.
    """
    try:
        entries = _Cameras.model_validate(yaml.safe_load(path.read_text())).cameras
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: {no_yaml(error)}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}") from None
    if any(holds_password(entry.source) for entry in entries):
        require_private(path)
    specs = []
    for entry in entries:
        try:
            check_camera(entry.id)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        specs.append(CameraSpec(camera=entry.id, source=parse_source(entry.source), fps=entry.fps))
    twice = {spec.camera for spec in specs if sum(s.camera == spec.camera for s in specs) > 1}
    if twice:
        raise DataError(f"{path}: {sorted(twice)[0]} stands there more than once")
    return specs
