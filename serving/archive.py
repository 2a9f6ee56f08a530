"""Evidence: for each anomaly the frame, byte for byte, and its heat map, in S3.

Kept before the result is published, so that an alert has its picture when it appears. Keys are
made of the frame id and its time of capture alone: keeping twice changes nothing.

When S3 is away, scoring goes on. What is owed is noted in Redis (frame id, key and small heat map)
before the result is published, and paid later: the frame itself is read again from Kafka by its
id. Chosen over a spool on local disk because Kafka has the bytes anyhow, replicated and bounded by
its retention, and because a note in Redis survives the loss of this machine. When S3 is slow, what
it is still writing is noted too, for as long as that takes, and no batch waits for it.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from kafka import KafkaConsumer, TopicPartition
from numpy.typing import NDArray

from infra import s3_client
from infra.errors import BadFrame, DpdlError, NotFound, ServiceUnavailable
from infra.kafka_client import kafka_errors, make_consumer
from infra.messages import FrameRecord
from infra.redis_connection import make_redis, redis_errors
from infra.s3_client import make_minio, s3_errors
from infra.settings import Settings

log = logging.getLogger("dpdl.evidence")

FRAME, HEAT = "frame", "heat.png"
HEAT_SIDE = 256
"""Pixels of the overlay; it is stretched over the frame where it is shown."""
SHOW_S = 5.0
"""Longest that a person's page waits for a picture."""
PATIENCE_S = 2.0
"""Longest that a batch's results wait for its evidence to be taken. Where that was too short, the
next batches do not wait at all, until one is taken in time."""
BREATHER_S = 5.0
"""After a failure S3 is left alone for so long: alerts must not wait for its timeouts."""
MAX_DEBTS = 10_000
"""Notes kept while S3 is away; about 4 KB each. Beyond, new alerts stay without a picture: that is
counted, and the rule EvidenceLost fires."""
PAY_AT_ONCE = 16
REREAD_MS = 5000

_SETTLE = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 and ARGV[2] == '1' then
  redis.call('INCR', KEYS[2])
end
"""

Put = Callable[[str, bytes, str], None]
"""(key, data, content type) into the evidence bucket; ServiceUnavailable when S3 is away."""


def image_type(data: bytes) -> str:
    """The content type that the first bytes show; never what a sender claims."""
    for magic, kind in (
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"GIF8", "image/gif"),
        (b"BM", "image/bmp"),
    ):
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


def upsample_map(heat: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(h,w) -> (side,side), bilinear between the centres of pixels.

    The same as torch's interpolate with align_corners=False, without torch in this process.
    """
    big = cv2.resize(heat.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    return big  # type: ignore[return-value]


def heat_png(heat: NDArray[np.float32], side: int = HEAT_SIDE) -> bytes:
    """(h,w) low-resolution map -> RGBA PNG overlay, hottest spot opaque, coldest clear.

    Scaled to the map's own range: it shows where, the score says how much.
    """
    big = upsample_map(heat, side)
    low, high = float(big.min()), float(big.max())
    unit = (big - low) / (high - low) if high > low else np.zeros_like(big)
    level = (unit * 255).round().astype(np.uint8)
    rgba = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2BGRA)
    rgba[..., 3] = level
    return bytes(cv2.imencode(".png", rgba, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1])


