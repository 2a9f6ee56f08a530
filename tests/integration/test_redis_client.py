"""The result store on a real Valkey: one script, fenced, whatever is repeated or killed."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from infra import redis_client
from infra.cameras import CameraState
from infra.embedded import Stack
from infra.errors import AuthFailed, DataError, Fenced, ServiceUnavailable, StoreFull
from infra.messages import FrameResult, evidence_key, frame_id
from infra.redis_client import ResultStore
from infra.redis_connection import REPLY_TIMEOUT_S, make_redis
from infra.settings import Settings

pytestmark = pytest.mark.integration
GROUP, TOPIC = "g", "frames"


@pytest.fixture
def store(settings: Settings) -> Iterator[ResultStore]:
    found = ResultStore(settings)
    yield found
    found.close()


def changed(settings: Settings, group: str, **fields: Any) -> Settings:
    new = getattr(settings, group).model_copy(update=fields)
    return settings.model_copy(update={group: new})


def result(
    offset: int, camera: str = "cam-1", *, anomaly: bool = False, partition: int = 0
) -> FrameResult:
    frame = frame_id(TOPIC, partition, offset)
    return FrameResult(
        frame_id=frame,
        camera=camera,
        captured_at_ns=1_700_000_000_000_000_000 + offset,
        scored_at_ns=1_700_000_001_000_000_000 + offset,
        score=0.1 * offset + (10 if anomaly else 0),
        threshold=9.0,
        energy=-offset / 3,
        is_anomaly=anomaly,
        model="default",
        version="v-1",
        evidence_key=evidence_key(frame) if anomaly else "",
    )


def put(store: ResultStore, first: int, results: list[FrameResult], **options: Any) -> int:
    return store.publish(GROUP, TOPIC, 0, first, first + len(results), results, **options)


def snapshot(store: ResultStore, cameras: list[str]) -> Any:
    return (
        [alert.result for alert in store.alerts(count=10_000)],
        {camera: [s.result for s in store.scores(camera, 10_000)] for camera in cameras},
        store.cameras(),
        store.dead_letters(),
        store.progress(GROUP, TOPIC),
    )


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


def test_streams_are_capped(settings: Settings) -> None:
    store = ResultStore(changed(settings, "stream", scores_kept=100, alerts_kept=100))
    for first in range(0, 1000, 200):
        put(store, first, [result(first + n, anomaly=True) for n in range(200)])
    # Redis trims whole nodes of up to 100 entries (stream-node-max-entries).
    for kept in (store.scores("cam-1", 10_000), store.latest_alerts(10_000)):
        assert 100 <= len(kept) <= 200
        assert kept[0].result.offset == 999
    camera = store.camera("cam-1")
    assert camera is not None
    assert camera.alerts == 1000


def test_alerts_are_paged_newest_first_and_followed_oldest_first(store: ResultStore) -> None:
    put(store, 0, [result(n, anomaly=True) for n in range(25)])
    seen: list[int] = []
    before = None
    while page := store.latest_alerts(10, before):
        seen += [each.result.offset for each in page]
        before = page[-1].id
    assert seen == list(reversed(range(25)))

    after, followed = "0", []
    while page := store.alerts(after, 10):
        followed += [each.result.offset for each in page]
        after = page[-1].id
    assert followed == list(range(25))


def test_alerts_and_scores_are_found_by_time_and_by_id(store: ResultStore) -> None:
    for offset in range(4):
        put(store, offset, [result(offset, anomaly=True)])
        time.sleep(0.003)
    newest_first = store.latest_alerts()
    ids = [alert.id for alert in newest_first]
    times = [int(each.split("-")[0]) for each in ids]
    assert [a.id for a in store.latest_alerts(from_ms=times[2])] == ids[:3]
    assert [a.id for a in store.latest_alerts(to_ms=times[1])] == ids[1:]
    assert [a.id for a in store.latest_alerts(from_ms=times[2], to_ms=times[1])] == ids[1:3]
    assert [a.id for a in store.latest_alerts(5, ids[1], from_ms=times[2])] == ids[2:3]
    scores = store.scores("cam-1")
    assert store.scores("cam-1", from_ms=int(scores[0].id.split("-")[0])) == scores[:1]
    assert store.alert(ids[1]) == newest_first[1]
    assert store.score("cam-1", scores[2].id) == scores[2]
    assert store.alert("5-0") is store.score("cam-2", scores[2].id) is None


def test_rates_are_of_the_last_quarter_of_an_hour(store: ResultStore) -> None:
    """An hour ago two frames a second and every fifth an alert; now one in two seconds, none."""
    now_ns = time.time_ns()

    def scored(offset: int, s_ago: float, anomaly: bool) -> FrameResult:
        return replace(result(offset, anomaly=anomaly), scored_at_ns=now_ns - round(s_ago * 1e9))

    old = [scored(i, 3600 + (1000 - i) / 2, i % 5 == 0) for i in range(1000)]
    put(store, 0, old)
    (camera,) = store.cameras()
    assert camera.alert_share == pytest.approx(0.2, rel=0.02)
    assert camera.frames_per_s is not None
    assert camera.frames_per_s < 0.05  # it has faded since
    put(store, 1000, [scored(1000 + i, (1800 - i) * 2, False) for i in range(1800)])
    (camera,) = store.cameras()
    assert camera.frames_per_s == pytest.approx(0.5, rel=0.05)
    assert camera.alert_share is not None
    assert camera.alert_share < 0.02
    assert camera.last_alert_frame == frame_id(TOPIC, 0, 995)
    assert camera.last_alert_evidence == evidence_key(frame_id(TOPIC, 0, 995))


def test_a_follower_wakes_at_the_next_alert(settings: Settings, store: ResultStore) -> None:
    started = time.monotonic()
    assert store.alerts(block_s=0.3) == []
    assert 0.25 < time.monotonic() - started < 2

    timer = threading.Timer(0.3, lambda: put(ResultStore(settings), 0, [result(0, anomaly=True)]))
    timer.start()
    started = time.monotonic()
    assert [each.result.offset for each in store.alerts(block_s=3)] == [0]
    assert time.monotonic() - started < 2.5
    timer.join()


def test_a_threshold_has_an_owner_and_a_time(store: ResultStore) -> None:
    put(store, 0, [result(0, "seen")])
    for camera in ("seen", "not yet seen"):
        store.set_threshold(camera, 1 / 3, by="anna@line-2")
    found = store.thresholds(["seen", "not yet seen", "other", "seen"])
    assert set(found) == {"seen", "not yet seen"}
    assert found["seen"].threshold == 1 / 3
    assert found["seen"].by == "anna@line-2"
    assert abs(found["seen"].at_ns - time.time_ns()) < 60e9
    assert [camera.camera for camera in store.cameras()] == ["seen", "not yet seen"]
    put(store, 1, [result(1, "seen")])
    seen = store.camera("seen")
    assert seen is not None
    assert (seen.override, seen.frames) == (found["seen"], 2)

    store.set_threshold("seen", None, by="ben")
    assert set(store.thresholds(["seen", "not yet seen"])) == {"not yet seen"}
    with pytest.raises(ValueError, match="control characters"):
        store.set_threshold("a\nb", 1.0, by="x")


@pytest.mark.parametrize("camera", ["a:b", "käm{1} *?[x]", "'; flushall", "x" * 128, "0"])
def test_any_camera_id_keeps_to_its_own_keys(store: ResultStore, camera: str) -> None:
    put(store, 0, [result(0, camera, anomaly=True)])
    assert [each.result.camera for each in store.scores(camera)] == [camera]
    assert [state.camera for state in store.cameras()] == [camera]


def test_what_was_answered_survives_sigkill(settings: Settings, stack: Stack) -> None:
    store = ResultStore(settings)
    put(store, 0, [result(n, anomaly=n % 2 == 0) for n in range(50)], dead={"empty": 3})
    before = snapshot(store, ["cam-1"])
    stack.kill("redis")
    try:
        with pytest.raises(ServiceUnavailable):
            put(store, 50, [result(50)])
    finally:
        stack.start_service("redis")
    assert snapshot(store, ["cam-1"]) == before  # the same client goes on by itself
    put(store, 50, [result(50)])
    assert store.next_offset(GROUP, TOPIC, 0) == 51


def test_a_paused_redis_is_an_error_in_time_and_its_late_write_is_fenced(
    settings: Settings, stack: Stack
) -> None:
    """The request waits in the socket and runs when Redis wakes: the caller must find out."""
    store = ResultStore(settings)
    put(store, 0, [result(0)])
    stack.pause("redis")
    started = time.monotonic()
    try:
        with pytest.raises(ServiceUnavailable):
            put(store, 1, [result(1, anomaly=True)])
        assert time.monotonic() - started < REPLY_TIMEOUT_S + 2
    finally:
        stack.resume("redis")
    with suppress(Fenced):  # the late one was quicker
        put(store, 1, [result(1, anomaly=True)])
    assert store.next_offset(GROUP, TOPIC, 0) == 2
    assert len(store.alerts()) == 1


def test_a_camera_is_bound_to_a_model_and_freed_again(store: ResultStore) -> None:
    put(store, 0, [result(0, "cam-1"), result(1, "cam-2")])
    store.bind_model("cam-2", "special", by="ada")
    store.bind_model("cam-9", "other", by="bob")
    assert store.bindings() == {"cam-2": "special", "cam-9": "other"}
    known = {state.camera: state for state in store.cameras()}
    assert set(known) == {"cam-1", "cam-2", "cam-9"}
    bound = known["cam-2"].binding
    assert bound is not None
    assert (bound.model, bound.by) == ("special", "ada")
    assert 0 <= time.time_ns() - bound.at_ns < 60e9
    assert (known["cam-2"].model, known["cam-1"].binding) == ("default", None)
    store.bind_model("cam-2", None, by="bob")
    assert store.bindings() == {"cam-9": "other"}
    freed = store.camera("cam-2")
    assert freed is not None
    assert freed.binding is None


def test_a_camera_has_its_own_debounce(store: ResultStore) -> None:
    store.set_debounce("cam-1", (2, 3), by="ada")
    put(store, 0, [result(0, anomaly=True), result(1, "cam-2", anomaly=True)])
    assert [each.result.camera for each in store.alerts()] == ["cam-2"]
    put(store, 2, [result(2, anomaly=True)])
    assert [each.result.offset for each in store.alerts()] == [1, 2]
    rule = store.camera("cam-1")
    assert rule is not None
    assert rule.debounce is not None
    assert (rule.debounce.k, rule.debounce.n, rule.debounce.by) == (2, 3, "ada")
    store.set_debounce("cam-1", None, by="ada")
    put(store, 3, [result(3), result(4), result(5, anomaly=True)])
    assert [each.result.offset for each in store.alerts()] == [1, 2, 5]
    with pytest.raises(ValueError, match="3 of 2"):
        store.set_debounce("cam-1", (3, 2), by="ada")


def test_cameras_beyond_the_bound_alert_and_leave_nothing_else(settings: Settings) -> None:
    """Ids are invented by whoever sends: a flood of them must not fill Redis."""
    store = ResultStore(changed(settings, "stream", max_cameras=3))
    flood = [result(i, f"cam-{i}", anomaly=i % 2 == 0) for i in range(20)]
    assert put(store, 0, flood) == 10
    assert put(store, 20, [result(20, "cam-1", anomaly=True), result(21, "cam-19")]) == 1
    assert {state.camera for state in store.cameras()} == {"cam-0", "cam-1", "cam-2"}
    assert [each.result.offset for each in store.alerts()] == [*range(0, 20, 2), 20]
    assert [each.result.offset for each in store.scores("cam-1")] == [20, 1]
    assert store.scores("cam-19") == []
    assert store.camera("cam-19") is None
    assert store.unlisted_frames() == 18
    assert store.next_offset(GROUP, TOPIC, 0) == 22
    keys = make_redis(settings).keys(f"{settings.redis.prefix}:*cam*")
    assert len(keys) == 1 + 3 + 3  # the list, three cameras' states, three cameras' scores
    store.set_threshold("cam-19", 1.0, by="ada")  # who names a camera lists it
    put(store, 22, [result(22, "cam-19")])
    assert [each.result.offset for each in store.scores("cam-19")] == [22]


@contextmanager
def configured(settings: Settings, **options: str) -> Iterator[redis.Redis]:
    admin = make_redis(settings)
    names = [name.replace("_", "-") for name in options]
    before = {name: admin.config_get(name)[name] for name in names}  # type: ignore[index]
    for name, value in zip(names, options.values(), strict=True):
        admin.config_set(name, value)
    try:
        yield admin
    finally:
        for name, value in before.items():
            admin.config_set(name, value)


def test_a_full_redis_says_so_and_writes_nothing(settings: Settings, store: ResultStore) -> None:
    put(store, 0, [result(0, anomaly=True)])
    before = snapshot(store, ["cam-1"])
    with (
        configured(settings, maxmemory="1mb"),
        pytest.raises(StoreFull, match="memory limit") as raised,
    ):
        put(store, 1, [result(1, anomaly=True)])
    assert raised.value.retryable
    assert snapshot(store, ["cam-1"]) == before
    put(store, 1, [result(1, anomaly=True)])


def test_a_replica_is_not_written_to(settings: Settings, store: ResultStore) -> None:
    put(store, 0, [result(0)])
    admin = make_redis(settings)
    admin.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(ServiceUnavailable, match="primary"):
            put(store, 1, [result(1)])
    finally:
        admin.replicaof("NO", "ONE")
    assert put(store, 1, [result(1)]) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"password": SecretStr("wrong")},
        {"password": None},
        {"username": "nobody", "password": SecretStr("x")},
    ],
)
def test_wrong_credentials_are_one_line(settings: Settings, fields: dict[str, Any]) -> None:
    with pytest.raises(AuthFailed, match=r"redis\.password") as raised:
        ResultStore(changed(settings, "redis", **fields))
    assert "\n" not in str(raised.value)
    assert "wrong" not in str(raised.value)


def test_an_acl_user_needs_only_its_prefix(settings: Settings) -> None:
    admin, prefix = make_redis(settings), settings.redis.prefix
    rights = ["+@read", "+@write", "+@scripting", "+@transaction", "+@connection"]
    assert " ".join(rights) in (redis_client.__doc__ or "")
    admin.execute_command("ACL", "SETUSER", prefix, "reset", "on", ">pw", f"~{prefix}:*", *rights)
    try:
        user = {"username": prefix, "password": SecretStr("pw")}
        store = ResultStore(changed(settings, "redis", **user))
        put(store, 0, [result(0, anomaly=True)])
        store.set_threshold("cam-1", 2.0, by="x")
        assert len(store.alerts()) == len(store.cameras()) == 1
        assert store.progress(GROUP, TOPIC) == {0: 1}
        other = ResultStore(changed(settings, "redis", prefix="elsewhere", **user))
        with pytest.raises(AuthFailed, match=f"user {prefix}"):
            put(other, 0, [result(0)])
        with pytest.raises(AuthFailed):
            other.alerts()
    finally:
        admin.execute_command("ACL", "DELUSER", prefix)


@pytest.mark.parametrize(
    "fields", [{"port": 1}, {"host": "nowhere.invalid"}, {"tls": True, "tls_check_hostname": False}]
)
def test_no_redis_there_is_an_error_in_time(settings: Settings, fields: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="dpdl status") as raised:
        make_redis(changed(settings, "redis", **fields))
    assert time.monotonic() - started < 2 * REPLY_TIMEOUT_S + 3
    assert "\n" not in str(raised.value)


def test_something_else_on_the_port_is_told(settings: Settings) -> None:
    port = int(settings.s3.endpoint.rpartition(":")[2])
    with pytest.raises(ServiceUnavailable):
        make_redis(changed(settings, "redis", port=port))


def test_a_foreign_entry_in_our_stream_is_a_data_error(
    settings: Settings, store: ResultStore
) -> None:
    make_redis(settings).xadd(f"{settings.redis.prefix}:alerts", {"hello": "world"})
    with pytest.raises(DataError, match="unreadable"):
        store.alerts()


def test_order_within_a_camera_is_the_order_of_offsets(store: ResultStore) -> None:
    cameras = [f"cam-{n}" for n in range(3)]
    frames = [result(n, cameras[n % 3]) for n in range(99)]
    for first in range(0, 99, 33):
        put(store, first, frames[first : first + 33])
    for camera in cameras:
        offsets = [each.result.offset for each in store.scores(camera)]
        assert all(newer > older for newer, older in itertools.pairwise(offsets))
        assert len(offsets) == 33
