"""`dpdl refresh --watch` and `--every`: what wakes them, what does not, and how they end.

The refresh itself is a stand-in that says "none": test_train_refresh.py has the real one.
SeaweedFS has no notifications; MinIO (`make test-minio`) has, and its last builds hold them back
(infra/s3_events.py), so both are polled; tests/infra/test_s3_events.py has a prompt store.
"""

import os
import threading
import time

import pytest

from infra.embedded import Stack
from infra.errors import (
    AuthFailed,
    DataError,
    PointerConflict,
    ServiceUnavailable,
    SettingsError,
)
from infra.looks import last
from infra.model_store import ModelStore
from infra.s3_client import ensure_buckets, make_minio
from infra.s3_events import listen
from pipelines import refresh_loop
from pipelines.datasets import put_incoming
from pipelines.refresh import RefreshOptions, RefreshReport
from pipelines.refresh_loop import refresh_every, refresh_on_arrival

pytestmark = [pytest.mark.integration, pytest.mark.storage]
ON_MINIO = os.environ.get("DPDL_TEST_S3") == "minio"
OPTIONS = RefreshOptions(model_name="plates")


def put(settings, key, data=b"parquet"):
    import io

    make_minio(settings).put_object(settings.s3.data_bucket, key, io.BytesIO(data), len(data))


@pytest.fixture
def store(settings):
    """A model "plates" with a current version that was trained on data set "plates"."""
    ensure_buckets(settings)
    made = ModelStore(settings)
    made.put_version("plates", "v-1", {"a": b"1"}, {"data": {"dataset": "plates"}})
    made.move_pointer("plates", "v-1", None, by="test", why="first")
    return made


class Loop:
    """The loop under test in a thread, and what it did."""

    def __init__(self, monkeypatch, run, once=None):
        self.stop, self.errors, self.said, self.looks = threading.Event(), [], [], []

        def refresh_once(settings, options, progress):
            self.looks.append(time.monotonic())
            if once is not None:
                once()
            return RefreshReport("none", "v-1", None, "a stand-in", 0.0)

        monkeypatch.setattr(refresh_loop, "refresh_once", refresh_once)
        monkeypatch.setattr(refresh_loop, "QUIET_S", 0.3)
        self.reports = []
        self.thread = threading.Thread(target=self._run, args=(run,))
        self.thread.start()

    def _run(self, run):
        try:
            run(self)
        except Exception as error:
            self.errors.append(error)

    def wait_for(self, looks, within_s):
        deadline = time.monotonic() + within_s
        while len(self.looks) < looks and time.monotonic() < deadline and self.thread.is_alive():
            time.sleep(0.05)
        return len(self.looks)

    def end(self):
        self.stop.set()
        started = time.monotonic()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return time.monotonic() - started


@pytest.fixture
def watching(settings, store, monkeypatch):
    loops = []

    def start(poll_s=0.5, once=None):
        loop = Loop(
            monkeypatch,
            lambda me: refresh_on_arrival(
                settings, OPTIONS, me.reports.append, me.stop, say=me.said.append, poll_s=poll_s
            ),
            once,
        )
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.stop.set()
        loop.thread.join(20)


def test_a_steady_inflow_does_not_put_a_refresh_off_for_ever(settings, watching, monkeypatch):
    monkeypatch.setattr(refresh_loop, "LONGEST_WAIT_S", 1.0)
    ended = threading.Event()

    def flow():
        number = 0
        while not ended.wait(0.1):  # a burst would be over after QUIET_S, 0.3 s here
            put(settings, f"plates/incoming/part-{number}.parquet")
            number += 1

    inflow = threading.Thread(target=flow)
    inflow.start()
    try:
        loop = watching()
        assert loop.wait_for(2, 20) >= 2
        assert loop.errors == []
    finally:
        ended.set()
        inflow.join(10)


def test_what_arrives_is_refreshed_once_and_the_end_is_quick(settings, watching):
    loop = watching()
    assert loop.wait_for(1, 10) == 1  # it looks when it starts
    for i in range(3):  # a burst is one refresh
        put(settings, f"plates/incoming/part-{i}.parquet")
    assert loop.wait_for(2, 15) == 2
    put(settings, "plates/train/part-0.parquet")
    put(settings, "plates/incoming/readme.txt")
    put(settings, "other/incoming/part-0.parquet")
    assert loop.wait_for(3, 2) == 2
    put(settings, "plates/incoming/part-0.parquet", b"other content")
    assert loop.wait_for(3, 15) == 3
    put(settings, "plates/anomalies/answer-0.parquet")  # a defect that somebody confirmed
    assert loop.wait_for(4, 15) == 4
    assert loop.end() < 3
    assert loop.errors == []
    if not ON_MINIO:
        assert loop.said == ["looking for new normals every 15 s"]


def test_a_moved_pointer_is_looked_at_too(store, watching):
    loop = watching()
    assert loop.wait_for(1, 10) == 1
    store.put_version("plates", "v-2", {"a": b"2"}, {"data": {"dataset": "plates"}})
    store.move_pointer("plates", "v-2", store.current("plates"), by="test", why="trained")
    assert loop.wait_for(2, 10) == 2


def failing(*failures):
    """A refresh that fails in these ways, then works."""
    left = list(failures)

    def once():
        if left:
            raise left.pop(0)

    return once


FAILURES = [
    PointerConflict("moved"),
    ServiceUnavailable("away"),
    DataError("imported anew"),
    AuthFailed("no"),
    MemoryError("too large"),
]


