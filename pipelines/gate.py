"""May a candidate replace the current model? Both judged on the same held-out images.

Knows scores and thresholds only: no S3, no model. The images are known defects that both have
learnt, old held-out normals and new held-out normals (held_out.py); the test split is never looked
at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpdl_core.metrics import auroc
from pipelines.scoring import Scores, alarms, calibrate


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    max_auroc_drop: float = 0.01
    """Known defects against all held-out normals, current minus candidate."""
    false_alarm_sigmas: float = 3.0
    """A group of n held-out normals may alarm at the stated rate plus so many binomial standard
    deviations: 3 of 1,000 good candidates are held for no reason."""


@dataclass(frozen=True)
class Held:
    """One model's scores of the held-out images; cameras are those of the normals."""

    defects: Scores
    old_normals: Scores
    new_normals: Scores
    """Empty at a training where the current version has accepted none since its own."""


@dataclass(frozen=True)
class Verdict:
    promote: bool
    why: str
    """One line, in numbers."""
    numbers: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    """`why` in its parts: what holds the candidate, or what speaks for it."""


def judge(
    current: Held,
    candidate: Held,
    *,
    old_cameras: Sequence[str],
    new_cameras: Sequence[str],
    current_thresholds: dict[str, Any],
    candidate_thresholds: dict[str, Any] | None = None,
    false_alarm_rate: float,
    limits: GateLimits | None = None,
) -> Verdict:
    """Promote unless the candidate is worse than the limits allow.

    The current model alarms by the thresholds it is deployed with. The candidate's were set on
    these very normals, so its alarms are counted by cross-fitting: thresholds from one half, alarms
    on the other, both ways. With candidate_thresholds, those were set on the old normals alone, and
    the new ones are judged by them as they stand. False alarms hold a candidate only where it is
    also worse than the current model: after a drift, better is what is asked, not perfect.
    """
    limits = limits or GateLimits()
    cameras = [*old_cameras, *new_cameras]
    if not cameras:
        why = (
            "there are no normals that neither of the two has learnt: the data set was imported "
            "anew; compare test AUROCs, then `dpdl models promote`"
        )
        return Verdict(False, why, {}, [why])
    reasons, figures = [], []
    numbers: dict[str, Any] = {"known_defects": len(candidate.defects)}
    if len(candidate.defects):
        before, after = _auroc(current), _auroc(candidate)
        numbers |= {"auroc_current": before, "auroc_candidate": after}
        figures.append(f"AUROC on known defects {before:.3f} -> {after:.3f}")
        if before - after > limits.max_auroc_drop:
            reasons.append(f"AUROC falls by more than {limits.max_auroc_drop:g}")
    else:
        figures.append("no known defects that both have learnt, AUROC not compared")
    alarmed_before = alarms(_normals(current), cameras, current_thresholds)
    if candidate_thresholds is None:
        alarmed_after, rate = _cross_fitted(_normals(candidate), cameras, false_alarm_rate)
    else:
        old, rate = _cross_fitted(candidate.old_normals, old_cameras, false_alarm_rate)
        new = alarms(candidate.new_normals, new_cameras, candidate_thresholds)
        alarmed_after = np.concatenate([old, new])
    start = 0
    for group, count in (("old", len(old_cameras)), ("new", len(new_cameras))):
        if not count:
            continue
        rows = slice(start, start + count)
        start += count
        was, now = float(alarmed_before[rows].mean()), float(alarmed_after[rows].mean())
        bound = rate + limits.false_alarm_sigmas * math.sqrt(rate * (1 - rate) / count)
        numbers |= {
            f"{group}_normals": count,
            f"false_alarms_{group}_current": was,
            f"false_alarms_{group}_candidate": now,
            f"false_alarms_{group}_bound": bound,
        }
        figures.append(f"false alarms on {count} {group} normals {was:.3f} -> {now:.3f}")
        if now > bound and now > was:
            reasons.append(f"false alarms on {group} normals above {bound:.3f}")
    why = "; ".join(figures)
    if reasons:
        return Verdict(False, f"{', '.join(reasons)} ({why})", numbers, reasons)
    return Verdict(True, why, numbers, figures)


def _normals(held: Held) -> Scores:
    return np.concatenate([held.old_normals, held.new_normals])


def _auroc(held: Held) -> float:
    normals = _normals(held)
    labels = np.repeat([0, 1], [len(normals), len(held.defects)])
    return auroc(labels, np.concatenate([normals, held.defects]))


def _cross_fitted(
    scores: Scores, cameras: Sequence[str], false_alarm_rate: float
) -> tuple[np.ndarray[Any, Any], float]:
    """bool (N,) alarms by thresholds that did not see the score, and the rate they were set for."""
    alarmed = np.zeros(len(scores), bool)
    rates = []
    fold = np.arange(len(scores)) % 2
    for side in (0, 1):
        fitted = np.flatnonzero(fold != side).tolist()
        judged = np.flatnonzero(fold == side).tolist()
        if not fitted:
            continue
        thresholds, _ = calibrate(scores[fitted], [cameras[i] for i in fitted], false_alarm_rate)
        alarmed[judged] = alarms(scores[judged], [cameras[i] for i in judged], thresholds)
        rates.append(thresholds["false_alarm_rate"])
    return alarmed, max(rates, default=false_alarm_rate)
