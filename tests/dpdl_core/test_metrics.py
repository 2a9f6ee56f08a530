"""AUROC and AP by hand, and the conformal guarantee by simulation."""

import numpy as np
import pytest

from dpdl_core.metrics import auroc, average_precision, conformal_threshold


def test_auroc_counts_pairs():
    """Oracle: share of (normal, anomaly) pairs in the right order, ties one half."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = rng.integers(0, 8, 60).astype(float)
    pairs = [(a > n) + 0.5 * (a == n) for a in scores[labels == 1] for n in scores[labels == 0]]
    assert auroc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_average_precision_by_hand():
    # ranks of the anomalies are 1 and 3: (1/1 + 2/3) / 2
    assert average_precision([1, 0, 1, 0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1.0, 2.0], "one class"),
        ([0, 1], [1.0, float("nan")], "not finite"),
        ([0, 1], [1.0], "equal lengths"),
        ([0, 2], [1.0, 2.0], "labels other"),
    ],
)
def test_what_has_no_auroc(labels, scores, message):
    for metric in (auroc, average_precision):
        with pytest.raises(ValueError, match=message):
            metric(labels, scores)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("count", [19, 100, 283])
def test_threshold_is_the_stated_order_statistic(rate, count):
    rank = int(np.ceil(round((count + 1) * (1 - rate), 9)))
    scores = np.random.default_rng(count).permutation(count) + 1.0  # 1..n: value is rank
    if rank > count:
        with pytest.raises(ValueError, match="need at least"):
            conformal_threshold(scores, rate)
    else:
        assert conformal_threshold(scores, rate) == rank


@pytest.mark.parametrize("draw", ["normal", "lognormal", "standard_cauchy"])
def test_false_alarms_stay_within_the_stated_rate(draw):
    """Simulation of the guarantee: P(score > t) <= rate over draws of calibration and test."""
    rng = np.random.default_rng(1)
    rate, count, trials = 0.05, 50, 40_000
    scores = getattr(rng, draw)(size=(trials, count + 1))
    alarms = np.mean([row[-1] > conformal_threshold(row[:-1], rate) for row in scores])
    # Exact for continuous scores: floor(51 * .05) / 51 = 2/51 = .0392; sd of the mean is .001.
    assert alarms == pytest.approx(2 / 51, abs=0.004)
    assert alarms <= rate


def test_ties_only_lower_the_alarms():
    scores = np.repeat([0.0, 1.0], 50)
    assert conformal_threshold(scores, 0.1) == 1.0  # nothing lies above: no alarm at all


def test_too_few_normals_say_how_many_are_needed():
    with pytest.raises(ValueError, match="need at least 99"):
        conformal_threshold(np.arange(98), 0.01)
    assert conformal_threshold(np.arange(99), 0.01) == 98
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        conformal_threshold([1.0], 0.01)
    with pytest.raises(ValueError, match="need at least 999"):
        conformal_threshold(np.arange(998), 0.001)
    assert conformal_threshold(np.arange(999), 0.001) == 998


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="false_alarm_rate"):
        conformal_threshold(np.arange(100), rate)


def test_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        conformal_threshold([1.0, float("inf")], 0.5)


def test_scores_of_one_moment_weigh_as_one():
    """By brute force. Of four moments 5 times the rate, less the fresh image, may lie above."""
    scores, moments = [5, 4, 3, 2.5, 2, 1.5, 1, 0], list("abacbcc") + ["d"]
    weights = {"a": 1 / 2, "b": 1 / 2, "c": 1 / 3, "d": 1}
    above = [sum(weights[m] for s, m in zip(scores, moments, strict=True) if s > t) for t in scores]
    wanted = min(t for t, share in zip(scores, above, strict=True) if share <= 1 + 1e-12)
    assert conformal_threshold(scores, 0.4, moments) == wanted == 3
    assert conformal_threshold(scores, 0.2, moments) == 5
    with pytest.raises(ValueError, match="4 held-out normals"):
        conformal_threshold(scores, 0.19, moments)
    assert conformal_threshold(scores, 0.4, range(8)) == conformal_threshold(scores, 0.4)