def test_a_watch_goes_on_after_every_failure_but_of_settings(watching):
    loop = watching(poll_s=0.1, once=failing(*FAILURES))
    assert loop.wait_for(6, 20) == 6
    loop.end()
    assert [type(r).__name__ for r in loop.reports] == [
        *(type(failure).__name__ for failure in FAILURES[:-1]),
        "DpdlError",
        "RefreshReport",
    ]
    assert str(loop.reports[-2]) == "MemoryError: too large"
    broken = watching(once=failing(SettingsError("s3.endpoint is no address")))
    broken.thread.join(10)
    assert [type(e) for e in broken.errors] == [SettingsError]


def test_the_clock_goes_on_after_every_failure_but_of_settings(settings, monkeypatch):
    run = lambda me: refresh_every(settings, OPTIONS, 0.05, me.reports.append, me.stop)  # noqa: E731
    loop = Loop(monkeypatch, run, failing(*FAILURES))
    assert loop.wait_for(7, 10) >= 7
    loop.end()
    assert loop.errors == []
    broken = Loop(monkeypatch, run, failing(SettingsError("s3.endpoint is no address")))
    broken.thread.join(10)
    assert [type(e) for e in broken.errors] == [SettingsError]


def test_pauses_grow_while_the_same_failure_waits_for_a_person(settings, monkeypatch):
    """And are as usual again after another one, a passing one, or success."""
    again = DataError("imported anew")
    once = failing(again, again, again, AuthFailed("no"), *[ServiceUnavailable("away")] * 2)
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return len(pauses) == 7

    monkeypatch.setattr(refresh_loop, "refresh_once", lambda *_: once())
    refresh_every(settings, OPTIONS, 300, lambda _: None, Stop())
    assert pauses == [300, 600, 900, 300, 300, 300, 300]


def test_an_s3_that_goes_away_and_comes_back_is_watched_on(settings, stack: Stack, watching):
    loop = watching()
    assert loop.wait_for(1, 10) == 1
    stack.kill("s3")
    try:
        time.sleep(1.0)
    finally:
        stack.start_service("s3")
    put(settings, "plates/incoming/part-0.parquet")
    assert loop.wait_for(2, 40) == 2
    assert loop.errors == []


def test_the_clock_looks_again_and_stops_when_told(settings, store, monkeypatch):
    loop = Loop(
        monkeypatch,
        lambda me: refresh_every(settings, OPTIONS, 0.2, me.reports.append, me.stop),
    )
    assert loop.wait_for(3, 10) >= 3
    assert loop.end() < 1
    assert loop.errors == []


def test_listening_tells_of_new_objects_or_says_that_it_cannot(settings):
    ensure_buckets(settings)
    stop, found, keys, alive = threading.Event(), [], [], threading.Event()

    def run():
        found.append(
            listen(
                settings,
                settings.s3.data_bucket,
                suffix=".parquet",
                stop=stop,
                alive=alive.set,
                created=keys.append,
                silence_s=20,
            )
        )

    thread = threading.Thread(target=run)
    thread.start()
    names = [f"plates/incoming/a b+c-{i}.parquet" for i in range(30)]
    if ON_MINIO:  # enough to get what it holds back; the connection may take a moment
        time.sleep(1.0)
        for name in names:
            put(settings, name)
        assert alive.wait(10)
        stop.set()
        put(settings, names[0])
        for name in names:
            put(settings, name)
        assert keys
        assert set(keys) <= set(names)
    thread.join(20)
    assert found == [ON_MINIO]


def test_who_may_not_listen_is_told(settings):
    ensure_buckets(settings)
    s3 = settings.s3.model_copy(update={"access_key": "nobody"})
    wrong = settings.model_copy(update={"s3": s3})
    with pytest.raises(AuthFailed, match=r"s3\.access_key"):
        listen(
            wrong,
            settings.s3.data_bucket,
            suffix="",
            stop=threading.Event(),
            alive=lambda: None,
            created=lambda _: None,
        )


def test_images_put_in_twice_wake_nobody_twice(settings, watching):
    """put_incoming() names an object by its content: the same again is the same watermark."""
    from pipelines.dataset_index import SPLITS, DatasetIndex
    from pipelines.datasets import _put

    parts = {split: [] for split in SPLITS}
    index = DatasetIndex("plates", "", "", "general", 1, 0, None, "", 0.2, parts, [])
    _put(settings, "plates/dataset.json", index.to_json())
    loop = watching()
    assert loop.wait_for(1, 10) == 1
    for looks in (2, 2):
        put_incoming(settings, "plates", [PNG])
        assert loop.wait_for(looks + (looks < len(loop.looks)), 4) == looks


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415408d763f8ffff3f0005fe02fedccc59e70000000049454e44ae426082"
)


@pytest.mark.parametrize("run", [refresh_every, refresh_on_arrival])
def test_a_loop_shows_that_it_lives_by_looks_that_work(settings, store, monkeypatch, run):
    """One that fails for weeks must look like one that has ended."""
    broken, began_s = threading.Event(), time.time()
    broken.set()

    def once():
        if broken.is_set():
            raise DataError("the data set was imported anew")

    monkeypatch.setattr(refresh_loop, "LONGEST_PAUSE_S", 0.2)
    every = {"interval_s": 0.2} if run is refresh_every else {"poll_s": 0.2}
    loop = Loop(
        monkeypatch,
        lambda me: run(settings, OPTIONS, report=me.reports.append, stop=me.stop, **every),
        once,
    )
    try:
        assert loop.wait_for(3, 30) >= 3
        assert last(settings, "plates") is None
        broken.clear()
        deadline = time.monotonic() + 30
        while last(settings, "plates") is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        loop.end()
    due_s = last(settings, "plates").due_s
    assert began_s < due_s < time.time() + refresh_loop.SAFETY_POLL_S
