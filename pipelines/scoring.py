"""Scores of held-out images, and the alert thresholds that they support. Used by train, refresh
and gate, so that all three mean the same by a score and by a false alarm.

Letters: N images.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dpdl_core import drift
from dpdl_core.metrics import conformal_threshold, moment_weights
from dpdl_core.model import Dpdl
from pipelines.sources import RowRef

SCORE_BATCH = 32
NICENESS = 5
FEW = 9
"""Held-out normals of one camera, of as many moments, whose highest score says something: a fresh
normal exceeds it with probability 1 / (FEW + 1) at most."""

Scores = npt.NDArray[np.float64]


class ImagesWithRows(Protocol):
    num_images: int
    rows: list[RowRef]

    def batches(self, batch_size: int) -> Any: ...


@dataclass(frozen=True)
class Observed:
    """What a model says of N images, in the order of source.rows."""

    score: Scores
    """(N,)."""
    energy: Scores
    """(N,)."""
    winners: npt.NDArray[np.int32]
    """(N, L) nearest prototypes, for dpdl_core.drift."""


def chosen_device(wanted: str) -> str:
    """The device that was asked for; with "", a GPU where this process has one."""
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def observe(model: Dpdl, source: ImagesWithRows) -> Observed:
    """Scores every image of a source."""
    return observe_each([model], source)[0]


@torch.inference_mode()
def observe_each(models: Sequence[Dpdl], source: ImagesWithRows) -> list[Observed]:
    """What each model says of every image, on the models' device; models with the same trunk look
    through it once."""
    first = [
        next(j for j in range(i + 1) if _same(models[j].trunk, model.trunk))
        for i, model in enumerate(models)
    ]
    rows: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in models]
    for images in source.batches(SCORE_BATCH):
        maps = {i: models[i].trunk(images.to(models[i].weights.device)) for i in set(first)}
        for model, i, seen in zip(models, first, rows, strict=True):
            found = model.judge(model.pool(maps[i]), maps[i])
            seen.append((found.score.double(), found.energy.double(), found.winners.int()))
    return [
        Observed(*(torch.cat(column).cpu().numpy() for column in zip(*seen, strict=True)))
        if seen
        else Observed(np.empty(0), np.empty(0), np.empty((0, 0), np.int32))
        for seen in rows
    ]


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def drift_reference(
    model: Dpdl, normals: Sequence[Observed], cameras: Sequence[str]
) -> dict[str, Any]:
    """What dpdl_core.drift holds the stream against: held-out normals, as this model sees them."""
    some = [part for part in normals if len(part.score)]
    if not some:
        return {}
    first = next(iter(model.parts.energies.patches))
    return drift.reference(
        np.concatenate([part.energy for part in some]),
        np.concatenate([part.winners for part in some]),
        cameras,
        model.parts.energies.sizes[f"patch {first}"],
    )


def calibrate(
    scores: Scores, cameras: Sequence[str], false_alarm_rate: float, moments: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Thresholds by split conformal over held-out normals, and what a person should know of them.

    What a camera saw within one moment counts as one normal throughout: it is about one picture,
    and a burst of near-duplicates would set a threshold alone (held_out.moment; without `moments`
    each image is of its own). A camera gets its own where it has normals of enough moments for the
    rate. The others share the default, from all normals, which keeps the rate over all of them; but
    for those of cameras unlike the others, which would lift it until no defect of the others is
    found. A camera with FEW moments or more, the highest of its scores above the default, gets
    that: it must not alarm all the time until it has enough. Where even all are too few, the
    threshold is the highest normal score and the stated rate is the one that so many normals can
    support, 1/(N+1): never a rate that is not kept.
    Raises ValueError with no scores at all.
    """
    if not len(scores):
        raise ValueError("no held-out normals: a threshold needs some")
    # As numbers: each camera is held against all others, and names take long to sort.
    named = _by_camera(cameras, moments or list(map(str, range(len(scores)))))
    of = np.unique(named, return_inverse=True)[1]
    count = len(set(of.tolist()))
    lowest = 1 / (count + 1)
    notes = []
    if lowest > false_alarm_rate * (1 + 1e-9):
        notes.append(
            f"{count} held-out normals of different moments support a false-alarm rate of "
            f"{lowest:.3f}, not {false_alarm_rate:g}: {math.ceil(1 / false_alarm_rate) - 1} are "
            "needed for that"
        )
        false_alarm_rate = lowest
    needed = math.ceil(1 / false_alarm_rate - 1e-9) - 1
    names = np.array(cameras)
    rows = {camera: names == camera for camera in sorted(set(cameras) - {""})}
    others = ~_unlike(scores, of, rows, false_alarm_rate)
    default = conformal_threshold(scores[others], false_alarm_rate, of[others])
    num_moments = {camera: len(set(of[mine].tolist())) for camera, mine in rows.items()}
    own = {}
    for camera, mine in rows.items():
        if num_moments[camera] >= needed:
            own[camera] = conformal_threshold(scores[mine], false_alarm_rate, of[mine])
        elif num_moments[camera] >= FEW and scores[mine].max() > default:
            own[camera] = float(scores[mine].max())
    short = [f"{c} ({found})" for c, found in num_moments.items() if found < needed]
    if short:
        notes.append(
            f"{needed} held-out normals of different moments are needed for a camera's own "
            f"threshold; fewer have {', '.join(short)}"
        )
    return {
        "false_alarm_rate": false_alarm_rate,
        "default": default,
        "cameras": own,
        "calibration_normals": len(scores),
    }, notes


def _by_camera(cameras: Sequence[str], moments: Sequence[str]) -> list[str]:
    return [f"{camera} {moment}" for camera, moment in zip(cameras, moments, strict=True)]


def _unlike(
    scores: Scores,
    moments: npt.NDArray[np.intp],
    rows: Mapping[str, npt.NDArray[np.bool_]],
    rate: float,
) -> npt.NDArray[np.bool_]:
    """bool (N,): normals of cameras with FEW moments or more that would alarm in most of them by a
    threshold from all others. None where these are no minority, or leave too few for the rate.
    """
    weight, unlike = moment_weights(moments), np.zeros(len(scores), bool)
    count = weight.sum()
    for mine in rows.values():
        its, others = weight[mine].sum(), count - weight[mine].sum()
        if its < FEW - 0.5 or others < 0.5:
            continue
        limit = conformal_threshold(
            scores[~mine], max(rate, 1 / (round(others) + 1)), moments[~mine]
        )
        if 2 * weight[mine & (scores > limit)].sum() > its:
            unlike |= mine
    left = weight[~unlike].sum()
    if 2 * left <= count or (left + 1) * rate < 1 - 1e-9:
        return np.zeros(len(scores), bool)
    return unlike


def alarms(scores: Scores, cameras: Sequence[str], thresholds: dict[str, Any]) -> npt.NDArray[Any]:
    """bool (N,): which scores would alert, each by its camera's threshold."""
    limits = np.array([thresholds["cameras"].get(c, thresholds["default"]) for c in cameras])
    return np.asarray(scores > limits)


def yield_cores() -> None:
    """Make this thread, and those that torch starts for it, yield to a stream on the same machine.

    Linux keeps niceness by thread. Only ever upwards: going back needs privileges.
    """
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
