"""Results in Redis, exactly once.

The guarantee: results, alerts, per-camera state, dead-letter counts and the partition's next
offset change together in one script (publish.lua), which refuses a batch that does not begin at
the stored next offset. So a crash, a replay, a retry or a consumer that has lost its partition
changes nothing that is already there, and alerts nobody twice.

After *any* error from publish() the caller does not know whether the batch is in: it asks
next_offset() and goes on from there. publish() is never retried by the client itself.

Keys, below the prefix (`dpdl`):
    scores:<camera>                      stream, capped: every result
    alerts                               stream, capped: results that alert, FrameResult fields
    camera:<camera>                      hash: counts, rates, last result and alert, debounce,
                                         what a person set
    cameras                              sorted set: camera by time last seen, at most max_cameras
    bindings                             hash: camera -> the model that a person bound it to
    unlisted                             frames of the cameras beyond max_cameras
    dead                                 hash: reason of dead letters -> count
    progress:<group>:<topic>:<partition> the next offset
    progress:<group>:<topic>:id          which topic of that name it is of, as Kafka numbers them
    store-id                             drawn once: tells what is kept here from another's
    answer:<frame>, defect-classes       what people say of frames (answers.py)

Works on Redis 6.2 or newer and Valkey; one primary, no cluster mode. A user of its own needs:
    ACL SETUSER dpdl on >PASSWORD ~dpdl:* \\
        +@read +@write +@scripting +@transaction +@connection
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from infra.cameras import (
    OVERRIDE_FIELDS,
    SMOOTHED_S,
    CameraState,
    ThresholdOverride,
    camera_state,
    threshold_override,
)
from infra.errors import Fenced, ServiceUnavailable
from infra.messages import FrameResult, check_camera
from infra.redis_connection import make_redis, redis_errors
from infra.settings import Settings

MAX_THRESHOLD = 3e38
"""Scores are compared in single precision, where 1e39 is infinite: nothing would ever alert."""
MAX_BLOCK_S = 3.0
"""Longest wait inside Redis; the connection's REPLY_TIMEOUT_S would break a longer one."""
MAX_RESULTS = 2048
"""Per publish(): a script runs alone, and this many take Redis some tens of milliseconds."""
MAX_PAGE = 10_000
MAX_ALERT_N = 100
"""Frames that a debounce rule looks back."""

_TAKE_BACK = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return nil end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('SET', KEYS[2], ARGV[3]) end
return redis.call('GET', KEYS[2])
"""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result as it lies in a stream; `id` orders and pages it."""

    id: str
    result: FrameResult