class Archive:
    """Keeps evidence now, or notes what is owed and pays it when S3 is back.

    Args:
        put: writes one object.
        reread: (frame id, its time of capture) -> the image, out of Kafka again; None when
            retention has removed it.
        debts: the durable notes.
        at_end: ends `reread`, in the thread that uses it.
    """

    def __init__(
        self,
        put: Put,
        reread: Callable[[str, int | None], bytes | None],
        debts: Debts,
        *,
        at_end: Callable[[], None] = lambda: None,
        threads: int = 4,
    ) -> None:
        self._put, self._reread, self._debts, self._at_end = put, reread, debts, at_end
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="evidence")
        self._rest_until = 0.0
        self._slow = False
        self._running: dict[Future[bool], str] = {}
        """Tries of an earlier batch that S3 had not answered when its results went on -> frame."""
        self._closing = threading.Event()
        self._payer = threading.Thread(target=self._pay_all_along, name="owed", daemon=True)
        self._payer.start()

    def keep(self, frames: Sequence[FrameRecord], maps: Sequence[NDArray[np.float32]]) -> list[str]:
        """The evidence keys, when each is in S3 or noted as owed. Raises only for Redis."""
        owed = list(zip(frames, maps, strict=True))
        began_s, late = time.monotonic(), dict[Future[bool], str]()
        # The pool's queue has no bound, and each try holds its image until it is over: while some
        # are, nothing more is given to them.
        if began_s >= self._rest_until and all(t.done() for t in self._running):
            tries = [self._pool.submit(self._try, frame, heat) for frame, heat in owed]
            wait(tries, timeout=0.0 if self._slow else PATIENCE_S)
            late = {
                t: pair[0].frame_id for t, pair in zip(tries, owed, strict=True) if not t.done()
            }
            failed = [t for t in tries if t not in late and not t.result()]
            owed = [o for o, t in zip(owed, tries, strict=True) if t in late or t in failed]
            self._running = late
            if failed:
                self._rest()
            elif late and not self._slow:
                log.warning("S3 is slow: alerts do not wait for their evidence")
            elif not late:
                self._works()
            self._slow = self._slow or bool(late)
        for frame, heat in owed:
            self._debts.note(frame, heat)
        for each, frame_id in late.items():  # once it is noted
            each.add_done_callback(partial(self._landed, frame_id, began_s))
        return [frame.evidence_key for frame in frames]

    def _landed(self, frame_id: str, began_s: float, late: Future[bool]) -> None:
        """A try that its batch's results did not wait for is over; the last one says how S3 is."""
        if late.cancelled():
            return
        was_slow, self._slow = self._slow, time.monotonic() - began_s > PATIENCE_S
        if not late.result():
            self._rest()
            return
        self._works()
        if was_slow and not self._slow:
            log.warning("S3 is quick again")
        try:
            self._debts.settle(frame_id, paid=True)
        except DpdlError as error:
            log.info("the evidence of %s is written once more: %s", frame_id, error)

    def close(self) -> None:
        self._closing.set()
        self._payer.join(timeout=1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, frame: FrameRecord, heat: NDArray[np.float32]) -> bool:
        try:
            self._store(frame.evidence_key, frame.image, heat)
        except DpdlError as error:
            log.debug("evidence of %s: %s", frame.frame_id, error)
            return False
        return True

    def _rest(self) -> None:
        if not self._rest_until:
            log.warning("S3 does not take evidence: it is owed until it does")
        self._rest_until = time.monotonic() + BREATHER_S

    def _works(self) -> None:
        if self._rest_until:
            log.warning("S3 takes evidence again")
        self._rest_until = 0.0

    def _store(self, key: str, image: bytes, heat: NDArray[np.float32]) -> None:
        self._put(f"{key}/{HEAT}", heat_png(heat), "image/png")
        self._put(f"{key}/{FRAME}", image, image_type(image))

    def _pay_all_along(self) -> None:
        while not self._closing.wait(BREATHER_S):
            try:
                while not self._closing.is_set() and self.pay():
                    pass
            except DpdlError as error:
                log.info("owed evidence has to wait: %s", error)
            except Exception:  # one odd note must not end the paying of all others
                log.exception("paying owed evidence")
        self._at_end()

    def pay(self) -> int:
        """Pays some of what is owed; how many. DpdlError when S3, Kafka or Redis is away."""
        if time.monotonic() < self._rest_until:
            return 0
        under_way = {frame_id for t, frame_id in self._running.items() if not t.done()}
        notes = [n for n in self._debts.some(PAY_AT_ONCE) if n.frame_id not in under_way]
        for owed in notes:
            image = self._reread(owed.frame_id, owed.captured_at_ns)
            if image is None:
                log.warning(
                    "%s was no longer in Kafka when S3 came back: no evidence of it", owed.frame_id
                )
            else:
                self._store(owed.key, image, owed.heat)
                if time.monotonic() >= self._rest_until:  # one that is too slow for keep() rests on
                    self._works()
            self._debts.settle(owed.frame_id, paid=image is not None)
        if notes:
            log.info("owed evidence of %d alerts paid", len(notes))
        return len(notes)


class Owed(NamedTuple):
    frame_id: str
    key: str
    """Where its evidence is to lie."""
    heat: NDArray[np.float32]

    @property
    def captured_at_ns(self) -> int | None:
        """None: noted before keys had a time."""
        time_ns = self.key.rpartition("/")[2].partition("-")[2]
        return int(time_ns) if time_ns else None


