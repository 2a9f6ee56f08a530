"""Consumer deployment: one replica reads some partitions and carries their frames to the end.

The loop (loop.py) has its own thread and its own KafkaConsumer; Serve's event loop only answers
for its health. Replicas share the topic's partitions through Kafka's consumer group; more of them
than partitions have nothing to do.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from infra.dead_letters import DeadLetters
from infra.errors import DpdlError, ServiceUnavailable
from infra.kafka_client import make_consumer
from infra.metrics import GAUGES_S, ExpiryMetrics, ReplicaMetrics, StreamMetrics
from infra.redis_client import ResultStore
from infra.settings import Settings, load_settings
from serving.archive import open_archive
from serving.batch import DEFAULT_MODEL, Batch, BatchReport, Plan, Scored, WrongSize
from serving.decode import Decoder
from serving.logs import log_to_stderr
from serving.loop import Loop
from serving.publish import StreamSink
from serving.scaling import LAG
from serving.source import KafkaSource, consumer_group

log = logging.getLogger("dpdl.stream")

ANSWER_S = 5.0
"""How often a wait for an answer looks whether it is to end."""
INFO_S = 3.0
"""Longest wait of the loop's own thread for a scorer: it shows no life and sees no stop then."""
LOOK_S = 1.0
"""How often the bindings of cameras to models are read."""
TELL_S = 5.0
"""How often a batch has its line in the log; a line each would fill a disk within weeks."""
STUCK_S = 90.0
"""A loop that shows no life for so long is replaced."""
MARKS = {
    "decoded": ("decode", "aside"),
    "scored": ("score",),
    "published": ("evidence", "publish"),
}
"""What the stage metrics are named after, and the steps that lead there from the mark before."""
DRAIN_S = 15.0
CLOSE_S = 3.0


class HandleScore:
    """serving.batch.Score by calls of the Scorer deployment; one call carries one batch."""

    def __init__(self, scorer: DeploymentHandle[Any], results: ResultStore, depth: int) -> None:
        self._scorer, self._results = scorer, results
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="score")
        self._sizes: dict[str, int] = {}
        self._info: Future[dict[str, Any]] | None = None
        """The question still open while no scorer answers; a retry looks at it again."""
        self._bound: dict[str, str] = {}
        self._looked_s = float("-inf")
        self._closed = threading.Event()

    def plan(self) -> Plan:
        """Sizes as of the last answers, bindings as of LOOK_S ago. ServiceUnavailable."""
        if DEFAULT_MODEL not in self._sizes:
            self._sizes[DEFAULT_MODEL] = self._default_size()
        if time.monotonic() - self._looked_s > LOOK_S:
            self._bound = self._results.bindings()
            self._looked_s = time.monotonic()
        return Plan(self._sizes[DEFAULT_MODEL], self._bound, dict(self._sizes))

    def submit(self, batch: Batch) -> Future[Scored | WrongSize]:
        return self._pool.submit(self._ask, batch)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _default_size(self) -> int:
        asked = self._info = self._info or self._pool.submit(self._ask_info)
        if wait([asked], timeout=INFO_S).not_done:
            raise ServiceUnavailable("the scorer: none has answered yet (`dpdl status`)")
        self._info = None
        return int(asked.result()["image_size"])

    def _ask_info(self) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(self._scorer.info.remote)
        return found

    def _ask(self, batch: Batch) -> Scored | WrongSize:
        cameras = [frame.camera for frame in batch.frames]
        answer: Scored | WrongSize = self._answer(
            self._scorer.score.remote, batch.images, cameras, batch.model
        )
        self._sizes[batch.model] = answer.image_size
        return answer

    def _answer(self, ask: Callable[..., Any], *what: object) -> Any:
        """For as long as it takes while the replica lives: one that is slow would only find a
        batch that is asked again behind itself. ServiceUnavailable."""
        try:
            response = ask(*what)
            while True:
                try:
                    return response.result(timeout_s=ANSWER_S)
                except TimeoutError as error:
                    if isinstance(error, RayTaskError) or self._closed.is_set():
                        raise
        except (RayError, RayServeException, TimeoutError, RuntimeError) as error:
            # Replaced, restarting, overloaded: Serve brings a scorer back, and a batch is not lost.
            raise ServiceUnavailable(f"the scorer: {' '.join(str(error).split())[:300]}") from error


