"""What people have said of images, as trainings and refreshes use it and as manifests keep it.

An answer is an object of the data set (infra/answers.py): a false alarm lies in incoming/ and is a
normal that somebody vouches for, a confirmed defect is one of the training split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from infra.answers import is_answer
from infra.settings import Settings
from pipelines.dataset_index import SPLITS, DatasetIndex, incoming, snapshot
from pipelines.sources import answered_by, digests


def data_of_training(settings: Settings, index: DatasetIndex) -> dict[str, Any]:
    """What a training from scratch sees, as its manifest's "data": the import, the confirmed
    defects, and of incoming/ what a person vouches for. The rest waits for a refresh's sieve."""
    vouched = {o.key: o.etag for o in incoming(settings, index.name) if is_answer(o.key)}
    return snapshot(index) | {
        "incoming": vouched,
        "repeated": repeated(settings, index, used=(), new=vouched),
        **said(settings, index, vouched),
    }


def said(settings: Settings, index: DatasetIndex, incoming: Iterable[str]) -> dict[str, Any]:
    """The part of a manifest's "data" that people answer for: the confirmed defects' digests, and
    who gave each answer that is used."""
    defects = [key for key in index.keys("train", 1) if is_answer(key)]
    return {
        "confirmed": [each for found in digests(settings, defects).values() for each in found],
        "answered_by": answered_by(settings, [*defects, *incoming]),
    }


def repeated(
    settings: Settings,
    index: DatasetIndex,
    *,
    used: Iterable[str],
    new: Iterable[str],
    set_aside: Collection[str] = (),
) -> dict[str, list[int]]:
    """Rows of new objects whose image is known, byte for byte: key -> rows.

    Known are all splits of the data set, what earlier refreshes used, and rows before in the new
    objects. An image learnt twice would count twice; one on both sides would pass for unseen.
    What was only set aside is not known: a person may have called it normal since.
    """
    new = list(new)
    if not new:
        return {}
    keys = [key for split in SPLITS for key in index.keys(split)]
    known = {each for rows in digests(settings, [*keys, *used]).values() for each in rows}
    of_new = digests(settings, new)
    called_normal = {each for key, rows in of_new.items() if is_answer(key) for each in rows}
    known -= called_normal & set(set_aside)
    found: dict[str, list[int]] = {}
    for key, rows in of_new.items():
        for row, digest in enumerate(rows):
            if digest in known:
                found.setdefault(key, []).append(row)
            known.add(digest)
    return found
