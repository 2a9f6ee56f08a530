"""What the console makes of a camera's state, a version's manifest and a stretch of scores."""

import pytest

from infra.answers import Answer
from infra.cameras import CameraState, ModelBinding, ThresholdOverride
from infra.messages import FrameResult
from infra.model_store import Move, Pointer
from infra.redis_client import StoredResult
from serving.console import views

NOW_S = 1_800_000_000.0


def state(camera="cam", *, seen_s_ago=1.0, share=0.0, **more):
    at_ns = int((NOW_S - seen_s_ago) * 1e9)
    fields = {
        "frames": 100, "anomalies": 0, "alerts": 0, "last_captured_at_ns": at_ns,
        "last_scored_at_ns": at_ns, "last_score": 0.5, "last_frame": "t/0/1",
        "threshold_used": 1.0, "model": "m", "version": "v", "override": None,
        "frames_per_s": 5.0, "alert_share": share, "last_alert_at_ns": None,
        "last_alert_frame": None, "last_alert_evidence": None,
    }  # fmt: skip
    return CameraState(camera=camera, **(fields | more))


def stored(offset, score, version="v", evidence=""):
    result = FrameResult(
        frame_id=f"frames/0/{offset}", camera="cam", captured_at_ns=offset * 10**9,
        scored_at_ns=offset * 10**9, score=score, threshold=1.0, energy=0.0,
        is_anomaly=score > 1.0, model="m", version=version, evidence_key=evidence,
    )  # fmt: skip
    return StoredResult(f"{offset}-0", result)


@pytest.mark.parametrize(
    ("seen_s_ago", "share", "want"),
    [
        (1, 0.0, "ok"),
        (1, 0.05, "ok"),
        (1, 0.051, "alerting"),
        (301, 0.9, "silent"),
        (299, None, "ok"),
    ],
)
def test_a_camera_is_silent_after_five_minutes_and_alerting_above_five_percent(
    seen_s_ago, share, want
):
    assert views.camera(state(seen_s_ago=seen_s_ago, share=share), NOW_S).state == want


@pytest.mark.parametrize("captured_s", [0.0, NOW_S - 86400, NOW_S + 86400])
def test_a_cameras_own_clock_makes_it_neither_silent_nor_not(captured_s):
    at = {"last_captured_at_ns": int(captured_s * 1e9)}
    assert views.camera(state(**at), NOW_S).state == "ok"
    assert views.camera(state(seen_s_ago=301, **at), NOW_S).state == "silent"


def test_a_scorer_whose_clock_was_far_ahead_hides_no_silence():
    """Each new frame is scored by now: what lies in the future has been the last one."""
    assert views.camera(state(seen_s_ago=-60), NOW_S).state == "ok"
    assert views.camera(state(seen_s_ago=-3600), NOW_S).state == "silent"


def test_a_camera_that_was_only_configured_is_silent():
    assert views.camera(state(last_scored_at_ns=None), NOW_S).state == "silent"


def test_the_worst_camera_comes_first(monkeypatch):
    monkeypatch.setattr(views.time, "time", lambda: NOW_S)
    states = [
        state("quiet"), state("gone", seen_s_ago=999), state("bad", share=0.2),
        state("worse", share=0.7), state("also quiet", share=0.01),
    ]  # fmt: skip
    shown = [each.camera for each in views.cameras(states)]
    assert shown == ["worse", "bad", "gone", "also quiet", "quiet"]
    assert [each.camera for each in views.cameras(states, 3)] == shown[:3]


WELDS = ModelBinding("welds", "ann", 7 * 10**6)


@pytest.mark.parametrize(
    ("chosen_for", "now", "threshold", "is_for"),
    [
        (("", "v"), {}, 2.5, ""),
        (("", ""), {"model": None, "version": None}, 2.5, ""),  # before its first frame
        (("", "v"), {"version": "v2"}, 2.5, "version v"),
        (("", "v"), {"binding": WELDS}, 1.0, "the default model"),
        (("welds", "w"), {"binding": WELDS, "model": "welds", "version": "w"}, 2.5, ""),
        (("welds", "w"), {"binding": WELDS}, 1.0, "model welds"),  # the default one stands in
        (("welds", "w"), {}, 1.0, "model welds"),
    ],
)
def test_an_override_shows_with_who_and_when_and_what_it_was_chosen_for(
    chosen_for, now, threshold, is_for
):
    override = ThresholdOverride(2.5, "ann", 7 * 10**6, *chosen_for)
    shown = views.camera(state(override=override, **now), NOW_S)
    assert (shown.threshold, shown.override, shown.override_by) == (threshold, 2.5, "ann")
    assert shown.override_is_for == is_for
    assert shown.override_at_ms == 7.0


