"""May a candidate replace the current model? Both judged on the same held-out images.

Knows scores and thresholds only: no S3, no model. The images are known defects that both have
learnt, old held-out normals and new held-out normals (held_out.py); the test split is never looked
at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from dpdl_core.metrics import auroc, moment_weights
from pipelines.scoring import Scores, alarms, calibrate


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    max_auroc_drop: float = 0.01
    """Known defects against all held-out normals, current minus candidate."""
    max_line_drop: float = 0.03
    """Below the best AUROC of a line of refreshes by more than this, none may lose any more, on the
    images that are the same for all of it: small losses add up."""
    max_recall_drop: float = 0.1
    """Share of the known defects that alarm, current minus candidate, each by its thresholds."""
    false_alarm_chance: float = 0.0013
    """So many alarms of a group of held-out normals, of n moments, are held against a candidate, as
    come by chance with this probability or less, binomial, where it keeps the stated rate."""


@dataclass(frozen=True)
class Held:
    """One model's scores of the held-out images."""

    defects: Scores
    old_normals: Scores
    new_normals: Scores
    """Empty at a training where the current version has accepted none since its own."""


@dataclass(frozen=True)
class Lasting:
    """Which of the held-out images every refresh of a line is judged by: those of its import.

    The others are not the same for two refreshes, and what is harder says nothing of a model.
    """

    defects: npt.NDArray[np.bool_]
    normals: npt.NDArray[np.bool_]
    """Old, then new."""
    name: int
    """The same for the same images alone; a number, as all that a gate records."""


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
    defect_cameras: Sequence[str],
    old_cameras: Sequence[str],
    new_cameras: Sequence[str],
    moments: Sequence[str] = (),
    current_thresholds: dict[str, Any],
    candidate_thresholds: dict[str, Any],
    set_on_new: bool,
    lasting: Lasting | None = None,
    best: Mapping[str, Any] | None = None,
    limits: GateLimits | None = None,
) -> Verdict:
    """Promote unless the candidate is worse than the limits allow.

    Both are given with the thresholds they are, or would be, deployed with. The candidate's were
    set on these very normals, so its false alarms are counted by cross-fitting: thresholds from one
    half of the moments, alarms on the other, both ways. Without set_on_new they were set on the old
    normals alone, and the new ones are judged by them as they stand. False alarms hold a candidate
    only where it is also worse than the current model: after a drift, better is what is asked, not
    perfect. Nor does it count then that the current model's alarms at everything include the known
    defects.
    moments: of the old normals, then the new, as calibrate() counts them; so do the share that
    alarms and its bound, since what was seen within one alarms together.
    lasting: where losses of a line are added up; nowhere without it.
    best: numbers of the current version's own verdict, as far as there is one.
    """
    limits = limits or GateLimits()
    false_alarm_rate = candidate_thresholds["false_alarm_rate"]
    cameras = [*old_cameras, *new_cameras]
    if not cameras:
        why = (
            "there are no normals that neither of the two has learnt: the data set was imported "
            "anew; compare test AUROCs, then `dpdl models promote`"
        )
        return Verdict(False, why, {}, [why])
    reasons, figures, fewer_found = [], [], False
    numbers: dict[str, Any] = {"known_defects": len(candidate.defects)}
    if len(candidate.defects):
        before, after = _auroc(current), _auroc(candidate)
        numbers |= {"auroc_current": before, "auroc_candidate": after}
        figures.append(f"AUROC on known defects {before:.3f} -> {after:.3f}")
        if before - after > limits.max_auroc_drop:
            reasons.append(f"AUROC falls by more than {limits.max_auroc_drop:g}")
        elif fallen := _line_drop(current, candidate, lasting, best or {}, limits, numbers):
            reasons.append(fallen)
        found_before = alarms(current.defects, defect_cameras, current_thresholds).mean()
        found_after = alarms(candidate.defects, defect_cameras, candidate_thresholds).mean()
        numbers |= {"recall_current": float(found_before), "recall_candidate": float(found_after)}
        figures.append(f"of these alarm {found_before:.3f} -> {found_after:.3f}")
        fewer_found = bool(found_before - found_after > limits.max_recall_drop + 1e-9)
    else:
        figures.append("no known defects that both have learnt, AUROC not compared")
    alarmed_before = alarms(_normals(current), cameras, current_thresholds)
    if set_on_new:
        alarmed_after, rate = _cross_fitted(_normals(candidate), cameras, false_alarm_rate, moments)
    else:
        some = moments[: len(old_cameras)]
        old, rate = _cross_fitted(candidate.old_normals, old_cameras, false_alarm_rate, some)
        new = alarms(candidate.new_normals, new_cameras, candidate_thresholds)
        alarmed_after = np.concatenate([old, new])
    start = 0
    for group, count in (("old", len(old_cameras)), ("new", len(new_cameras))):
        if not count:
            continue
        rows = slice(start, start + count)
        start += count
        weight = moment_weights(moments[rows]) if moments else np.ones(count)
        was, now = (
            float(np.average(a[rows], weights=weight)) for a in (alarmed_before, alarmed_after)
        )
        apart = round(weight.sum())
        bound = float(binom.isf(limits.false_alarm_chance, apart, rate)) / apart
        numbers |= {
            f"{group}_normals": count,
            f"false_alarms_{group}_current": was,
            f"false_alarms_{group}_candidate": now,
            f"false_alarms_{group}_bound": bound,
        }
        figures.append(f"false alarms on {count} {group} normals {was:.3f} -> {now:.3f}")
        if now > bound and now > was:
            reasons.append(f"false alarms on {group} normals above {bound:.3f}")
        if was > bound:
            fewer_found = False  # what alarms at everything finds every defect
    if fewer_found:
        reasons.append(f"known defects that alarm fall by more than {limits.max_recall_drop:g}")
    why = "; ".join(figures)
    if reasons:
        return Verdict(False, f"{', '.join(reasons)} ({why})", numbers, reasons)
    return Verdict(True, why, numbers, figures)


