"""The comparison of a replay against NumPy, and what --from and --to understand."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from infra.messages import FrameResult
from serving.compare import MAX_EXAMPLES, Comparison
from serving.replay import Place


def result(offset, score, *, camera="cam-1", version="v1"):
    return FrameResult(
        frame_id=f"frames/0/{offset}",
        camera=camera,
        captured_at_ns=1,
        scored_at_ns=2,
        score=float(score),
        threshold=1.0,
        energy=0.0,
        is_anomaly=bool(score > 1.0),
        model="default",
        version=version,
        evidence_key="",
    )


def compared(then, now, camera="cam-1", into=None):
    comparison = into or Comparison()
    for offset, (x, y) in enumerate(zip(then, now, strict=True)):
        old = None if x is None else result(offset, x, camera=camera)
        comparison.add(
            old,
            result(offset, y, camera=camera, version="v2"),
            alert_then=x is not None and x > 1.0,
            alert_now=y > 1.0,
        )
    return comparison


def test_figures_equal_numpys():
    rng = np.random.default_rng(0)
    then = 1e4 + rng.standard_normal(500)
    now = then + 0.5 * rng.standard_normal(500)
    report = compared(then, now).report()
    assert report["score_correlation"] == pytest.approx(np.corrcoef(then, now)[0, 1], rel=1e-9)
    then, now = rng.uniform(0, 2, 500), rng.uniform(0, 2, 500)
    report = compared(then, now).report()
    assert report["agreement"] == np.mean((then > 1) == (now > 1))
    assert report["alerts_then"] == np.sum(then > 1)
    assert report["alerts_now"] == np.sum(now > 1)
    assert report["alerts_only_then"] == np.sum((then > 1) & (now <= 1))
    assert report["alerts_only_now"] == np.sum((then <= 1) & (now > 1))
    assert report["versions_then"] == {"default/v1": 500}
    assert len(report["examples"]) == MAX_EXAMPLES


def test_frames_whose_result_is_gone_are_counted_and_not_compared():
    report = compared([None, 0.5, None, 2.0], [9.0, 0.5, 0.1, 2.0]).report()
    assert (report["frames"], report["compared"], report["agreement"]) == (4, 2, 1.0)
    assert report["alerts_now"] == 1
    assert report["examples"] == []


def test_cameras_are_told_apart_and_add_up():
    both = compared([2.0, 2.0], [0.0, 2.0], "cam-1")
    compared([0.0], [2.0], "cam-2", into=both)
    report = both.report()
    assert report["cameras"]["cam-1"]["alerts_only_then"] == 1
    assert report["cameras"]["cam-2"]["alerts_only_now"] == 1
    assert report["frames"] == 3
    assert {e["camera"]: e["alert"] for e in report["examples"]} == {
        "cam-1": "only then",
        "cam-2": "only now",
    }


@pytest.mark.parametrize("now", [[1.0, 1.0, 1.0], [0.3, 0.3, 0.3]])
def test_no_correlation_of_scores_that_never_change(now):
    assert compared([0.1, 0.2, 0.3], now).report()["score_correlation"] is None
    assert Comparison().report()["agreement"] is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("0", Place(offset=0)),
        ("1200", Place(offset=1200)),
        ("90s", Place(time_ms=910_000)),
        ("10m", Place(time_ms=400_000)),
        ("2026-11-25T08:00+00:00", Place(time_ms=1_795_593_600_000)),
        ("2026-11-25", Place(time_ms=int(datetime(2026, 11, 25).timestamp() * 1000))),
    ],
)
def test_places_in_the_past(text, place):
    assert Place.parse(text, now_s=1000.0) == place


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "2x", "1e3", "2026-13-45"])
def test_what_is_no_place_says_what_is_wanted(text):
    with pytest.raises(ValueError, match="wanted an offset"):
        Place.parse(text)
