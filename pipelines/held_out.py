"""The held-out images of a version: what its thresholds are set on and the gate judges by.

    defects       the known ones of the training split
    old normals   the calibration split, and the held-out share of new normals accepted earlier
    new normals   the held-out share of what this refresh brings

A new normal is held out or not by the digest of its bytes, so it stays on its side for ever,
whichever refresh reads it: no model is judged by an image that one of its ancestors learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from infra.settings import Settings
from pipelines.dataset_index import load_index
from pipelines.gate import Held
from pipelines.scoring import Observed, drift_reference, observe
from pipelines.sources import Keep, RowRef, StreamedImages, read_here, row_groups

HELD_OUT_OF = 5
"""One in so many new normals is held out, the share that an import holds out by default."""


def is_held_out(row: RowRef) -> bool:
    return int(row.digest[:8], 16) % HELD_OUT_OF == 0


def images(
    settings: Settings, keys: Iterable[str], size: int, keep: Keep | None = None
) -> StreamedImages:
    """The images of some objects, read in this process."""
    groups = row_groups(settings, keys)
    expected = sum(group.rows for group in groups)
    return StreamedImages(read_here(settings, groups, size, keep=keep), size, expected=expected)


class HeldOut:
    """Held-out images by a version's manifest ("data"), scored once per version.

    Raises DataError when the data set is gone.
    """

    def __init__(self, settings: Settings, data: Mapping[str, Any]) -> None:
        index = load_index(settings, data["dataset"])
        aside = set(data["set_aside"])
        new = data.get("new", {})

        def held_out(row: RowRef) -> bool:
            return is_held_out(row) and row.digest not in aside

        self._settings = settings
        self._defect_keys = index.keys("train", 1)
        self._parts: dict[str, list[tuple[list[str], Keep | None]]] = {
            "old": [
                (index.keys("calibration"), None),
                ([key for key in data["incoming"] if key not in new], held_out),
            ],
            "new": [(list(new), held_out)],
        }
        self._by_size: dict[int, dict[str, list[StreamedImages]]] = {}
        self._scored: dict[str, Held] = {}
        self._normals: dict[str, list[Observed]] = {}

    def at(self, size: int) -> dict[str, list[StreamedImages]]:
        """Sources of "defects", "old" and "new" decoded at one size."""
        if size not in self._by_size:
            self._by_size[size] = {
                "defects": [images(self._settings, self._defect_keys, size)],
                **{
                    name: [images(self._settings, keys, size, keep) for keys, keep in parts]
                    for name, parts in self._parts.items()
                },
            }
        return self._by_size[size]

    def cameras(self, name: str, size: int) -> list[str]:
        return [row.camera for source in self.at(size)[name] for row in source.rows]

    def score(self, version: str, model: Any) -> Held:
        if version not in self._scored:
            import numpy as np

            sources = self.at(model.config.image_size)
            seen = {
                name: [observe(model, source) for source in sources[name]]
                for name in ("defects", "old", "new")
            }
            self._scored[version] = Held(
                *(np.concatenate([each.score for each in found]) for found in seen.values())
            )
            self._normals[version] = seen["old"] + seen["new"]
        return self._scored[version]

    def drift_reference(self, version: str, model: Any) -> dict[str, Any]:
        """What a stream scored by this version is held against; score() comes first."""
        size = model.config.image_size
        cameras = self.cameras("old", size) + self.cameras("new", size)
        return drift_reference(model, self._normals[version], cameras)
