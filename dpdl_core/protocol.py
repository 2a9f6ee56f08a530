"""Data sets on disk and the open-set splits of the paper, section 5.1 and 5.2.

`load_dataset` names every image of a data set without decoding one, `split` deals them out into
what a method may see and what it is tested on. Layouts are read in layouts.py. Nothing here
decodes: `decode_samples` hands bytes to images.py and lists what that rejects.

General setting: the M anomalies a method sees come from all classes; the others are the test.
Hard setting: they come from one class, and no image of that class is in the test.
Letters: N images, M seen anomalies, S side of the decoded square.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.model_selection import train_test_split

from dpdl_core.images import ImageRejected, Pixels, decode_image
from dpdl_core.layouts import Categories, read_elpv_package, read_folder
from dpdl_core.samples import Dataset, DatasetError, Rejected, Sample

__all__ = [
    "Categories",
    "Dataset",
    "DatasetError",
    "Rejected",
    "Sample",
    "Split",
    "decode_samples",
    "load_dataset",
    "split",
]

Setting = Literal["general", "hard"]


@dataclass(frozen=True)
class Split:
    """What one run may train on and what it is tested on; disjoint."""

    dataset: str
    setting: Setting
    shots: int
    seed: int
    seen_class: str | None
    train_normals: list[Sample]
    train_anomalies: list[Sample]
    test: list[Sample]

    @property
    def sha256(self) -> str:
        """Of the names and labels in each part: two machines with the same files agree, whatever
        their folders are called."""
        dealt = {key: value for key, value in self._names().items() if key != "dataset"}
        return hashlib.sha256(json.dumps(dealt, sort_keys=True).encode()).hexdigest()

    def _names(self) -> dict[str, object]:
        parts = {
            part: [[s.source, s.label, s.defect] for s in samples]
            for part, samples in (
                ("train_normals", self.train_normals),
                ("train_anomalies", self.train_anomalies),
                ("test", self.test),
            )
        }
        return {
            "dataset": self.dataset,
            "setting": self.setting,
            "shots": self.shots,
            "seed": self.seed,
            "seen_class": self.seen_class,
            **parts,
        }

    def save(self, path: Path) -> None:
        """Write names and labels as JSON; the images stay where they are."""
        document = {"sha256": self.sha256, **self._names()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, dataset: Dataset) -> Split:
        """Read a saved split back onto the images of `dataset`; refuses one that does not fit."""
        document = json.loads(path.read_text())
        samples = [*dataset.normals, *(dataset.test_normals or []), *dataset.anomalies]
        by_source = {s.source: s for s in samples}
        parts: dict[str, list[Sample]] = {}
        for part in ("train_normals", "train_anomalies", "test"):
            missing = [name for name, _, _ in document[part] if name not in by_source]
            if missing:
                raise DatasetError(
                    f"{path}: {len(missing)} images of {part} are not in {dataset.name}, "
                    f"the first is {missing[0]}; wanted the data set the split was made from"
                )
            parts[part] = [by_source[name] for name, _, _ in document[part]]
        split = cls(
            document["dataset"],
            document["setting"],
            document["shots"],
            document["seed"],
            document["seen_class"],
            **parts,
        )
        if split.sha256 != document["sha256"]:
            raise DatasetError(f"{path}: names or labels differ from those it was saved with")
        return split


def load_dataset(spec: str | Path) -> Dataset:
    """ "elpv" (the pip package) or a folder in one of the layouts of layouts.py.

    Raises DatasetError that says what was found and which layouts are read, Categories for a
    folder of several data sets.
    """
    dataset = read_elpv_package() if spec == "elpv" else read_folder(Path(spec))
    everything = [*dataset.normals, *(dataset.test_normals or []), *dataset.anomalies]
    if not dataset.normals:
        raise DatasetError(f"{spec}: {len(everything)} images, none of them normal")
    if len({s.source for s in everything}) != len(everything):
        raise DatasetError(f"{spec}: two images go by one name")  # an error of the layout's reader
    by_name = lambda s: s.source  # noqa: E731
    return Dataset(
        dataset.name,
        sorted(dataset.normals, key=by_name),
        None if dataset.test_normals is None else sorted(dataset.test_normals, key=by_name),
        sorted(dataset.anomalies, key=by_name),
        dataset.left_out,
    )


def split(
    dataset: Dataset,
    *,
    setting: Setting,
    shots: int,
    seed: int,
    seen_class: str | None = None,
    defects_in_test: bool = True,
) -> Split:
    """Deal a data set out: normals 3:1 (MATH.md 3, never by seed), anomalies shuffled by seed.

    A data set with its own split of normals keeps it. In the hard setting seen_class gives the M
    anomalies and leaves the test. Without defects_in_test all may be seen, or there be none: what
    an import can do, and an evaluation cannot. Raises DatasetError when there are too few images.
    """
    if setting == "hard":
        if len(dataset.defects) < 2:
            raise DatasetError(
                f"{dataset.name} has {len(dataset.defects)} class of anomalies: the hard setting "
                "needs two or more; take the general one"
            )
        if seen_class not in dataset.defects:
            raise DatasetError(
                f"{dataset.name}: seen_class={seen_class!r}: one of {', '.join(dataset.defects)}"
            )
    elif seen_class is not None:
        raise DatasetError(f"seen_class={seen_class!r} belongs to the hard setting")
    candidates = [s for s in dataset.anomalies if seen_class is None or s.defect == seen_class]
    # In the hard setting the other classes are the test.
    tested = defects_in_test and seen_class is None
    most = len(candidates) - tested
    if most < 0:
        raise DatasetError(f"{dataset.name} has no anomalies, and the test needs one")
    if not 0 <= shots <= most:
        where = f" in {seen_class}" if seen_class else " and the test needs one" if tested else ""
        raise DatasetError(
            f"{dataset.name} has {len(candidates)} anomalies{where}: shots={shots} can be {most} "
            "at most"
        )
    normals, test_normals = dataset.normals, dataset.test_normals
    if test_normals is None:
        if len(normals) < 4:
            raise DatasetError(f"{dataset.name}: {len(normals)} normals, 4 are needed to test")
        normals, test_normals = train_test_split(normals, test_size=0.25, random_state=42)
    if not normals:
        raise DatasetError(f"{dataset.name}: its own split holds no normals to train on")
    if not test_normals:
        raise DatasetError(
            f"{dataset.name}: its own split holds {len(normals)} normals to train on and none to "
            "test on; put some into its folder of test normals (MVTec AD: test/good)"
        )
    shuffled = list(candidates)
    random.Random(seed).shuffle(shuffled)
    seen = shuffled[:shots]
    seen_names = {s.source for s in seen}
    unseen = [
        s
        for s in dataset.anomalies
        if s.source not in seen_names and (seen_class is None or s.defect != seen_class)
    ]
    test = [*test_normals, *unseen]
    return Split(dataset.name, setting, shots, seed, seen_class, list(normals), seen, test)


def decode_samples(
    samples: Sequence[Sample],
    size: int,
    *,
    out: Pixels | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pixels, list[Sample], list[Rejected]]:
    """Decode samples to uint8 (N, S, S, 3), the samples that decoded, and those that did not.

    out, if given, holds at least len(samples) rows and is written in place (a memory map, for sets
    larger than memory). progress(done, total) is called after each image.
    """
    images = np.empty((len(samples), size, size, 3), np.uint8) if out is None else out
    kept: list[Sample] = []
    rejected: list[Rejected] = []
    for done, sample in enumerate(samples, start=1):
        try:
            images[len(kept)] = decode_image(sample.read(), size, crop=sample.crop)
            kept.append(sample)
        except (ImageRejected, OSError) as error:
            rejected.append(Rejected(sample.source, str(error)))
        if progress is not None:
            progress(done, len(samples))
    return images[: len(kept)], kept, rejected
