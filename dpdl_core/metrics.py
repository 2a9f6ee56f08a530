"""AUROC, average precision, and alert thresholds with a stated false-alarm rate.

Knows arrays only. Labels are 0 for normal, 1 for anomaly; higher scores mean more anomalous.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of (N,) labels and scores; ties count one half.

    Raises ValueError for a score that is not finite or when one of the two classes is missing.
    """
    y, s = _checked(labels, scores)
    return float(roc_auc_score(y, s))


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Average precision, anomalies positive; errors as in `auroc`."""
    y, s = _checked(labels, scores)
    return float(average_precision_score(y, s))


def _checked(
    labels: npt.ArrayLike, scores: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"labels {y.shape} and scores {s.shape}: need two equal lengths")
    if not np.isfinite(s).all():
        raise ValueError(f"{int((~np.isfinite(s)).sum())} of {s.size} scores are not finite")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels other than 0 (normal) and 1 (anomaly)")
    if y.min(initial=1) == y.max(initial=0):
        raise ValueError(f"{s.size} labels of one class: need normals and anomalies")
    return y.astype(np.int64), s


def conformal_threshold(
    normal_scores: npt.ArrayLike, false_alarm_rate: float, moments: npt.ArrayLike = ()
) -> float:
    """Threshold t such that a fresh normal image has P(score > t) <= false_alarm_rate.

    Split conformal: t is the ceil((n+1)(1-rate))-th smallest of n scores of held-out normals,
    which the model has not trained on. The bound holds for any distribution and any n, on average
    over draws of the held-out normals, as long as these and the fresh image are exchangeable;
    with no ties P is above rate - 1/(n+1).
    moments: of each score; those of one are about one picture and weigh as one together. n counts
    them then, and the bound is that of an image of a fresh moment, where moments are exchangeable
    (hierarchical conformal prediction, arXiv:2306.06342v4).

    Raises ValueError that says how many normals are needed when n is too small for the rate.
    """
    s = np.asarray(normal_scores, dtype=np.float64)
    if s.ndim != 1 or not np.isfinite(s).all():
        raise ValueError(f"scores of shape {s.shape}: need a list of finite numbers")
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate={false_alarm_rate}: need a number between 0 and 1")
    weight = moment_weights(moments) if np.size(moments) else np.ones(s.size)
    count = round(weight.sum())
    # How many of the n+1 may lie above, less the fresh one; 1e-9 because 1000 * 0.001 is
    # 0.9999999... for some rates.
    allowed = (count + 1) * false_alarm_rate - 1 + 1e-9
    if allowed < 0:
        needed = math.ceil(1 / false_alarm_rate - 1e-9) - 1
        raise ValueError(
            f"{count} held-out normals cannot support a false-alarm rate of {false_alarm_rate:g}: "
            f"need at least {needed}, or a rate of at least {1 / (count + 1):.3g}"
        )
    order = np.argsort(s)[::-1]
    above = np.cumsum(weight[order]) - weight[order]
    return float(s[order[above <= allowed][-1]])


def moment_weights(moments: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(N,) weights, 1 for all of a moment together."""
    _, at, counts = np.unique(moments, return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[at], np.float64)