def test_pictures_come_from_the_evidence_or_else_from_kafka():
    alert = views.frame(stored(3, 2.0, evidence="frames/00000/00000000000000000003"), {})
    assert alert.frame_url == "api/v1/evidence/frames/00000/00000000000000000003/frame"
    assert alert.heat_url == "api/v1/evidence/frames/00000/00000000000000000003/heat.png"
    quiet = views.frame(stored(3, 0.5), {})
    assert (quiet.frame_url, quiet.heat_url) == ("api/v1/frames/frames/0/3-3000000000", None)


def test_the_trouble_of_each_replica_is_told():
    def consumer(trouble):
        return {"pid": 1, "frames": 7, "trouble": trouble}

    assert views.replicas([consumer("")]) == consumer("")
    told = views.replicas([consumer(""), consumer("Kafka is away"), consumer("starting")])
    assert told == consumer("Kafka is away; starting")
    assert views.replicas([consumer("the same"), consumer("the same")])["trouble"] == "the same"

    scorers = [
        {"version": "v1", "trouble": {"welds": "no version"}, "refused": {}},
        {"version": "v1", "trouble": {}, "refused": {"v2": "broken"}},
    ]
    told = views.replicas(scorers)
    assert told["trouble"] == {"welds": "no version"}
    assert told["refused"] == {"v2": "broken"}

    lost = views.replicas([consumer(""), TimeoutError()])
    assert lost == consumer("1 of 2 replicas: no answer (TimeoutError)")
    lost = views.replicas([consumer("Kafka is away"), TimeoutError()])
    assert lost["trouble"] == "Kafka is away; 1 of 2 replicas: no answer (TimeoutError)"
    lost = views.replicas([scorers[0], TimeoutError()])["trouble"]
    assert lost == {"welds": "no version", "replicas": "1 of 2 replicas: no answer (TimeoutError)"}
    assert views.replicas([OSError()]) == {"trouble": "1 of 1 replicas: no answer (OSError)"}


def test_a_frame_shows_its_answer():
    answer = Answer(
        frame_id="frames/0/3", captured_at_ns=3 * 10**9, kind="defect", defect="crack", by="ann",
        at_ns=5 * 10**6, dataset="d",
    )  # fmt: skip
    shown = views.frame(stored(3, 2.0), {"frames/0/3": answer}).answer
    assert shown.model_dump() == {"kind": "defect", "defect": "crack", "by": "ann", "at_ms": 5.0}


def test_a_timeline_is_oldest_first_and_names_its_versions_once():
    rows = [stored(3, 0.3, "v2"), stored(2, 0.2, "v1"), stored(1, 0.1, "v1")]
    line = views.timeline(rows, True, 2, 3)
    assert (line.id, line.score) == (["1-0", "2-0", "3-0"], [0.1, 0.2, 0.3])
    assert [line.versions[i] for i in line.version] == ["v1", "v1", "v2"]
    assert (line.alert_k, line.alert_n) == (2, 3)


def test_a_version_without_a_decision_says_why_it_was_first_promoted():
    moves = tuple(
        Move(version=v, at="2026-01-01", by="ann", why=why, nonce="")
        for v, why in (("v1", "the first version"), ("v2", "better"), ("v1", "rolled back"))
    )
    pointer = Pointer(
        version="v1", previous="v2", promoted_at="", by="", why="", etag="", moves=moves
    )
    shown = views.version("v1", {"stored_at": "2026-01-01"}, pointer, None)
    assert (shown.current, shown.why, shown.decision) == (True, "the first version", "")


def test_a_broken_version_has_the_date_of_s3_and_says_what_is_wrong():
    manifest = {"kind": "broken", "stored_at": "2026-01-01T00:00:00+00:00", "broken": "no JSON"}
    shown = views.version("v1", manifest, None, None)
    assert (shown.kind, shown.created_at, shown.why) == ("broken", manifest["stored_at"], "no JSON")
