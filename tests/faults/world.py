"""The really deployed application and its services, as a fault run sees them: from outside.

Services, application and cameras are processes of their own; this one kills some of them and then
sets what the cameras logged against what lies in Redis, in the dead letters and in S3. Nothing that
the stream says of itself counts here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from frames import jpeg
from kafka import TopicPartition
from nodes import KafkaCluster, Node

from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, decode_image
from infra.embedded import SERVICE_NAMES, Stack
from infra.embedded.files import write_private
from infra.errors import DpdlError
from infra.kafka_client import end_offsets, ensure_topics, make_admin, make_consumer
from infra.messages import FrameResult, evidence_key
from infra.model_store import ModelStore
from infra.redis_client import MAX_PAGE, ResultStore
from infra.s3_client import ensure_buckets, make_minio
from infra.settings import load_settings

HERE = Path(__file__).parent
MODEL = "faults"
CONSUMER, SCORER, CONTROLLER = "ServeReplica:dpdl:Consumer", "ServeReplica:dpdl:Scorer", "ServeCon"


def tiny_version() -> dict[str, bytes]:
    """A real model's files, small enough that the CPU is not what is tested; random trunk."""
    rng, size = np.random.default_rng(1), 64
    normals = np.stack([decode_image(jpeg(rng), size) for _ in range(24)])
    defects = np.stack([decode_image(jpeg(rng, defect=True), size) for _ in range(3)])
    config = replace(
        recipe("edge"),
        weights="random",
        image_size=size,
        patch_prototypes=16,
        patch_dims=16,
        pseudo_normals=16,
        folds=2,
    )
    model = fit(config, ArraySource(normals), defects, seed=1)
    low, high = (model.score(torch.from_numpy(images)).score for images in (normals, defects))
    threshold = float((low.max() + high.min()) / 2)
    thresholds = {"false_alarm_rate": 0.01, "default": threshold, "cameras": {}}
    return artifact.pack(model, thresholds=thresholds, metrics={"auroc": 1.0})


@dataclass(frozen=True, slots=True)
class Account:
    """Of one stream of frames, by the cameras' own log."""

    sent: int
    scored: int
    dead: int
    lost: int
    """Neither a result nor a dead letter."""
    twice: int
    """Results beyond the first of their frame."""
    unordered_cameras: int
    """Cameras whose results are not in the order of their frames."""
    wrongly_dead: int
    """Good frames among the dead letters, bad ones among the results."""
    alerts: int
    alerts_wrong: int
    """Anomalies without their one alert, or alerts without an anomaly."""
    evidence_missing: int

    @property
    def perfect(self) -> bool:
        faults = (self.lost, self.twice, self.unordered_cameras, self.wrongly_dead)
        return not any((*faults, self.alerts_wrong, self.evidence_missing))


