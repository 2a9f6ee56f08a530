"""Thresholds over held-out scores: the stated rate is kept, and too few normals are said to be."""

import numpy as np
import pytest

from pipelines.scoring import alarms, calibrate


def test_fresh_normals_alarm_at_most_at_the_stated_rate():
    """Oracle: simulation. Mean over draws of the alarm rate of a large fresh sample."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        thresholds, notes = calibrate(rng.normal(size=99), [""] * 99, 0.05)
        assert notes == []
        rates.append((rng.normal(size=2000) > thresholds["default"]).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)  # four standard errors


def test_a_camera_gets_its_own_threshold_where_it_has_enough_normals():
    scores = np.concatenate([np.arange(40.0), np.arange(5.0) + 100])
    cameras = ["cam-1"] * 40 + ["cam-2"] * 5
    thresholds, _ = calibrate(scores, cameras, 0.1)
    assert set(thresholds["cameras"]) == {"cam-1"}
    assert thresholds["cameras"]["cam-1"] < 40 < thresholds["default"]
    assert thresholds["calibration_normals"] == 45


def test_too_few_normals_lower_the_claim_not_the_threshold():
    thresholds, notes = calibrate(np.arange(9.0), [""] * 9, 0.01)
    assert thresholds["false_alarm_rate"] == pytest.approx(0.1)
    assert thresholds["default"] == 8.0
    assert "99 are needed" in notes[0]


def test_no_normals_at_all_are_refused():
    with pytest.raises(ValueError, match="no held-out normals"):
        calibrate(np.empty(0), [], 0.01)


def test_alarms_use_each_cameras_threshold():
    thresholds = {"default": 1.0, "cameras": {"cam-1": 5.0}}
    got = alarms(np.array([2.0, 2.0, 1.0]), ["cam-1", "cam-9", "cam-9"], thresholds)
    assert got.tolist() == [False, True, False]  # at the threshold is no alarm
