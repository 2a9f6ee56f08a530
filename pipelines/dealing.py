"""What an import does with the images of a folder before it stores one: each is looked at once, and
dealt to training, calibration or test. Knows no S3: that is datasets.py.

The split is the paper's (dpdl_core/protocol.py), of images that are each there once, with twins
(twins.py) brought to one side: a copy, or nearly one, of what was learnt would pass for unseen.
`calibration` is a share of the training normals that no training sees: alert thresholds need
normals that the model has not learnt.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dpdl_core import protocol
from dpdl_core.images import ImageRejected, Pixels, decode_image
from dpdl_core.twins import SIDE, Thumbnail, deal_together, thumbnail, twins
from infra.errors import DataError
from pipelines.dataset_index import Progress


@dataclass
class Tally:
    """What an import has seen so far."""

    total: int
    progress: Progress | None
    done: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)

    def decoded(self, source: str, data: bytes) -> Pixels | None:
        """The image, small, or None for one that is tallied as none."""
        try:
            return decode_image(data, 2 * SIDE)
        except ImageRejected as error:
            self.skip(source, error.reason)
            return None

    def skip(self, source: str, reason: str) -> None:
        self.skipped.append({"source": source, "reason": reason})

    def advance(self) -> None:
        self.done += 1
        if self.progress is not None and (self.done % 50 == 0 or self.done == self.total):
            figures = {"read": self.done, "skipped": len(self.skipped)}
            self.progress("import", self.done / self.total, figures)


@dataclass(frozen=True)
class Look:
    """What an import keeps of an image between its two readings."""

    digest: str
    thumbnail: Thumbnail


def all_samples(dataset: protocol.Dataset) -> list[protocol.Sample]:
    return [*dataset.normals, *(dataset.test_normals or []), *dataset.anomalies]


def look_at(dataset: protocol.Dataset, tally: Tally) -> tuple[protocol.Dataset, dict[str, Look]]:
    """The data set with each image once and what is none tallied, and a look at each of these.

    Raises DataError that names the files where one image has both labels: which is right, only a
    person can say.
    """
    first: dict[str, protocol.Sample] = {}
    looks: dict[str, Look] = {}
    both: list[str] = []
    for sample in all_samples(dataset):
        tally.advance()
        try:
            data = whole(sample)
        except (OSError, ImageRejected) as error:
            tally.skip(sample.source, getattr(error, "reason", "unreadable"))
            continue
        digest = hashlib.sha256(data).hexdigest()
        same = first.get(digest)
        if same is None:
            pixels = tally.decoded(sample.source, data)
            if pixels is not None:
                first[digest] = sample
                looks[sample.source] = Look(digest, thumbnail(pixels))
        elif same.label != sample.label:
            both.append(f"{same.source} and {sample.source}")
        else:
            tally.skip(sample.source, f"duplicate of {same.source}")
    if both:
        raise DataError(
            f"{dataset.name}: the same image is a normal and a defect: {', '.join(both[:3])}"
            f"{f' and {len(both) - 3} more' if len(both) > 3 else ''}: remove the wrong one of each"
        )

    def kept(samples: list[protocol.Sample]) -> list[protocol.Sample]:
        return [sample for sample in samples if sample.source in looks]

    tests = dataset.test_normals
    usable = protocol.Dataset(
        dataset.name,
        kept(dataset.normals),
        None if tests is None else kept(tests),
        kept(dataset.anomalies),
    )
    return usable, looks


def whole(sample: protocol.Sample) -> bytes:
    """The encoded image; a sample that is a box of a picture is cut out, without loss, as PNG."""
    data = sample.read()
    if sample.crop is None:
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.crop(sample.crop).save(out, "PNG")
    return out.getvalue()


def deal(
    split: protocol.Split, calibration_share: float, leave_out: Collection[str]
) -> dict[str, list[protocol.Sample]]:
    """The paper's split with a share of the training normals held out for thresholds."""
    normals = [sample for sample in split.train_normals if sample.source not in leave_out]
    held_out = round(len(normals) * calibration_share)
    if not 0 < held_out < len(normals):
        raise DataError(
            f"{split.dataset}: {len(normals)} training normals with "
            f"calibration_share={calibration_share:g} leave none on one side: wanted a share "
            "between 0 and 1 and more images"
        )
    shuffled = random.Random(split.seed).sample(range(len(normals)), len(normals))
    return {
        "train": [normals[i] for i in sorted(shuffled[held_out:])] + list(split.train_anomalies),
        "calibration": [normals[i] for i in sorted(shuffled[:held_out])],
        "test": list(split.test),
    }


def with_twins(
    dealt: Mapping[str, list[protocol.Sample]], looks: Mapping[str, Look], *, fixed_test: bool
) -> dict[str, list[protocol.Sample]]:
    """The same parts, as large as they were, with twins of one label in one of them.

    fixed_test: the data set's authors chose the normals of the test, and these stay there.
    """
    placed = [(sample, part) for part, samples in dealt.items() for sample in samples]
    common = np.mean([looks[sample.source].thumbnail for sample, _ in placed], axis=0, dtype="f4")
    part_of = {sample.source: part for sample, part in placed}
    for label in (0, 1):
        mine = [
            sample
            for sample, part in placed
            if sample.label == label and (label == 1 or part != "test" or not fixed_test)
        ]
        parts = [part_of[sample.source] for sample in mine]
        sizes = Counter(parts)
        # No part is to be of one scene alone. Of defects a few are learnt, the others tested: what
        # is too large a scene to learn from is tested as a whole.
        at_most = (min(sizes.values()) if label == 0 else sizes["test"]) // 2
        groups = []
        # By class: in the hard setting a class of defects is on one side.
        for defect in sorted({sample.defect for sample in mine}):
            of_class = [at for at, sample in enumerate(mine) if sample.defect == defect]
            shown = [looks[mine[at].source].thumbnail for at in of_class]
            for group in twins(shown, common, at_most):
                scene = [of_class[at] for at in group]
                if label == 1 and len(scene) > sizes["train"] // 2:
                    scene.sort(key=lambda at: parts[at] == "train")
                groups.append(scene)
        for sample, part in zip(mine, deal_together(parts, groups), strict=True):
            part_of[sample.source] = part
    return {
        name: [sample for sample, _ in placed if part_of[sample.source] == name] for name in dealt
    }