class ResultStore:
    """All that the product keeps in Redis. Thread-safe, as redis-py's client is.

    Every method can raise AuthFailed, ServiceUnavailable (StoreFull) and DataError.

    Args:
        keep_s: what publish() writes, and what a person sets for a camera, vanishes so long after
            the last write; never without. For results that are kept aside below a prefix of their
            own (serving/replay.py).
    """

    def __init__(self, settings: Settings, *, keep_s: int | None = None) -> None:
        self._where, self._keep_s = settings.redis, keep_s
        self._stream = settings.stream
        self._redis = make_redis(settings)
        # A publish that is sent twice would fence itself: the caller must be told of the first.
        once = make_redis(settings, retries=0)
        script = (files("infra") / "publish.lua").read_text(encoding="utf-8")
        self._publish = once.register_script(script)
        self._take_back = self._redis.register_script(_TAKE_BACK)
        self._once = once

    def close(self) -> None:
        self._redis.close()
        self._once.close()

    # --- the guarantee -------------------------------------------------------------------

    def publish(
        self,
        group: str,
        topic: str,
        partition: int,
        first_offset: int,
        next_offset: int,
        results: Sequence[FrameResult],
        dead: Mapping[str, int] | None = None,
    ) -> int:
        """Store a batch and move the partition's next offset; returns the alerts it raised.

        `first_offset` is the position that the batch was read from (the former next offset),
        not that of its first result: dead letters and gaps lie between. `results` are in offset
        order, so a camera's results keep their order. `dead` counts dead letters by reason.
        An empty batch moves the offset alone, e.g. over records that retention has removed.
        Errors: Fenced when the stored offset is not first_offset; nothing is written then.
        """
        offsets = [result.offset for result in results]
        bounds = [first_offset - 1, *offsets, next_offset]
        here = all(result.frame_id.startswith(f"{topic}/{partition}/") for result in results)
        if not here or not all(a < b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"results must be of {topic}/{partition} and rise within "
                f"[{first_offset}, {next_offset})"
            )
        if len(results) > MAX_RESULTS:
            raise ValueError(f"{len(results)} results in one batch, at most {MAX_RESULTS} wanted")
        keys = [
            self._progress(group, topic, partition),
            self._key("alerts"),
            self._key("cameras"),
            self._key("dead"),
            self._key("unlisted"),
        ]
        arguments = self._arguments(first_offset, next_offset, results, dead or {})
        try:
            with redis_errors(self._where):
                if self._keep_s is None:
                    reply = self._publish(keys=keys, args=arguments)
                else:
                    pipeline = self._once.pipeline(transaction=True)
                    self._publish(keys=keys, args=arguments, client=pipeline)
                    for camera in {result.camera for result in results}:
                        keys += [self._key(f"scores:{camera}"), self._key(f"camera:{camera}")]
                    self._let_vanish(pipeline, keys)
                    reply = pipeline.execute()[0]
        except ServiceUnavailable:
            # After a failover they would stay with the old primary: those that only read, and
            # those to a Redis before 7, whose READONLY in a script redis-py does not know.
            for client in (self._redis, self._once):
                client.connection_pool.disconnect(inuse_connections=False)
            raise
        accepted, number = cast("list[Any]", reply)
        if not accepted:
            raise Fenced(expected=int(number), found=first_offset)
        return int(number)

    def _arguments(
        self,
        first_offset: int,
        next_offset: int,
        results: Sequence[FrameResult],
        dead: Mapping[str, int],
    ) -> list[str | int | float]:
        stream = self._stream
        rows = [result.to_redis() for result in results]
        names = list(rows[0]) if rows else []
        arguments: list[str | int | float] = [
            first_offset,
            next_offset,
            self._where.prefix,
            stream.scores_kept,
            stream.alerts_kept,
            stream.alert_k,
            stream.alert_n,
            SMOOTHED_S,
            stream.max_cameras,
            len(dead),
        ]
        for reason, count in dead.items():
            arguments += [reason, count]
        arguments += [len(names), *names]
        for row in rows:
            arguments += row.values()
        return arguments

    def next_offset(self, group: str, topic: str, partition: int) -> int | None:
        """Where to go on, or None where this group has never published from this partition."""
        with redis_errors(self._where):
            stored = self._redis.get(self._progress(group, topic, partition))
        return None if stored is None else int(cast(str, stored))

    def set_start(self, group: str, topic: str, partition: int, offset: int) -> int:
        """Begin at `offset` unless an offset is stored already; returns the one that holds."""
        key = self._progress(group, topic, partition)
        with redis_errors(self._where):
            self._redis.set(key, offset, nx=True)
            return int(cast(str, self._redis.get(key)))

    def set_topic_id(self, group: str, topic: str, topic_id: str) -> str:
        """Keep which topic the progress is of, unless that is kept already; the one that holds."""
        with redis_errors(self._where):
            self._redis.set(self._progress(group, topic, "id"), topic_id, nx=True)
            return cast(str, self._redis.get(self._progress(group, topic, "id")))

    def take_back(
        self, group: str, topic: str, topic_id: str, partition: int, stored: int, end: int
    ) -> int | None:
        """Move a next offset of `stored` back to `end`; the one that holds then.

        None, and nothing is changed, where the progress is not known to be of this topic.
        """
        keys = [self._progress(group, topic, "id"), self._progress(group, topic, partition)]
        with redis_errors(self._where):
            held = self._take_back(keys=keys, args=[topic_id, stored, end])
        return None if held is None else int(cast(str, held))

    def store_id(self) -> str:
        """8 hexadecimal digits, drawn when first asked for: no other Redis or prefix has them."""
        key = self._key("store-id")
        with redis_errors(self._where):
            self._redis.set(key, secrets.token_hex(4), nx=True)
            return cast(str, self._redis.get(key))

    def next_offsets(
        self, group: str, topic: str, topic_id: str, partitions: Iterable[int]
    ) -> dict[int, int | None]:
        """next_offset() of these partitions; None for all of them where the progress is of another
        topic of this name. topic_id: Kafka's, "" where it says none."""
        wanted = list(partitions)
        keys = [self._progress(group, topic, "id")]
        keys += [self._progress(group, topic, each) for each in wanted]
        with redis_errors(self._where):
            of, *offsets = cast("list[str | None]", self._redis.mget(keys))
        if topic_id and of and of != topic_id:
            return dict.fromkeys(wanted)
        return {p: None if at is None else int(at) for p, at in zip(wanted, offsets, strict=True)}

    def progress(self, group: str, topic: str) -> dict[int, int]:
        """Partition -> next offset, of the partitions that have one."""
        start = self._progress(group, topic, "")
        with redis_errors(self._where):
            keys = [key for key in self._redis.scan_iter(match=_literal(start) + "*", count=1000)]
            keys = [key for key in keys if key[len(start) :].isdigit()]
            values = cast("list[str | None]", self._redis.mget(keys)) if keys else []
        found = {int(k[len(start) :]): v for k, v in zip(keys, values, strict=True)}
        return {partition: int(v) for partition, v in sorted(found.items()) if v is not None}

    # --- reading results -----------------------------------------------------------------

    def alerts(
        self, after_id: str = "0", count: int = 100, *, block_s: float = 0.0
    ) -> list[StoredResult]:
        """Alerts after a stream id, oldest first; waits up to block_s (at most 3) for one.

        To follow: call again with the last id seen.
        """
        block_ms = int(min(block_s, MAX_BLOCK_S) * 1000) or None
        with redis_errors(self._where):
            reply = self._redis.xread(
                {self._key("alerts"): after_id}, count=min(count, MAX_PAGE), block=block_ms
            )
        entries = [entry for _, found in _pairs(reply) for entry in found]
        return _stored(entries)

    def latest_alerts(
        self,
        count: int = 50,
        before_id: str | None = None,
        *,
        from_ms: int | None = None,
        to_ms: int | None = None,
    ) -> list[StoredResult]:
        """A page of alerts, newest first; the next page is before the last id of this one.

        from_ms, to_ms: unix milliseconds, inclusive, of publishing (the stream id's).
        """
        return self._newest("alerts", count, before_id, from_ms, to_ms)

    def scores(
        self,
        camera: str,
        count: int = 100,
        before_id: str | None = None,
        *,
        from_ms: int | None = None,
        to_ms: int | None = None,
    ) -> list[StoredResult]:
        """Results of one camera, newest first, paged like latest_alerts()."""
        return self._newest(f"scores:{camera}", count, before_id, from_ms, to_ms)

    def alert(self, id: str) -> StoredResult | None:
        """One alert by its stream id, None where there is none (any more)."""
        return self._one("alerts", id)

    def score(self, camera: str, id: str) -> StoredResult | None:
        """One result of a camera by its stream id."""
        return self._one(f"scores:{camera}", id)

    def _one(self, stream: str, id: str) -> StoredResult | None:
        with redis_errors(self._where):
            entries = self._redis.xrange(self._key(stream), min=id, max=id, count=1)
        found = _stored(cast("list[tuple[str, dict[str, str]]]", entries))
        return found[0] if found else None

    def scores_after(self, camera: str, after_id: str, count: int) -> list[StoredResult]:
        """Results of one camera after a stream id ("0": from the oldest kept), oldest first."""
        with redis_errors(self._where):
            entries = self._redis.xrange(
                self._key(f"scores:{camera}"), min=f"({after_id}", count=min(count, MAX_PAGE)
            )
        return _stored(cast("list[tuple[str, dict[str, str]]]", entries))

    def _newest(
        self,
        stream: str,
        count: int,
        before_id: str | None,
        from_ms: int | None,
        to_ms: int | None,
    ) -> list[StoredResult]:
        newest = "+" if to_ms is None else str(to_ms)
        if before_id:
            newest = f"({before_id}"  # of a page that began within to_ms
        oldest = "-" if from_ms is None else str(from_ms)
        with redis_errors(self._where):
            entries = self._redis.xrevrange(
                self._key(stream), max=newest, min=oldest, count=min(count, MAX_PAGE)
            )
        return _stored(cast("list[tuple[str, dict[str, str]]]", entries))

    def dead_letters(self) -> dict[str, int]:
        """Reason -> number of dead letters ever."""
        with redis_errors(self._where):
            counts = cast("dict[str, str]", self._redis.hgetall(self._key("dead")))
        return {reason: int(count) for reason, count in sorted(counts.items())}

    # --- cameras -------------------------------------------------------------------------

    def cameras(self) -> list[CameraState]:
        """Every camera ever seen or configured, the latest seen first."""
        with redis_errors(self._where):
            names = cast("list[str]", self._redis.zrange(self._key("cameras"), 0, -1))
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(self._key(f"camera:{name}"))
            hashes = cast("list[dict[str, str]]", pipeline.execute())
        states = [camera_state(name, found) for name, found in zip(names, hashes, strict=True)]
        return sorted(states, key=lambda state: (-(state.last_captured_at_ns or 0), state.camera))

    def camera(self, camera: str) -> CameraState | None:
        """One camera's state, or None for a camera that nobody has seen or configured."""
        with redis_errors(self._where):
            found = cast("dict[str, str]", self._redis.hgetall(self._key(f"camera:{camera}")))
        return camera_state(camera, found) if found else None

    def unlisted_frames(self) -> int:
        """Frames ever of cameras beyond stream.max_cameras: scored, alerted, nothing else kept."""
        with redis_errors(self._where):
            return int(cast("str | None", self._redis.get(self._key("unlisted"))) or 0)

    def set_threshold(self, camera: str, threshold: float | None, *, by: str) -> None:
        """Set a person's threshold for a camera, or take it back with None.

        It is for the model that the camera is bound to by now, and says which version of it scores.
        ValueError for NaN and infinity: no score lies above them, so nothing would ever alert.
        """
        check_threshold(threshold)
        values: dict[str, str | None] = dict.fromkeys(
            ("threshold", "threshold_model", "threshold_version")
        )
        if threshold is not None:
            state = self.camera(camera)
            bound = state.binding.model if state and state.binding else ""
            scored = state and (not bound or state.model == bound)
            values = {
                "threshold": repr(float(threshold)),
                "threshold_model": bound,
                "threshold_version": (state.version or "") if state and scored else "",
            }
        self._set(camera, "threshold", values, by)

    def set_debounce(self, camera: str, rule: tuple[int, int] | None, *, by: str) -> None:
        """Alert at k of a camera's last n frames, or as all cameras do with None."""
        k, n = rule or (1, 1)
        if not 1 <= k <= n <= MAX_ALERT_N:
            raise ValueError(f"{k} of {n}: wanted 1 <= k <= n <= {MAX_ALERT_N}")
        values = (
            {"alert_k": str(k), "alert_n": str(n)} if rule else {"alert_k": None, "alert_n": None}
        )
        self._set(camera, "alert", values, by)

    def bind_model(self, camera: str, model: str | None, *, by: str) -> None:
        """Let another model score a camera's frames, or the default one again with None.

        Consumers see it within a second. Nobody looks here whether the model exists.
        """
        self._set(camera, "bound", {"bound": model}, by)

    def forget(self, cameras: Iterable[str]) -> int:
        """Remove all that is kept of these cameras, results and a person's settings too; how many
        there were. Their alerts, answers and evidence stay. One that sends again is listed anew."""
        forgotten = 0
        with redis_errors(self._where):
            for camera in cameras:
                pipeline = self._redis.pipeline(transaction=True)
                pipeline.zrem(self._key("cameras"), camera)
                pipeline.hdel(self._key("bindings"), camera)
                pipeline.delete(self._key(f"camera:{camera}"), self._key(f"scores:{camera}"))
                forgotten += cast("list[int]", pipeline.execute())[0]
        return forgotten

    def bindings(self) -> dict[str, str]:
        """Camera -> model, of all cameras that are bound to one."""
        with redis_errors(self._where):
            return cast("dict[str, str]", self._redis.hgetall(self._key("bindings")))

    def _set(self, camera: str, what: str, values: Mapping[str, str | None], by: str) -> None:
        """Fields of a camera's hash; None clears. Who and when stay in either case."""
        key = self._key(f"camera:{check_camera(camera)}")
        fields: dict[Any, Any] = {f"{what}_by": by, f"{what}_at": time.time_ns()}
        with redis_errors(self._where):
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.zadd(self._key("cameras"), {camera: 0}, nx=True)
            for name, value in values.items():
                if value is None:
                    pipeline.hdel(key, name)
                else:
                    fields[name] = value
            if what == "bound":
                if values["bound"] is None:
                    pipeline.hdel(self._key("bindings"), camera)
                else:
                    pipeline.hset(self._key("bindings"), camera, values["bound"])
            pipeline.hset(key, mapping=fields)
            self._let_vanish(pipeline, [key, self._key("cameras")])
            pipeline.execute()

    def thresholds(self, cameras: Iterable[str]) -> dict[str, ThresholdOverride]:
        """The overrides that some of these cameras have; one round trip."""
        names = list(dict.fromkeys(cameras))
        with redis_errors(self._where):
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.hmget(self._key(f"camera:{name}"), OVERRIDE_FIELDS)
            rows = pipeline.execute()
        found = {}
        for name, row in zip(names, rows, strict=True):
            fields = {k: v for k, v in zip(OVERRIDE_FIELDS, row, strict=True) if v is not None}
            if override := threshold_override(fields):
                found[name] = override
        return found

    def _let_vanish(self, pipeline: Any, keys: Iterable[str]) -> None:
        for key in keys if self._keep_s is not None else ():
            pipeline.expire(key, self._keep_s)

    # --- keys ----------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._where.prefix}:{name}"

    def _progress(self, group: str, topic: str, partition: int | str) -> str:
        return self._key(f"progress:{group}:{topic}:{partition}")


def check_threshold(threshold: float | None) -> None:
    """ValueError for what set_threshold() does not take."""
    if threshold is not None and not abs(threshold) <= MAX_THRESHOLD:
        raise ValueError(
            f"threshold {threshold}: wanted a finite number, between {-MAX_THRESHOLD:g} and "
            f"{MAX_THRESHOLD:g}"
        )


def _stored(entries: Iterable[tuple[str, dict[str, str]]]) -> list[StoredResult]:
    return [StoredResult(entry_id, FrameResult.from_redis(fields)) for entry_id, fields in entries]


def _pairs(reply: Any) -> list[tuple[str, Any]]:
    """XREAD answers a list of pairs under RESP2 and a dict under RESP3."""
    return list(reply.items()) if isinstance(reply, dict) else list(reply or [])


def _literal(text: str) -> str:
    """Escape what SCAN's MATCH would take for a pattern."""
    return "".join(f"\\{char}" if char in "*?[]\\^" else char for char in text)
