"""The held-out images that thresholds are set on and that the gate judges two models by.

    defects       known ones that both models have learnt
    old normals   the calibration split, and the held-out share of new normals accepted earlier
    new normals   the held-out share of what a refresh brings, or, at a training, of what the
                  current version has accepted and the training has not looked at

A new normal is held out or not by what its object says of it, so it stays on its side for ever,
whichever refresh reads it: no model is judged by a normal that it or an ancestor has learnt. What a
camera saw within one minute is held out or learnt as a whole, since next to a twin that was learnt
an image is no news; where nobody knows when, the digest of its bytes decides for each image. The
defects are the very ones that directions and heads were fitted on, so AUROC on them is better than
on others; it says which of two models that learnt them alike is better, and no more. What only one
of the two has learnt is left out: defects that people have confirmed since, and, where the data set
was imported anew between them, all of the import.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infra.answers import ANSWERED, is_answer
from infra.settings import Settings
from pipelines.dataset_index import DatasetIndex, incoming, load_index
from pipelines.drawing import draw
from pipelines.gate import Held, Lasting
from pipelines.people import repeated
from pipelines.scoring import Observed, drift_reference, observe_each
from pipelines.sources import Keep, RowRef, StreamedImages, described, read_here, row_groups

AT_MOST = 1024
"""Held-out normals looked at of the calibration split, and as many of those accepted earlier, of
each camera its share, so that a refresh costs the same however much there is. More where there are
many cameras: each is to have a threshold of its own (each_camera())."""
HELD_OUT_OF = 5
"""One in so many new normals is held out, the share that an import holds out by default."""
MOMENT_S = 60
"""What one camera saw within so long is on one side."""


def is_held_out(row: RowRef) -> bool:
    """Never what people have answered: those are the frames that alarmed, no sample of the normals,
    and thresholds set on them would rise until nothing alarms. A folder that a person vouches for
    is a sample like any other."""
    if is_answer(row.key) and row.source.startswith(ANSWERED):
        return False
    return int(moment(row)[:8], 16) % HELD_OUT_OF == 0


def moment(row: RowRef) -> str:
    """The same for all that a camera saw within MOMENT_S; the digest where nobody knows when."""
    if not row.captured_at_ns:
        return row.digest
    number = row.captured_at_ns // (MOMENT_S * 10**9)
    return hashlib.sha256(f"{row.camera} {number}".encode()).hexdigest()


def usable(data: Mapping[str, Any]) -> Keep:
    """Which rows of incoming objects a version may use: its manifest's "data" lists the others.

    A person's word counts more than the sieve's: what was answered "false alarm" is used whatever
    was set aside, and what was confirmed as a defect is not, wherever it turns up.
    """
    aside, repeated = set(data["set_aside"]), data.get("repeated", {})
    confirmed = set(data.get("confirmed", ()))

    def keep(row: RowRef) -> bool:
        # A row that says it is a defect is none of the normals that incoming/ is for.
        return (
            row.label == 0
            and row.digest not in confirmed
            and (is_answer(row.key) or row.digest not in aside)
            and row.row not in repeated.get(row.key, ())
        )

    return keep


def images(
    settings: Settings,
    keys: Iterable[str],
    size: int,
    keep: Keep | None = None,
    *,
    at_most: int | None = None,
    each: int = 0,
    on_rejected: Callable[[RowRef, str], None] | None = None,
) -> StreamedImages:
    """The images of some objects, read in this process.

    at_most: so many, of each camera its share, and of each with a name `each` (drawing.py).
    """
    if at_most is None:
        groups = row_groups(settings, keys)
        expected = sum(group.rows for group in groups)
    else:
        may_use = keep or (lambda row: True)
        drawn = draw(described(settings, keys), may_use, moment, at_most=at_most, each=each)
        groups, expected = drawn.groups, len(drawn.rows)

        def keep(row: RowRef) -> bool:
            return (row.key, row.row) in drawn.rows and may_use(row)

    read = read_here(settings, groups, size, keep=keep, on_rejected=on_rejected)
    return StreamedImages(read, size, expected=expected)


def each_camera(false_alarm_rate: float) -> int:
    """Held-out normals of a camera to look at: twice what a threshold of its own needs, as some may
    be of one moment."""
    return 2 * math.ceil(1 / false_alarm_rate)


_Part = tuple[list[str], Keep | None, int | None]
"""Objects, which of their rows, and at most how many rows are read."""


class HeldOut:
    """Held-out images for a candidate and the current version, scored once per version.

    data, current: "data" of their manifests; each: of each camera at least, beyond AT_MOST in all.
    Raises DataError when the data set is gone.
    """

    def __init__(
        self,
        settings: Settings,
        data: Mapping[str, Any],
        current: Mapping[str, Any],
        *,
        each: int = 0,
    ) -> None:
        index = load_index(settings, data["dataset"])
        new, may_use = data.get("new", {}), usable(data)
        same_dataset = data["dataset"] == current["dataset"]
        in_both = set(data["objects"].items()) & set(current["objects"].items())

        def held_out(row: RowRef) -> bool:
            return is_held_out(row) and may_use(row)

        self._settings = settings
        self._defect_keys = [
            part.key
            for part in index.parts["train"]
            if part.label == 1 and (part.key, part.etag) in in_both
        ]
        calibration = [
            part.key
            for part in index.parts["calibration"]
            # Of another data set the current version has learnt nothing.
            if (part.key, part.etag) in in_both or not same_dataset
        ]
        earlier = [key for key in data["incoming"] if key not in new]
        self._each = each
        self._parts: dict[str, list[_Part]] = {
            "old": [(calibration, None, AT_MOST), (earlier, held_out, AT_MOST)],
            "new": [(list(new), held_out, None)],
        }
        if same_dataset:
            keys, keep = _accepted(settings, index, data, current)
            self._parts["new"].append((keys, keep, AT_MOST))
        self._by_size: dict[int, dict[str, list[StreamedImages]]] = {}
        self._scored: dict[str, Held] = {}
        self._normals: dict[str, list[Observed]] = {}

    def at(self, size: int) -> dict[str, list[StreamedImages]]:
        """Sources of "defects", "old" and "new" decoded at one size."""
        if size not in self._by_size:
            self._by_size[size] = {
                "defects": [images(self._settings, self._defect_keys, size)],
                **{
                    name: [
                        images(self._settings, keys, size, keep, at_most=at_most, each=self._each)
                        for keys, keep, at_most in parts
                    ]
                    for name, parts in self._parts.items()
                },
            }
        return self._by_size[size]

    def cameras(self, name: str, size: int) -> list[str]:
        return [row.camera for source in self.at(size)[name] for row in source.rows]

    def moments(self, size: int) -> list[str]:
        """Of the old normals, then the new."""
        return [moment(row) for n in ("old", "new") for s in self.at(size)[n] for row in s.rows]

    def lasting(self, size: int) -> Lasting:
        """The import's own: its defects, and its calibration split."""
        import numpy as np

        parts = self.at(size)
        (defects,), (calibration, *_) = parts["defects"], parts["old"]
        normals = sum(source.num_images for name in ("old", "new") for source in parts[name])
        imported = [not is_answer(row.key) for row in defects.rows]
        rows = [row for row, its in zip(defects.rows, imported, strict=True) if its]
        digests = [sorted(row.digest for row in some) for some in (rows, calibration.rows)]
        return Lasting(
            np.array(imported, bool),
            np.arange(normals) < calibration.num_images,
            int(hashlib.sha256(repr(digests).encode()).hexdigest()[:12], 16),
        )

    def score(self, version: str, model: Any) -> Held:
        if version not in self._scored:
            self.score_each({version: model})
        return self._scored[version]

    def score_each(self, models: Mapping[str, Any]) -> None:
        """Score versions together: those of one trunk look through it once. All of one size."""
        import numpy as np

        (size,) = {model.config.image_size for model in models.values()}
        seen = {
            name: [observe_each(list(models.values()), source) for source in sources]
            for name, sources in self.at(size).items()
        }
        for i, version in enumerate(models):
            mine = {name: [found[i] for found in parts] for name, parts in seen.items()}
            self._scored[version] = Held(
                *(
                    np.concatenate([each.score for each in mine[name]])
                    for name in ("defects", "old", "new")
                )
            )
            self._normals[version] = mine["old"] + mine["new"]

    def drift_reference(self, version: str, model: Any) -> dict[str, Any]:
        """What a stream scored by this version is held against; score() comes first."""
        size = model.config.image_size
        cameras = self.cameras("old", size) + self.cameras("new", size)
        return drift_reference(model, self._normals[version], cameras)


def _accepted(
    settings: Settings, index: DatasetIndex, data: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[list[str], Keep]:
    """What the current version has accepted and the candidate knows nothing of: a training from
    scratch must not undo in silence what refreshes have adapted to."""
    others = {key: etag for key, etag in current["incoming"].items() if key not in data["incoming"]}
    there = {o.key: o.etag for o in incoming(settings, index.name)} if others else {}
    keys = [key for key, etag in others.items() if there.get(key) == etag]
    confirmed = [*current.get("confirmed", ()), *data.get("confirmed", ())]
    # By the candidate's import: images may have been added to it since they came.
    known = repeated(settings, index, used=data["incoming"], new=keys)
    may_use = usable({**current, "confirmed": confirmed, "repeated": known})
    return keys, lambda row: is_held_out(row) and may_use(row)
