"""What is looked up in a real Valkey, within bounds; and what people set for one camera."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from results import GROUP, TOPIC, changed, put, result

from infra.messages import FrameResult, frame_id
from infra.redis_client import ResultStore
from infra.redis_connection import make_redis
from infra.settings import Settings
from serving.console import lookup

pytestmark = pytest.mark.integration


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
    assert camera.last_alert_evidence == old[995].evidence_key


@pytest.mark.parametrize("ahead_s", [30, 86400])
def test_a_scorer_whose_clock_was_far_ahead_leaves_no_rate_behind(
    store: ResultStore, ahead_s: int
) -> None:
    """A frame in two seconds for half an hour, after two by another scorer: of which a few seconds
    ahead are nothing, and what comes after a day ahead begins anew."""
    now_ns = time.time_ns()

    def scored(offset: int, at_s: float) -> FrameResult:
        return replace(result(offset), scored_at_ns=now_ns + round(at_s * 1e9))

    put(store, 0, [scored(i, ahead_s - 1800) for i in range(2)])
    put(store, 2, [scored(2 + i, 2 * i - 1798) for i in range(900)])
    (camera,) = store.cameras()
    assert camera.frames == 902
    assert camera.frames_per_s == pytest.approx(0.5, rel=0.1)


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


def test_the_alerts_of_a_quiet_camera_are_found_far_behind_those_of_others(
    settings: Settings, store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 0, [result(0, "quiet", anomaly=True)])
    noise = result(1, "noisy", anomaly=True).to_redis()
    pipeline = make_redis(settings).pipeline(transaction=False)
    for _ in range(8_000):
        pipeline.xadd(f"{settings.redis.prefix}:alerts", noise)
    pipeline.execute()
    monkeypatch.setattr(lookup, "SEARCH_S", 60.0)  # a busy machine
    found, older, newest = lookup.alerts_back(store, 50, "", "quiet", None, None)
    assert ([each.result.offset for each in found], older) == ([0], None)
    assert newest == store.latest_alerts(1)[0].id
    # When the time is up the page says where to go on, and going on ends.
    monkeypatch.setattr(lookup, "SEARCH_S", 0.0)
    before, pages = "", 0
    while True:
        found, older, _ = lookup.alerts_back(store, 50, before, "quiet", None, None)
        pages += 1
        if older is None:
            break
        assert found == []
        before = older
    assert [each.result.offset for each in found] == [0]
    assert pages == 5


def test_a_threshold_has_an_owner_and_a_time(store: ResultStore) -> None:
    put(store, 0, [result(0, "seen")])
    for camera in ("seen", "not yet seen"):
        store.set_threshold(camera, 1 / 3, by="anna@line-2")
    found = store.thresholds(["seen", "not yet seen", "other", "seen"])
    assert set(found) == {"seen", "not yet seen"}
    assert found["seen"].threshold == 1 / 3
    assert found["seen"].by == "anna@line-2"
    assert (found["seen"].model, found["seen"].version) == ("", "v-1")
    assert (found["not yet seen"].model, found["not yet seen"].version) == ("", "")
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


def test_a_threshold_is_for_the_model_that_the_camera_is_bound_to(store: ResultStore) -> None:
    put(store, 0, [result(0, "cam")])
    store.bind_model("cam", "welds", by="anna")
    store.set_threshold("cam", 2.0, by="anna")
    found = store.thresholds(["cam"])["cam"]
    assert (found.model, found.version) == ("welds", "")  # the default one's version is another's
    put(store, 1, [replace(result(1, "cam"), model="welds", version="w-1")])
    store.set_threshold("cam", 2.5, by="anna")
    found = store.thresholds(["cam"])["cam"]
    assert (found.threshold, found.model, found.version) == (2.5, "welds", "w-1")
    store.bind_model("cam", None, by="anna")
    cam = store.camera("cam")
    assert cam is not None
    assert cam.override == found
    assert cam.override_is_for == "model welds"
    store.set_threshold("cam", None, by="anna")
    assert store.thresholds(["cam"]) == {}


def test_a_threshold_of_before_the_model_was_kept_stays_with_the_cameras_own(
    settings: Settings, store: ResultStore
) -> None:
    for camera in ("bound", "not bound"):
        store.set_threshold(camera, 2.0, by="anna")
        key = f"{settings.redis.prefix}:camera:{camera}"
        make_redis(settings).hdel(key, "threshold_model", "threshold_version")
    store.bind_model("bound", "welds", by="anna")
    found = store.thresholds(["bound", "not bound"])
    assert {name: one.model for name, one in found.items()} == {"bound": "welds", "not bound": ""}


@pytest.mark.parametrize("camera", ["a:b", "käm{1} *?[x]", "'; flushall", "x" * 128, "0"])
def test_any_camera_id_keeps_to_its_own_keys(store: ResultStore, camera: str) -> None:
    put(store, 0, [result(0, camera, anomaly=True)])
    assert [each.result.camera for each in store.scores(camera)] == [camera]
    assert [state.camera for state in store.cameras()] == [camera]


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