class Consumer:
    """The deployment's class.

    Args:
        scorer: handle of the Scorer deployment.
    """

    def __init__(self, scorer: DeploymentHandle[Any]) -> None:
        log_to_stderr()
        self._settings = load_settings()
        self._scorer = scorer
        self._stopping = threading.Event()
        self._loop: Loop | None = None
        self._source: KafkaSource | None = None
        self._trouble = "starting"
        self._alive_s = time.monotonic()
        self._totals: dict[str, int] = {"batches": 0, "frames": 0, "alerts": 0, "dropped_spans": 0}
        self._bad: dict[str, int] = {}
        self._last: dict[str, Any] = {}
        self._told_s = float("-inf")
        self._metrics, self._expiry = StreamMetrics(), ExpiryMetrics()
        self._replica = ReplicaMetrics("consumer", serve.get_replica_context().rank.rank)
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()
        threading.Thread(target=self._show_gauges, name="gauges", daemon=True).start()

    async def stats(self) -> dict[str, Any]:
        """Since this replica began: totals, dead letters by reason, lag, trouble, last batch."""
        return {
            "pid": os.getpid(),
            **self._totals,
            "dead_letters": dict(self._bad),
            "lag": self._lag(),
            "trouble": self._trouble_now(),
            "last_batch": self._last,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For serving.scaling.LagPolicy."""
        return {LAG: float(sum(self._lag().values()))}

    def _trouble_now(self) -> str:
        said = [part.trouble for part in (self._loop, self._source) if part]
        return next(filter(None, [self._trouble, *said]), "")

    def _lag(self) -> dict[int, int]:
        return self._source.behind if self._source else {}

    def check_health(self) -> None:
        """RuntimeError, and Serve replaces the replica, when the thread is dead or stuck."""
        if not self._thread.is_alive() and not self._stopping.is_set():
            raise RuntimeError(f"the stream has ended: {self._trouble}")
        quiet_s = time.monotonic() - (self._loop.last_poll_s if self._loop else self._alive_s)
        if quiet_s > STUCK_S:
            raise RuntimeError(f"the stream's thread has shown no life for {quiet_s:.0f} s")

    def __del__(self) -> None:
        """Serve's graceful end: what is in flight is published, then the group is left."""
        if stopping := getattr(self, "_stopping", None):
            stopping.set()
            if self._loop:
                self._loop.stop()
            self._thread.join(DRAIN_S + CLOSE_S)

    def _run(self) -> None:
        try:
            with ExitStack() as ends:
                parts = self._opened(ends)
                if parts:
                    parts.run()
        except DpdlError as error:  # no retry helps: a person must change something
            self._trouble = str(error)
            log.error("the stream ends: %s", error)
        except BaseException as error:
            self._trouble = f"{type(error).__name__}: {error}"
            log.exception("the stream ends")

    def _opened(self, ends: ExitStack) -> Loop | None:
        """Connects to everything, for as long as it takes. None: stopped meanwhile."""
        while not self._stopping.is_set():
            self._alive_s = time.monotonic()
            try:
                with ExitStack() as trying:
                    loop = self._connect(self._settings, trying)
                    ends.push(trying.pop_all())
                    return loop
            except DpdlError as error:
                if not error.retryable:
                    raise
                self._wait_after(error)
        return None

    def _wait_after(self, error: DpdlError) -> None:
        if str(error) != self._trouble:
            log.warning("cannot start yet: %s", error)
        self._trouble = str(error)
        self._stopping.wait(1.0)

    def _await_scorer(self, score: HandleScore) -> None:
        """Before the group is joined: partitions of a consumer without a scorer would stand still,
        as those of a new cluster beside the old one that still serves. ServiceUnavailable at a
        stop."""
        while True:
            self._alive_s = time.monotonic()
            try:
                score.plan()
                return
            except ServiceUnavailable as error:
                self._wait_after(error)
                if self._stopping.is_set():
                    raise

    def _connect(self, settings: Settings, ends: ExitStack) -> Loop:
        depth = settings.stream.max_in_flight
        results = ResultStore(settings)
        score = HandleScore(self._scorer, results, depth)
        ends.callback(score.close)
        self._await_scorer(score)
        dead = DeadLetters(settings)
        ends.callback(dead.close, CLOSE_S)
        archive = open_archive(settings)
        ends.callback(archive.close)
        decoder = Decoder(settings.stream.decode_threads)
        ends.callback(decoder.close)
        consumer = make_consumer(settings, group=consumer_group(settings, results))
        source = KafkaSource(consumer, results, settings)
        ends.callback(source.close, CLOSE_S)
        sink = StreamSink(results, archive, dead, group=settings.kafka.group)
        self._source = source
        self._loop = Loop(
            source, decoder, score, sink, report=self._report, depth=depth, drain_s=DRAIN_S
        )
        if self._stopping.is_set():
            self._loop.stop()
        self._trouble = ""
        return self._loop

    def _report(self, batch: BatchReport) -> None:
        line: dict[str, Any] = {
            "offsets": batch.offsets,
            "versions": batch.versions,
            "frames": len(batch.results),
            "alerts": batch.alerts,
            "bad": dict(batch.bad),
            "dropped_spans": batch.dropped_spans,
            "ms": batch.stage_ms,
        }
        if time.monotonic() - self._told_s > TELL_S:
            log.info("batch %s", json.dumps(line, separators=(",", ":")))
            self._told_s = time.monotonic()
        self._last = line
        self._totals["batches"] += 1
        for name in ("frames", "alerts", "dropped_spans"):
            self._totals[name] += line[name]
        for reason, count in batch.bad.items():
            self._bad[reason] = self._bad.get(reason, 0) + count
        self._measure(batch)

    def _measure(self, batch: BatchReport) -> None:
        """Right after publish: what is over now is published now."""
        metrics, now_ns = self._metrics, time.time_ns()
        for each in batch.results:
            metrics.scored(
                each.camera, each.model, each.version, score=each.score, energy=each.energy
            )
            metrics.latency(each.model, (now_ns - each.captured_at_ns) / 1e9)
            metrics.stage("consumed", (batch.polled_at_ns - each.captured_at_ns) / 1e9)
        if batch.results:
            metrics.batch(len(batch.results))
        for mark, stages in MARKS.items():
            spent_ms = [batch.stage_ms[stage] for stage in stages if stage in batch.stage_ms]
            if spent_ms:
                metrics.stage(mark, sum(spent_ms) / 1000)

    def _show_gauges(self) -> None:
        while not self._stopping.is_set():
            self._replica.alive()
            self._metrics.in_flight(self._loop.in_flight if self._loop else 0)
            if self._source:
                topic = self._settings.kafka.topic
                self._expiry.show(topic, dict(self._source.expired_s))
                self._expiry.lost(topic, dict(self._source.lost))
            self._stopping.wait(GAUGES_S)
