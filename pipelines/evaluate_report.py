"""The picture beside an evaluation's report: scores, ROC curves, best and worst images.

Knows arrays and matplotlib; nothing of methods or data sets.
Letters: K shown images, S side in pixels, h w sides of a heat map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from dpdl_core.images import Pixels

PER_GROUP = 4
GROUPS = (
    "anomalies found best",
    "anomalies missed worst",
    "normals nearest to an alarm",
    "normals most normal",
)
NORMAL_COLOUR, ANOMALY_COLOUR = "#4477aa", "#cc3311"


@dataclass(frozen=True)
class RunPictures:
    """The best and worst images of a run; PER_GROUP of each of GROUPS, in that order."""

    images: Pixels
    """(K, S, S, 3)."""
    scores: npt.NDArray[np.float64]
    groups: npt.NDArray[np.int64]
    """(K,) index into GROUPS."""
    maps: npt.NDArray[np.float32] | None
    """(K, h, w) heat maps, or None where a method has none."""

    @classmethod
    def choose(
        cls,
        images: Pixels,
        rows: Sequence[int],
        labels: Sequence[int],
        scores: npt.NDArray[np.float64],
        maps: npt.NDArray[np.float32] | None,
    ) -> RunPictures:
        """From test images images[rows] with labels, scores and maps in the order of rows."""
        order = np.argsort(-scores, kind="stable")
        anomalous = [int(i) for i in order if labels[i]]
        normal = [int(i) for i in order if not labels[i]]
        found, missed = _ends(anomalous)
        alarmed, calm = _ends(normal)
        picked = [found, missed, alarmed, calm]
        chosen = [i for part in picked for i in part]
        groups = [g for g, part in enumerate(picked) for _ in part]
        return cls(
            images[[rows[i] for i in chosen]],
            scores[chosen],
            np.asarray(groups, np.int64),
            None if maps is None else maps[chosen],
        )

    def save(self, path: Path) -> None:
        arrays = {"images": self.images, "scores": self.scores, "groups": self.groups}
        if self.maps is not None:
            arrays["maps"] = self.maps
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> RunPictures:
        with np.load(path, allow_pickle=False) as stored:
            maps = stored.get("maps")
            return cls(stored["images"], stored["scores"], stored["groups"], maps)


def _ends(order: list[int]) -> tuple[list[int], list[int]]:
    """The first and the last PER_GROUP, the very last first; no image in both."""
    first = order[:PER_GROUP]
    return first, order[len(first) :][-PER_GROUP:][::-1]


def draw_report(
    path: Path,
    *,
    title: str,
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
    shown: RunPictures,
) -> None:
    """Write the picture. curves: labels and scores of each run; shown: images of the first."""
    columns = 2 * PER_GROUP
    # Not pyplot: that would choose a backend for the whole process, and keep the figure.
    figure = Figure(figsize=(1.55 * columns, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, columns, height_ratios=(2.2, 1, 1))
    figure.suptitle(title)
    _draw_scores(figure.add_subplot(grid[0, : columns // 2]), *curves[0])
    _draw_roc(figure.add_subplot(grid[0, columns // 2 :]), curves)
    top = 1.0 if shown.maps is None else float(np.quantile(shown.maps, 0.99)) or 1.0
    for group, name in enumerate(GROUPS):
        for place, k in enumerate(np.flatnonzero(shown.groups == group)):
            axes = figure.add_subplot(grid[1 + group // 2, (group % 2) * PER_GROUP + place])
            image = shown.images[k]
            axes.imshow(image if shown.maps is None else overlay(image, shown.maps[k], top))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{shown.scores[k]:.2f}", fontsize=8)
            if place == 0:
                axes.set_title(name, loc="left", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw_scores(axes: Axes, labels: Sequence[int], scores: Sequence[float]) -> None:
    y, s = np.asarray(labels), np.asarray(scores)
    edges = [float(e) for e in np.histogram_bin_edges(s, bins=40)]
    for label, name, colour in (
        (0, "normal", NORMAL_COLOUR),
        (1, "anomalous", ANOMALY_COLOUR),
    ):
        part = s[y == label]
        share = np.full(len(part), 1 / len(part))
        axes.hist(
            part, edges, weights=share, alpha=0.6, color=colour, label=f"{name} ({len(part)})"
        )
    axes.set_xlabel("score, first run")
    axes.set_ylabel("share of the class")
    axes.legend()


def _draw_roc(axes: Axes, curves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> None:
    grid = np.linspace(0, 1, 501)
    found = []
    for labels, scores in curves:
        false_alarms, detected, _ = roc_curve(labels, scores)
        axes.plot(false_alarms, detected, color=ANOMALY_COLOUR, alpha=0.25, linewidth=1)
        found.append(np.interp(grid, false_alarms, detected))
    axes.plot(grid, np.mean(found, axis=0), color=ANOMALY_COLOUR, label=f"mean of {len(curves)}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("false alarms, share of normals")
    axes.set_ylabel("anomalies found, share")
    axes.legend(loc="lower right")


def overlay(image: Pixels, heat: npt.NDArray[np.float32], top: float) -> Pixels:
    """A heat map (h, w) laid over its image (S, S, 3); `top` is drawn as the hottest."""
    size = image.shape[0]
    scaled = np.clip(cv2.resize(heat, (size, size), interpolation=cv2.INTER_LINEAR) / top, 0, 1)
    colours = matplotlib.colormaps["inferno"](scaled)[:, :, :3] * 255
    weight = 0.65 * scaled[:, :, None]
    mixed: Pixels = (image * (1 - weight) + colours * weight).astype(np.uint8)
    return mixed
