"""Publishing on a real Valkey: one script, fenced, whatever is repeated or races."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from results import GROUP, TOPIC, changed, put, result, snapshot

from infra.cameras import CameraState
from infra.errors import Fenced
from infra.messages import FrameResult
from infra.redis_client import ResultStore
from infra.redis_connection import make_redis
from infra.settings import Settings

pytestmark = pytest.mark.integration


def test_a_batch_is_stored_whole(store: ResultStore) -> None:
    batch = [result(5), result(7, "cam-2", anomaly=True), result(8, anomaly=True)]
    assert store.set_start(GROUP, TOPIC, 0, 5) == 5
    raised = store.publish(GROUP, TOPIC, 0, 5, 10, batch, {"empty": 1, "no-key": 1})
    assert raised == 2
    assert store.next_offset(GROUP, TOPIC, 0) == 10
    assert store.progress(GROUP, TOPIC) == {0: 10}
    assert [each.result for each in store.alerts()] == batch[1:]
    assert [each.result for each in store.scores("cam-1")] == [batch[2], batch[0]]
    assert store.dead_letters() == {"empty": 1, "no-key": 1}
    first, second = store.cameras()
    assert first == CameraState(
        camera="cam-1",
        frames=2,
        anomalies=1,
        alerts=1,
        last_captured_at_ns=batch[2].captured_at_ns,
        last_scored_at_ns=batch[2].scored_at_ns,
        last_score=batch[2].score,
        last_frame="frames/0/8",
        threshold_used=9.0,
        model="default",
        version="v-1",
        override=None,
        frames_per_s=None,  # no time has passed between its frames
        alert_share=0.5,
        last_alert_at_ns=batch[2].captured_at_ns,
        last_alert_frame="frames/0/8",
        last_alert_evidence=batch[2].evidence_key,
    )
    assert (second.camera, second.frames, store.camera("cam-2")) == ("cam-2", 1, second)
    assert store.camera("nobody") is None


@pytest.mark.parametrize("first", [0, 2, 4, 2**53 + 1])
def test_a_batch_that_does_not_begin_at_the_stored_offset_changes_nothing(
    store: ResultStore, first: int
) -> None:
    put(store, 0, [result(0), result(1, anomaly=True), result(2)], dead={"empty": 2})
    before = snapshot(store, ["cam-1"])
    with pytest.raises(Fenced) as raised:
        put(store, first, [result(first, anomaly=True)], dead={"empty": 1})
    assert (raised.value.expected, raised.value.found) == (3, first)
    assert snapshot(store, ["cam-1"]) == before


def test_offsets_are_exact_beyond_what_a_double_holds(store: ResultStore) -> None:
    big = 2**53
    store.set_start(GROUP, TOPIC, 0, big)
    put(store, big, [result(big)])
    with pytest.raises(Fenced):  # as doubles, 2**53 and 2**53 + 1 are equal
        put(store, big, [result(big)])
    assert store.next_offset(GROUP, TOPIC, 0) == big + 1


def test_groups_topics_and_partitions_are_apart(store: ResultStore) -> None:
    store.publish("a", TOPIC, 0, 0, 1, [result(0)])
    store.publish("b", TOPIC, 0, 0, 2, [])
    store.publish("a", TOPIC, 11, 3, 4, [result(3, partition=11)])
    store.publish("a", "frames.dead", 0, 7, 8, [])
    assert store.progress("a", TOPIC) == {0: 1, 11: 4}
    assert store.next_offset("b", TOPIC, 0) == 2
    assert store.next_offset("b", TOPIC, 1) is None


def test_a_start_is_set_once(store: ResultStore) -> None:
    assert store.set_start(GROUP, TOPIC, 0, 40) == 40
    assert store.set_start(GROUP, TOPIC, 0, 0) == 40
    with pytest.raises(Fenced):
        put(store, 0, [result(0)])


@pytest.mark.parametrize(
    ("first", "following", "results"),
    [
        (0, 2, [result(1), result(0)]),
        (0, 2, [result(0), result(0)]),
        (1, 3, [result(0)]),
        (0, 2, [result(2)]),
        (3, 2, []),
        (0, 2, [result(0, partition=1)]),
    ],
)
def test_a_batch_out_of_order_or_bounds_is_a_bug_of_the_caller(
    store: ResultStore, first: int, following: int, results: list[FrameResult]
) -> None:
    with pytest.raises(ValueError, match="rise within"):
        store.publish(GROUP, TOPIC, 0, first, following, results)
    assert store.next_offset(GROUP, TOPIC, 0) is None


def test_replays_and_zombies_leave_the_state_of_a_quiet_run(
    settings: Settings, store: ResultStore
) -> None:
    """Oracle: the same frames published once, in order, in batches of other sizes."""
    choose = random.Random(7)
    frames = [result(n, f"cam-{n % 3}", anomaly=choose.random() < 0.3) for n in range(300)]
    cameras = ["cam-0", "cam-1", "cam-2"]
    quiet = ResultStore(changed(settings, "redis", prefix=settings.redis.prefix + "-quiet"))
    for first in range(0, 300, 50):
        put(quiet, first, frames[first : first + 50])

    fenced = 0
    while (stored := store.next_offset(GROUP, TOPIC, 0) or 0) < 300:
        first = max(0, stored - choose.choice([0, 0, 1, 20]))  # a replay, or a zombie's view
        size = choose.randrange(1, 40)
        if first == stored:
            put(store, first, frames[first : first + size])
        else:
            with pytest.raises(Fenced):
                put(store, first, frames[first : first + size])
            fenced += 1
    assert fenced > 5
    assert snapshot(store, cameras) == snapshot(quiet, cameras)


def test_of_racing_consumers_one_wins_each_batch(settings: Settings, store: ResultStore) -> None:
    batches = 40
    store.set_start(GROUP, TOPIC, 0, 0)
    won: Counter[str] = Counter()

    def consume(name: str) -> None:
        mine = ResultStore(settings)
        while (first := mine.next_offset(GROUP, TOPIC, 0) or 0) < 5 * batches:
            try:
                put(mine, first, [result(first + n, anomaly=n == 0) for n in range(5)])
                won[name] += 1
            except Fenced:
                pass
        mine.close()

    threads = [threading.Thread(target=consume, args=(f"c{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(won.values()) == batches
    offsets = [each.result.offset for each in reversed(store.scores("cam-1", 10_000))]
    assert offsets == list(range(5 * batches))
    assert [each.result.offset for each in store.alerts(count=1000)] == offsets[::5]


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 3), (3, 3), (1, 4)])
def test_debounce_equals_its_definition(settings: Settings, k: int, n: int) -> None:
    """Oracle: the definition over the whole history, in Python. New clients between batches."""
    choose = random.Random(100 * k + n)
    frames = [result(i, f"cam-{i % 2}", anomaly=choose.random() < 0.4) for i in range(120)]
    history: defaultdict[str, list[bool]] = defaultdict(list)
    wanted = []
    for frame in frames:
        history[frame.camera].append(frame.is_anomaly)
        if frame.is_anomaly and sum(history[frame.camera][-n:]) >= k:
            wanted.append(frame)

    configured = changed(settings, "stream", alert_k=k, alert_n=n)
    first = 0
    while first < len(frames):
        batch = frames[first : first + choose.randrange(1, 20)]
        store = ResultStore(configured)  # as after a restart
        put(store, first, batch)
        store.close()
        first += len(batch)
    store = ResultStore(configured)
    assert [each.result for each in store.alerts(count=1000)] == wanted
    assert sum(camera.alerts for camera in store.cameras()) == len(wanted)


def test_a_large_batch_is_one_call_and_bounded(store: ResultStore) -> None:
    batch = [result(n, f"cam-{n % 16}", anomaly=n % 4 == 0) for n in range(2048)]
    assert put(store, 0, batch) == 512
    with pytest.raises(ValueError, match="at most 2048"):
        put(store, 2048, [result(2048 + n) for n in range(2049)])


def test_order_within_a_camera_is_the_order_of_offsets(store: ResultStore) -> None:
    cameras = [f"cam-{n}" for n in range(3)]
    frames = [result(n, cameras[n % 3]) for n in range(99)]
    for first in range(0, 99, 33):
        put(store, first, frames[first : first + 33])
    for camera in cameras:
        offsets = [each.result.offset for each in store.scores(camera)]
        assert all(newer > older for newer, older in itertools.pairwise(offsets))
        assert len(offsets) == 33


def test_what_is_to_vanish_never_stands_without_its_end(settings: Settings) -> None:
    """A replay may be killed between any two writes."""
    store, redis = ResultStore(settings, keep_s=60), make_redis(settings)

    def ends() -> list[int]:
        return [redis.ttl(key) for key in redis.scan_iter(f"{settings.redis.prefix}:*")]

    writes: list[Callable[[], object]] = [
        lambda: store.set_debounce("cam-1", (1, 2), by="ann"),
        lambda: put(store, 0, [result(0, anomaly=True), result(1, "cam-2")]),
        lambda: put(store, 2, [result(2)]),
        lambda: store.publish(GROUP, TOPIC, 0, 3, 5, [], {"empty": 2}),
    ]
    for num_keys, write in zip((2, 7, 7, 8), writes, strict=True):
        write()
        assert len(ends()) == num_keys
        assert all(0 < end <= 60 for end in ends())
    with pytest.raises(Fenced):
        put(store, 2, [result(2)])


def test_an_offset_is_taken_back_only_where_it_is_still_there_and_of_this_topic(store):
    store.set_start(GROUP, TOPIC, 0, 25)
    assert store.take_back(GROUP, TOPIC, "", 0, 25, 20) is None  # whose it is was never kept
    store.set_topic_id(GROUP, TOPIC, "this")
    assert store.take_back(GROUP, TOPIC, "another", 0, 25, 20) is None
    assert store.take_back(GROUP, TOPIC, "this", 0, 24, 20) == 25  # moved meanwhile
    assert store.take_back(GROUP, TOPIC, "this", 0, 25, 20) == 20
    assert store.next_offset(GROUP, TOPIC, 0) == 20