class Debts:
    """Evidence that S3 has not got yet: a Redis hash, frame id -> key and heat map; and how much it
    will never get.

    Every method can raise infra's ServiceUnavailable.
    """

    def __init__(self, settings: Settings) -> None:
        self._where = settings.redis
        self._redis = make_redis(settings)
        self._key = f"{settings.redis.prefix}:evidence-owed:{settings.kafka.group}"
        self._lost_key = f"{settings.redis.prefix}:evidence-lost:{settings.kafka.group}"
        self._settle = self._redis.register_script(_SETTLE)
        self._full = False

    def note(self, frame: FrameRecord, heat: NDArray[np.float32]) -> None:
        """Beyond MAX_DEBTS nothing is noted: that alert stays without a picture."""
        was_full, self._full = self._full, len(self) >= MAX_DEBTS
        if self._full:
            if not was_full:
                log.error(
                    "evidence of %d alerts is owed: alerts from %s on stay without a picture until "
                    "S3 takes what is written. See its log, its disk and the rights of its key",
                    MAX_DEBTS, frame.frame_id,
                )  # fmt: skip
            with redis_errors(self._where):
                self._redis.incr(self._lost_key)
            return
        small = np.ascontiguousarray(heat, dtype=np.float16)
        packed = {
            "key": frame.evidence_key,
            "shape": small.shape,
            "heat": base64.b64encode(small.tobytes()).decode(),
        }
        with redis_errors(self._where):
            self._redis.hset(self._key, frame.frame_id, json.dumps(packed))

    def some(self, count: int) -> list[Owed]:
        """Up to `count` notes, drawn at random. One that cannot be read is removed, and is lost.

        HSCAN from its beginning finds nothing in the buckets that were emptied last.
        """
        with redis_errors(self._where):
            drawn = self._redis.hrandfield(self._key, count, withvalues=True)
        notes = []
        for frame_id, note in _drawn(drawn):
            try:
                notes.append(_unpacked(frame_id, note))
            except (ValueError, KeyError, TypeError) as error:
                log.error(
                    "what is noted in %s of the evidence of %s cannot be read (%r): it gets none",
                    self._key, frame_id, error,
                )  # fmt: skip
                self.settle(frame_id, paid=False)
        return notes

    def settle(self, frame_id: str, *, paid: bool) -> None:
        """paid: False for what is given up: it counts as lost, once, whoever else gives it up."""
        with redis_errors(self._where):
            self._settle(keys=[self._key, self._lost_key], args=[frame_id, int(not paid)])

    def lost(self) -> int:
        """Alerts that stay without a picture, ever."""
        with redis_errors(self._where):
            return int(cast("str | None", self._redis.get(self._lost_key)) or 0)

    def __len__(self) -> int:
        with redis_errors(self._where):
            return int(self._redis.hlen(self._key))


def _drawn(reply: Any) -> list[tuple[str, str]]:
    """HRANDFIELD WITHVALUES answers one flat list under RESP2, and pairs under RESP3."""
    if reply and isinstance(reply[0], list):
        return [(field, value) for field, value in reply]
    return list(zip(reply[::2], reply[1::2], strict=True)) if reply else []


def _unpacked(frame_id: str, note: str) -> Owed:
    packed = json.loads(note)
    flat = np.frombuffer(base64.b64decode(packed["heat"]), np.float16)
    height, width = packed["shape"]
    heat = flat.reshape(height, width).astype(np.float32)
    topic, partition, offset = frame_id.rsplit("/", 2)
    # Noted before keys had a time: its alert has the key of then.
    key = packed.get("key", f"{topic}/{int(partition):05d}/{int(offset):020d}")
    return Owed(frame_id, str(key), heat)


class EvidenceBucket:
    """Objects of the evidence bucket; a type is told by the bytes when they are read.

    Args:
        hurried: somebody waits for it: SHOW_S and one try, then S3 is away.
    """

    def __init__(self, settings: Settings, *, hurried: bool = False) -> None:
        patience: dict[str, Any] = {"read_timeout_s": SHOW_S, "tries": 1} if hurried else {}
        self._s3, self._client = settings.s3, make_minio(settings, **patience)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        with s3_errors(self._s3):
            self._client.put_object(
                self._s3.evidence_bucket,
                key,
                io.BytesIO(data),
                len(data),
                content_type=content_type,
            )

    def get(self, key: str) -> bytes | None:
        """None where there is no such object."""
        try:
            with s3_errors(self._s3):
                return s3_client.get(self._client, self._s3.evidence_bucket, key)[0]
        except NotFound:
            return None


class Reread:
    """Frames by their id, out of Kafka again. One thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: KafkaConsumer | None = None

    def __call__(self, frame_id: str, captured_at_ns: int | None) -> bytes | None:
        """The image's bytes; None when retention has removed them, or they never were there.

        So too where another frame has the id by now, which a topic made anew gives it: one that
        was captured at another time. With None for the time, whichever frame has the id.
        """
        topic, partition, offset = frame_id.rsplit("/", 2)
        place, wanted = TopicPartition(topic, int(partition)), int(offset)
        with kafka_errors(self._settings.kafka):
            if self._consumer is None:
                self._consumer = make_consumer(self._settings)
            if place.partition not in (self._consumer.partitions_for_topic(topic) or ()):
                return None
            begin = self._consumer.beginning_offsets([place])[place]
            if not begin <= wanted < self._consumer.end_offsets([place])[place]:
                return None
            self._consumer.assign([place])
            self._consumer.seek(place, wanted)
            got = self._consumer.poll(timeout_ms=REREAD_MS, max_records=1)
        records = got.get(place, [])
        if not records:
            raise ServiceUnavailable(f"Kafka did not give {frame_id} within {REREAD_MS} ms")
        try:
            frame = FrameRecord.from_kafka(records[0])
        except BadFrame:  # nor was it ever scored
            return None
        is_it = frame.offset == wanted and captured_at_ns in (None, frame.captured_at_ns)
        return frame.image if is_it else None

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close(timeout_ms=1000)


def open_archive(settings: Settings) -> Archive:
    """Errors: AuthFailed, ServiceUnavailable, SettingsError."""
    reread = Reread(settings)
    return Archive(EvidenceBucket(settings).put, reread, Debts(settings), at_end=reread.close)