class Frames:
    """A running producer process and its log."""

    def __init__(self, world: World, prefix: str, num_frames: int, fps: float) -> None:
        self.prefix, self._log = prefix, world.folder / f"{prefix}.log"
        arguments = [str(self._log), prefix, str(num_frames), str(fps)]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "frames.py"), *arguments], env=world.environment
        )

    def num_sent(self) -> int:
        with suppress(FileNotFoundError):
            return self._log.read_bytes().count(b"\n")
        return 0

    def wait_sent(self, count: int, deadline_s: float = 120.0) -> None:
        _wait(lambda: self.num_sent() >= count, deadline_s, f"{count} frames sent")

    def wait_end(self, *, now: bool = False) -> list[tuple[str, int, str]]:
        """(camera, captured-at, "good" or "bad") in the order of sending. now: end it early."""
        if now:
            self._process.terminate()
        if code := self._process.wait(timeout=300):
            raise RuntimeError(f"the producer ended with exit code {code}")
        lines = (line.split() for line in self._log.read_text().splitlines())
        return [(camera, int(captured), kind) for camera, captured, kind in lines]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class World:
    """Services and application in one folder, alive as long as the block."""

    def __init__(self, folder: Path, *, brokers: int = 1) -> None:
        """brokers: with more than one, a cluster of them in place of the stack's own."""
        self.folder = folder
        self.cluster = KafkaCluster(folder / "cluster", brokers) if brokers > 1 else None
        self.stack = Stack(
            folder / "state", services=("s3", "redis") if self.cluster else SERVICE_NAMES
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DPDL_")}
        self.environment = environment | {
            "DPDL_STATE_DIR": str(folder / "state"),
            "DPDL_SERVE_HTTP_PORT": str(port),
            # A full run's hostile records stay until they are counted.
            "DPDL_KAFKA_RETENTION_MB": "4096",
        }
        self._ends = ExitStack()

    def __enter__(self) -> World:
        with ExitStack() as ends:
            ends.enter_context(self.stack)
            if self.cluster:
                ends.enter_context(self.cluster)
                config = self.folder / "dpdl.yaml"
                write_private(config, yaml.safe_dump({"kafka": self.cluster.settings()}))
                self.environment["DPDL_CONFIG"] = str(config)
            self.settings = load_settings(self.environment)
            ensure_buckets(self.settings)
            ensure_topics(self.settings)
            store = ModelStore(self.settings)
            store.put_version(MODEL, "v1", tiny_version(), {})
            store.move_pointer(MODEL, "v1", None, by="faults", why="the only one")
            self.results = ResultStore(self.settings)
            self.deploy()
            ends.callback(self.end_application)
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    # -- the application ------------------------------------------------------------------------

    def deploy(self) -> None:
        log = (self.folder / "deploy.log").open("ab")
        self._driver = subprocess.Popen(
            [sys.executable, str(HERE / "deploy.py"), MODEL],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert self._driver.stdout is not None
        if self._driver.stdout.readline() != b"running\n":
            raise RuntimeError(f"not deployed: {(self.folder / 'deploy.log').read_text()[-3000:]}")

    def end_application(self) -> None:
        everything = self.processes()
        with suppress(subprocess.TimeoutExpired):
            self._driver.communicate(timeout=60)
        self._kill(everything)
        self._driver.wait()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Of the application (driver and all below it), those with `title` in their name."""
        found = []
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self._driver.pid)
            for process in [driver, *driver.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def kill_one(self, title: str) -> int:
        """SIGKILL; the process id."""
        process = next(iter(self.processes(title)), None)
        if process is None:
            raise RuntimeError(f"no process of the application is called {title}")
        process.kill()
        return int(process.pid)

    def lose_node(self) -> None:
        """SIGKILL Ray's node process; the rest of that Ray goes with it, as on a lost machine."""
        everything = self.processes()
        self.kill_one("raylet/raylet")
        self._kill(everything)
        self._driver.wait()

    def leader(self) -> Node:
        """The broker that leads partition 0 of the frames."""
        assert self.cluster is not None
        admin = make_admin(self.settings)
        try:
            topic = admin.describe_topics([self.settings.kafka.topic])[0]
        finally:
            admin.close()
        first = next(p for p in topic["partitions"] if p["partition_index"] == 0)
        return self.cluster.nodes[first["leader_id"]]

    @staticmethod
    def _kill(processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    # -- the stream -----------------------------------------------------------------------------

    def ends(self) -> dict[int, int]:
        return end_offsets(self.settings, self.settings.kafka.topic)

    def progress(self) -> dict[int, int]:
        kafka = self.settings.kafka
        return self.results.progress(kafka.group, kafka.topic)

    def wait_beyond(self, offsets: dict[int, int], deadline_s: float) -> None:
        """Until every partition has published a frame at its offset or later."""

        def beyond() -> bool:
            with suppress(DpdlError):  # Redis may be what is away
                progress = self.progress()
                return all(progress.get(p, 0) > offset for p, offset in offsets.items())
            return False

        _wait(beyond, deadline_s, "every partition goes on")

    def wait_scored(self, deadline_s: float) -> None:
        """Until Redis stands at Kafka's end."""
        ends = self.ends()
        _wait(lambda: self.progress() == ends, deadline_s, f"all is scored up to {ends}")

    # -- the account ----------------------------------------------------------------------------

    def account(self, frames: list[tuple[str, int, str]], *, patience_s: float = 30.0) -> Account:
        """patience_s: how long evidence may take to be caught up with."""
        kinds = {(camera, captured): kind for camera, captured, kind in frames}
        cameras = {camera for camera, _ in kinds}
        dead = {pair for pair in self._dead() if pair in kinds}
        scored: list[tuple[str, int]] = []
        anomalies, unordered = {}, 0
        for camera in cameras:
            results = [each.result for each in self.results.scores(camera, MAX_PAGE)][::-1]
            got = [result.captured_at_ns for result in results]
            unordered += got != sorted(got)
            scored += [(camera, each) for each in got]
            anomalies |= {result.frame_id: result for result in results if result.is_anomaly}
        alerts = Counter(frame for frame, camera in self._alerts() if camera in cameras)
        missing = self._missing_evidence(anomalies.values(), patience_s)
        return Account(
            sent=len(frames),
            scored=len(set(scored)),
            dead=len(dead),
            lost=len(kinds.keys() - dead - set(scored)),
            twice=len(scored) - len(set(scored)) + len(dead & set(scored)),
            unordered_cameras=unordered,
            wrongly_dead=sum(kinds[pair] == "good" for pair in dead)
            + sum(kinds.get(pair) != "good" for pair in set(scored)),
            alerts=alerts.total(),
            alerts_wrong=(alerts - Counter(anomalies.keys())).total()
            + (Counter(anomalies.keys()) - alerts).total(),
            evidence_missing=missing,
        )

    def _dead(self) -> Iterator[tuple[str, int]]:
        for record in self.read(self.settings.kafka.dead_topic):
            with suppress(KeyError, ValueError, AttributeError, UnicodeDecodeError):
                yield record.key.decode(), int(dict(record.headers)["captured-at"])

    def _alerts(self) -> Iterator[tuple[str, str]]:
        after = "0"
        while page := self.results.alerts(after, MAX_PAGE):
            yield from ((each.result.frame_id, each.result.camera) for each in page)
            after = page[-1].id

    def _missing_evidence(self, of: Iterable[FrameResult], patience_s: float) -> int:
        client, bucket = make_minio(self.settings), self.settings.s3.evidence_bucket
        keys = [evidence_key(result.frame_id, result.captured_at_ns) for result in of]
        wanted = {f"{key}/{what}" for key in keys for what in _EVIDENCE}
        until = time.monotonic() + patience_s
        while True:
            there = {item.object_name for item in client.list_objects(bucket, recursive=True)}
            if not wanted - there or time.monotonic() > until:
                return len(wanted - there)
            time.sleep(0.5)

    def read(self, topic: str) -> Iterator[Any]:
        """Every record of a topic, by a plain consumer."""
        consumer = make_consumer(self.settings)
        try:
            places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
            consumer.assign(places)
            ends = consumer.end_offsets(places)
            consumer.seek_to_beginning(*places)
            while any(consumer.position(place) < ends[place] for place in places):
                for got in consumer.poll(timeout_ms=500).values():
                    yield from got
        finally:
            consumer.close()


_EVIDENCE = ("frame", "heat.png")


def _wait(done: Callable[[], bool], deadline_s: float, what: str) -> None:
    until = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is done to the running application, and how it is undone."""

    name: str
    strike: Callable[[World], object]
    mend: Callable[[World], object] | None = None
    """As a supervisor or a person would; None: it must heal by itself."""
    lasts_s: float = 0.0
    harmless: bool = False
    """The stream must go on before it is mended."""


def killed(name: Any, lasts_s: float, *, harmless: bool = False) -> Fault:
    return Fault(
        name=f"{name} SIGKILL",
        strike=lambda world: world.stack.kill(name),
        mend=lambda world: world.stack.start_service(name),
        lasts_s=lasts_s,
        harmless=harmless,
    )


def paused(name: Any, lasts_s: float, *, harmless: bool = False) -> Fault:
    return Fault(
        name=f"{name} SIGSTOP {lasts_s:g} s",
        strike=lambda world: world.stack.pause(name),
        mend=lambda world: world.stack.resume(name),
        lasts_s=lasts_s,
        harmless=harmless,
    )


def stalled(lasts_s: float) -> Fault:
    """A consumer that stands still beyond its session, loses its partitions and comes back."""
    stopped: list[psutil.Process] = []

    def stop(world: World) -> None:
        stopped[:] = world.processes(CONSUMER)[:1]
        stopped[0].suspend()

    def go_on(world: World) -> None:
        with suppress(psutil.NoSuchProcess):  # Serve has replaced it meanwhile
            stopped[0].resume()

    return Fault(name=f"consumer SIGSTOP {lasts_s:g} s", strike=stop, mend=go_on, lasts_s=lasts_s)


def faults(pause_s: float) -> list[Fault]:
    """All of them, with pauses of that length."""
    return [
        Fault(name="consumer SIGKILL", strike=lambda world: world.kill_one(CONSUMER)),
        Fault(name="scorer SIGKILL", strike=lambda world: world.kill_one(SCORER)),
        Fault(
            name="controller SIGKILL",
            strike=lambda world: world.kill_one(CONTROLLER),
            harmless=True,
        ),
        killed("kafka", 2.0),
        killed("redis", 2.0),
        killed("s3", 5.0, harmless=True),
        paused("kafka", pause_s),
        paused("redis", pause_s),
        paused("s3", pause_s, harmless=True),
        stalled(pause_s),
        Fault(
            name="Ray node SIGKILL",
            strike=lambda world: world.lose_node(),
            mend=lambda world: world.deploy(),
        ),
    ]


def leader_killed() -> Fault:
    """Of three brokers; what it leads goes on with the other two at once."""
    gone: list[Node] = []

    def kill(world: World) -> None:
        gone[:] = [world.leader()]
        gone[0].kill()

    def bring_back(world: World) -> None:
        gone[0].start()
        gone[0].serves()

    return Fault(name="leader of 3 brokers SIGKILL", strike=kill, mend=bring_back, harmless=True)


def strike(world: World, fault: Fault, deadline_s: float = 120.0) -> dict[str, float]:
    """Strikes, mends, waits until all goes on: seconds it was down and seconds to come back.

    back_s runs from the mending (or the stroke, where nothing is mended by hand) until every
    partition has published a frame that was sent after the stroke.
    """
    before = world.ends()
    began = time.monotonic()
    fault.strike(world)
    if fault.harmless:
        world.wait_beyond(before, deadline_s)
        back_s = time.monotonic() - began
        before = {}
    time.sleep(max(0.0, fault.lasts_s - (time.monotonic() - began)))
    if fault.mend:
        fault.mend(world)
    mended = time.monotonic()
    if before:
        world.wait_beyond(before, deadline_s)
        back_s = time.monotonic() - (mended if fault.mend else began)
    down_s = mended - began if fault.mend else 0.0
    return {"down_s": round(down_s, 1), "back_s": round(back_s, 1)}


def as_row(fault: str, times: dict[str, float], account: Account) -> dict[str, Any]:
    return {"fault": fault, **times, **asdict(account)}
