"""Drift: how far a camera's last frames are from the held-out normals of the version that scores.

Knows NumPy only. The measure is the population stability index over B bins,

    PSI = sum_b (p_b - q_b) ln(p_b / q_b),

p of the last frames, q of the normals. Of two things: of the frames' energy, in bins between
quantiles of the normals; and of prototype usage, the share of patches whose nearest prototype lies
in each of GROUPS groups. Nothing is recomputed for it: scoring finds the nearest prototypes anyway.
For most patches those are the nearest of the 256 most used (parts.py), which is fine enough for
groups.

What PSI means depends on how many normals and frames there are and, for usage, on how alike the
patches of one image are. So each version keeps its own bounds: the PSI that QUANTILE of BOOTSTRAPS
draws do not exceed, in which frames and normals are both drawn anew from its held-out normals, for
ENOUGH and for WINDOW frames; between the two it goes as 1 / frames. Energy's is at least CONVENTION
(credit scoring's "it has moved"): a shift of the energy is no concern while thresholds hold.
Frames that follow each other are more alike than draws: the quantile is no false-alarm rate.
Letters: N images, n frames, L patches of an image, K prototypes, G groups, B bins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 10
NORMALS_PER_BIN = 20
GROUPS = 64
QUANTILE, BOOTSTRAPS = 0.999, 2000
BOOTSTRAP_ROWS = 1024
"""Normals that a bootstrap draws from, evenly from all: 2,000 draws of each in memory, 16 MB."""
CONVENTION = 0.25
WINDOW = 500
"""Frames of a camera that are looked at, the last ones."""
ENOUGH = 200
"""Fewer frames than this say nothing yet."""
MAX_CAMERAS = 500
"""Cameras that are followed; 65 kB each."""

Counts = NDArray[np.int64]


def psi(frames: Counts, normals: Counts) -> NDArray[np.float64]:
    """PSI of counts over the same bins, half an observation added to each, (..., B) -> (...)."""
    p, q = ((counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True) for counts in (frames, normals))
    return np.asarray(np.sum((p - q) * np.log(p / q), -1))


def reference(
    energy: NDArray[Any], winners: NDArray[Any], cameras: Sequence[str], num_prototypes: int
) -> dict[str, Any]:
    """What a version keeps of its held-out normals, as JSON; {} where they are too few.

    A camera with enough normals is held against its own, any other one against all.
    Shapes: energy (N,), winners (N, L), N cameras ("" for unknown).
    """
    if len(energy) < 2 * NORMALS_PER_BIN:
        return {}
    groups = _groups(np.bincount(winners.ravel(), minlength=num_prototypes))
    usage = group_counts(winners, groups)

    def part(rows: NDArray[Any]) -> dict[str, Any]:
        bins = min(MAX_BINS, len(rows) // NORMALS_PER_BIN)
        edges = np.unique(np.quantile(energy[rows], np.linspace(0, 1, bins + 1)[1:-1]))
        binned = np.eye(len(edges) + 1, dtype=np.int64)[np.searchsorted(edges, energy[rows])]
        return {
            "energy_edges": edges.tolist(),
            "energy": binned.sum(0).tolist(),
            "usage": usage[rows].sum(0).tolist(),
            "bounds": {
                "energy": [max(CONVENTION, bound) for bound in _bounds(binned)],
                "prototypes": _bounds(usage[rows]),
            },
        }

    names = np.array(cameras)
    rows_of = {name: np.flatnonzero(names == name) for name in sorted(set(cameras) - {""})}
    return {
        "groups": groups.tolist(),
        "default": part(np.arange(len(energy))),
        "cameras": {
            name: part(rows) for name, rows in rows_of.items() if len(rows) >= 2 * NORMALS_PER_BIN
        },
    }


def group_counts(winners: NDArray[Any], groups: Counts) -> Counts:
    """(N, L) nearest prototypes -> (N, G) patches by group."""
    num_images, num_groups = len(winners), int(groups.max()) + 1
    flat = groups[winners] + num_groups * np.arange(num_images)[:, None]
    return np.bincount(flat.ravel(), minlength=num_images * num_groups).reshape(num_images, -1)


def _groups(used: Counts) -> Counts:
    """(K,) group of each prototype: the most used first, about the same mass in each group."""
    order = np.argsort(-used, kind="stable")
    before = np.cumsum(used[order]) - used[order]
    rank = np.minimum(GROUPS - 1, before * GROUPS // max(1, int(used.sum())))
    groups = np.empty(len(used), np.int64)
    groups[order] = np.unique(rank, return_inverse=True)[1]
    return groups


def _bounds(counts: Counts) -> list[float]:
    """PSI that frames like the normals rarely exceed, for ENOUGH and for WINDOW of them.

    counts (N, B) of each normal.
    """
    rng = np.random.default_rng(0)
    num_normals = len(counts)
    if num_normals > BOOTSTRAP_ROWS:
        counts = counts[np.linspace(0, num_normals - 1, BOOTSTRAP_ROWS).round().astype(int)]
    alike = np.full(len(counts), 1 / len(counts))
    found = []
    for frames in (ENOUGH, WINDOW):
        drawn, normals = (
            rng.multinomial(size, alike, BOOTSTRAPS) @ counts for size in (frames, num_normals)
        )
        found.append(float(np.quantile(psi(drawn, normals), QUANTILE)))
    return found


class Psi(NamedTuple):
    value: float
    bound: float
    """Above it, the frames have moved."""


class Drift:
    """The last frames of each camera under one version, and their PSI.

    A window: it starts empty with the process and with each version, so a restart costs ENOUGH
    frames of silence and never shows a wrong figure. `add` from one thread, `psi` from any.

    Args:
        kept: what reference() made; {} or None follows nothing, nor does what was made before
            there were bounds.
    """

    def __init__(self, kept: Mapping[str, Any] | None) -> None:
        self._kept = kept if kept and "bounds" in kept["default"] else {}
        self._groups = np.array(self._kept.get("groups", []), np.int64)
        self._windows: dict[str, _Window] = {}

    def add(self, cameras: Sequence[str], energy: NDArray[Any], winners: NDArray[Any]) -> None:
        """A batch: N cameras, energy (N,), winners (N, L)."""
        if not self._kept:
            return
        usage = group_counts(winners, self._groups)
        for row, camera in enumerate(cameras):
            window = self._windows.get(camera)
            if window is None:
                if len(self._windows) >= MAX_CAMERAS:
                    continue
                mine = self._kept["cameras"].get(camera, self._kept["default"])
                window = self._windows[camera] = _Window(mine)
            window.add(float(energy[row]), usage[row])

    def psi(self, within_s: float = math.inf) -> dict[str, dict[str, Psi]]:
        """Camera -> {"energy": Psi, "prototypes": Psi}, of cameras with ENOUGH frames, the last one
        added within so many seconds: the frames of one that is gone say nothing of now."""
        since_s = time.monotonic() - within_s
        return {
            camera: window.psi()
            for camera, window in list(self._windows.items())
            if window.frames >= ENOUGH and window.added_s >= since_s
        }


class _Window:
    def __init__(self, normals: Mapping[str, Any]) -> None:
        self._edges = np.array(normals["energy_edges"], np.float64)
        self._normal_energy = np.array(normals["energy"], np.int64)
        self._normal_usage = np.array(normals["usage"], np.int64)
        self._bounds = {of: (float(e), float(w)) for of, (e, w) in normals["bounds"].items()}
        self._bins = np.zeros(WINDOW, np.uint8)
        self._usage = np.zeros((WINDOW, len(self._normal_usage)), np.uint16)
        self.frames = 0
        self.added_s = -math.inf
        """When the last frame was added (time.monotonic())."""

    def add(self, energy: float, usage: Counts) -> None:
        at = self.frames % WINDOW
        self._bins[at] = np.searchsorted(self._edges, energy)
        self._usage[at] = usage
        self.frames += 1
        self.added_s = time.monotonic()

    def psi(self) -> dict[str, Psi]:
        held = min(self.frames, WINDOW)
        energy = np.bincount(self._bins[:held], minlength=len(self._normal_energy))
        usage = self._usage[:held].sum(0, dtype=np.int64)
        return {
            of: Psi(float(psi(frames, normals)), self._bound(of, held))
            for of, frames, normals in (
                ("energy", energy, self._normal_energy),
                ("prototypes", usage, self._normal_usage),
            )
        }

    def _bound(self, of: str, frames: int) -> float:
        at_enough, at_window = self._bounds[of]
        share = (1 / frames - 1 / WINDOW) / (1 / ENOUGH - 1 / WINDOW)
        return at_window + share * (at_enough - at_window)