def _line_drop(
    current: Held,
    candidate: Held,
    lasting: Lasting | None,
    past: Mapping[str, Any],
    limits: GateLimits,
    numbers: dict[str, Any],
) -> str:
    """Why a candidate loses too much of its line's best; "" where it does not. Puts the best AUROC,
    and of which images it is, among the numbers."""
    if lasting is None or not lasting.defects.any() or not lasting.normals.any():
        return ""
    before, after = (_auroc(held, lasting) for held in (current, candidate))
    best = before
    if past.get("auroc_best_on") == lasting.name:
        best = max(best, past["auroc_best"])
    numbers |= {"auroc_best": max(best, after), "auroc_best_on": lasting.name}
    if after < before and best - after > limits.max_line_drop + 1e-9:
        return f"AUROC falls further below the {best:.3f} that there was"
    return ""


def _normals(held: Held) -> Scores:
    return np.concatenate([held.old_normals, held.new_normals])


def _auroc(held: Held, lasting: Lasting | None = None) -> float:
    normals, defects = _normals(held), held.defects
    if lasting is not None:
        normals, defects = normals[lasting.normals], defects[lasting.defects]
    labels = np.repeat([0, 1], [len(normals), len(defects)])
    return auroc(labels, np.concatenate([normals, defects]))


def _cross_fitted(
    scores: Scores, cameras: Sequence[str], false_alarm_rate: float, moments: Sequence[str]
) -> tuple[np.ndarray[Any, Any], float]:
    """bool (N,) alarms by thresholds that did not see the score, and the rate they were set for."""
    alarmed = np.zeros(len(scores), bool)
    rates = []
    numbers: dict[str | int, int] = {}
    fold = np.array(
        [numbers.setdefault(of, len(numbers)) % 2 for of in moments or range(len(scores))], int
    )
    for side in (0, 1):
        fitted = np.flatnonzero(fold != side).tolist()
        judged = np.flatnonzero(fold == side).tolist()
        if not fitted:
            continue
        thresholds, _ = calibrate(
            scores[fitted],
            [cameras[i] for i in fitted],
            false_alarm_rate,
            [moments[i] for i in fitted] if moments else (),
        )
        alarmed[judged] = alarms(scores[judged], [cameras[i] for i in judged], thresholds)
        rates.append(thresholds["false_alarm_rate"])
    return alarmed, max(rates, default=false_alarm_rate)
