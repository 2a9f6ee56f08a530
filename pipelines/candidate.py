"""A refresh's candidate: from what it is made of to a stored version. refresh.py says when.

Its id is a digest of its parent and its inputs, so the same inputs are the same candidate,
whoever makes it and however often.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dpdl_core import artifact
from dpdl_core.artifact import LoadedVersion
from dpdl_core.fit import renew
from dpdl_core.sieve import set_aside
from infra import decisions
from infra.answers import is_answer
from infra.errors import DataError, VersionExists
from infra.model_store import ModelStore
from infra.settings import Settings
from pipelines.dataset_index import DatasetIndex, Progress, incoming, snapshot
from pipelines.held_out import HeldOut, each_camera, images, is_held_out, usable
from pipelines.people import said
from pipelines.promotion import code_version
from pipelines.scoring import calibrate
from pipelines.sources import RowRef, row_groups, stack

EXEMPLARS = 512
"""Old normals that a renewal looks at again, of each camera its share."""
HELD_TRIES = 3
"""A new normal that was in so many candidates that the gate held is left out from then on: whatever
it is that spoils them must not keep the model as it is for ever. Answers are never left out."""


@dataclass(frozen=True)
class Inputs:
    """What a candidate is made of; its id follows from this alone."""

    parent: str
    dataset: str
    objects: dict[str, str]
    """Of the data set, key -> ETag."""
    used: dict[str, str]
    """Incoming objects that the parent has used already."""
    new: dict[str, str]
    new_defects: dict[str, str]
    """Those of `objects` that people have confirmed since the parent."""
    set_aside: list[str]
    """Digests that the parent's renewals set aside."""
    seed: int

    @property
    def candidate(self) -> str:
        identity = json.dumps(asdict(self), sort_keys=True).encode()
        return f"refresh-{hashlib.sha256(identity).hexdigest()[:12]}"


@dataclass(frozen=True)
class Found:
    """What there is to refresh with."""

    inputs: Inputs
    images: int
    """New ones and confirmed defects."""
    waiting: int
    """Of these, the ones that were not in the last candidate that the gate held; all of them where
    something that was in it is gone."""
    notes: list[str]
    """On objects that cannot be read: those count as new until somebody puts them right, and keep
    no refresh from the others."""


def find_inputs(
    settings: Settings,
    current: str,
    parent: Mapping[str, Any],
    index: DatasetIndex,
    past: Iterable[decisions.Decision],
    seed: int,
    left_out: Mapping[str, str] | None = None,
) -> Found:
    """What is new to this version: not in its manifest, and not rolled back on its line.

    What the gate held on it, in company that may have been to blame, comes again with others,
    HELD_TRIES times at most, answers without end.
    Decisions of another line do not count: a model trained from scratch gets everything again.
    left_out: objects that cannot be read though their footers can, and why.
    """
    data = parent["data"]
    settled = {*data["incoming"].items(), *data["objects"].items()}
    held = []
    for decision in _descended({current, *parent["line"]}, past):
        if decision.decision == "held":
            held.append(decision)
        else:
            settled |= set(decision.inputs.items())
    tries = Counter(each for decision in held for each in decision.inputs.items())
    settled |= {each for each, n in tries.items() if n >= HELD_TRIES and not is_answer(each[0])}
    stored = {o.key: o.etag for o in incoming(settings, index.name)}
    new, rows, notes = {}, {}, []
    for key, etag in stored.items():
        if (key, etag) in settled:
            continue
        if left_out and key in left_out:
            notes.append(f"left out: {left_out[key]}")
            continue
        try:
            rows[key, etag] = sum(group.rows for group in row_groups(settings, [key]))
            new[key] = etag
        except DataError as error:
            notes.append(f"left out: {error}")
    objects = snapshot(index)["objects"]
    defects = {
        key: etag for key, etag in objects.items() if is_answer(key) and (key, etag) not in settled
    }
    rows |= dict.fromkeys(defects.items(), 1)
    last = max(held, key=lambda decision: decision.at, default=None)
    again = set(last.inputs.items()) - settled if last is not None else set()
    if not again <= set(rows):
        again = set()
    elif again:
        notes.append(f"{sum(rows[each] for each in again)} of the images were held before")
    inputs = Inputs(
        parent=current,
        dataset=index.name,
        objects=objects,
        # What a person has taken back, or answered anew, is used no longer.
        used={key: etag for key, etag in data["incoming"].items() if stored.get(key) == etag},
        new=new,
        new_defects=defects,
        set_aside=list(data["set_aside"]),
        seed=seed,
    )
    images = sum(rows.values())
    return Found(inputs, images, images - sum(rows[each] for each in again), notes)


def _descended(line: set[str], past: Iterable[decisions.Decision]) -> Iterator[decisions.Decision]:
    """Decisions on what descends from a version of this line, by however many steps.

    After two rollbacks the second one's parent is no longer on the line, but descends from it.
    """
    children: dict[str | None, list[decisions.Decision]] = {}
    for decision in past:
        children.setdefault(decision.parent, []).append(decision)
    reached = list(line)
    while reached:
        found = children.pop(reached.pop(), [])
        reached += [decision.candidate for decision in found]
        yield from found


def build(
    settings: Settings,
    store: ModelStore,
    name: str,
    inputs: Inputs,
    repeats: dict[str, list[int]],
    parent: Mapping[str, Any],
    index: DatasetIndex,
    current: LoadedVersion,
    device: str,
    progress: Progress | None,
) -> HeldOut | None:
    """Renew, calibrate, and store the candidate. Gives the held-out images, scored by it.

    None where another refresh of the same inputs stored it first.
    """
    started = time.perf_counter()
    size = current.model.config.image_size
    data = {
        "dataset": index.name,
        "split_sha256": index.split_sha256,
        "objects": inputs.objects,
        "incoming": inputs.used | inputs.new,
        "new": inputs.new,
        "new_defects": inputs.new_defects,
        "set_aside": inputs.set_aside,
        "repeated": {**parent["data"].get("repeated", {}), **repeats},
        **said(settings, index, inputs.used | inputs.new),
    }
    may_use = usable(data)
    unreadable: list[str] = []

    def learnt(row: RowRef) -> bool:
        return not is_held_out(row) and may_use(row)

    old = images(
        settings,
        [*index.keys("train", 0), *inputs.used],
        size,
        lambda row: row.key not in inputs.used or learnt(row),
        at_most=EXEMPLARS,
    )
    new = images(
        settings,
        inputs.new,
        size,
        learnt,
        on_rejected=lambda row, reason: unreadable.append(f"left out: {row.source}: {reason}"),
    )
    defects = stack(images(settings, index.keys("train", 1), size))
    model, report = renew(
        current.model,
        old,
        new,
        defects,
        seed=inputs.seed,
        vouched=[is_answer(row.key) for row in new.rows],
        cameras=[row.camera for row in new.rows],
        # Other defects than those that the current model was taught are there to be learnt.
        relearn=parent["data"]["objects"] != inputs.objects,
        device=device,
        progress=progress,
    )
    # The held-out share goes through the sieve, too: a defect in it would lift the thresholds.
    unseen = images(settings, inputs.new, size, lambda row: is_held_out(row) and may_use(row))
    # The limit comes from all normals of the current model's own fit: no fewer than these.
    doubtful = set_aside(
        current.model,
        unseen,
        limit_from=old.num_images,
        cameras=[row.camera for row in unseen.rows],
        vouched=[is_answer(row.key) for row in unseen.rows],
    )
    suspects = [new.rows[i] for i in report.set_aside]
    suspects += [unseen.rows[i] for i in doubtful.nonzero().flatten().tolist()]
    data["set_aside"] = sorted({*inputs.set_aside, *(row.digest for row in suspects)})
    each = each_camera(parent["false_alarm_rate"])
    held_out = HeldOut(settings, data, parent["data"], each=each)
    # The gate will ask for both.
    held_out.score_each({inputs.parent: current.model, inputs.candidate: model})
    held = held_out.score(inputs.candidate, model)
    cameras = held_out.cameras("old", size) + held_out.cameras("new", size)
    thresholds, notes = calibrate(
        np.concatenate([held.old_normals, held.new_normals]),
        cameras,
        parent["false_alarm_rate"],
        held_out.moments(size),
    )
    if named := set(cameras) - {""}:
        own = len(thresholds["cameras"])
        notes.append(f"{own} of {len(named)} cameras have a threshold of their own")
    if repeats:
        notes.append(f"{sum(map(len, repeats.values()))} new images were known already")
    reference = held_out.drift_reference(inputs.candidate, model)
    files = artifact.pack(model, thresholds=thresholds, metrics={"drift": reference})
    files["set_aside.json"] = _json([asdict(row) for row in suspects])
    renewal = {key: value for key, value in asdict(report).items() if key != "set_aside"}
    manifest = {
        "kind": "refresh",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": inputs.parent,
        "line": [*parent["line"], inputs.parent],
        "data": data,
        "false_alarm_rate": parent["false_alarm_rate"],
        "code": code_version(),
        "new_normals": new.num_images + unseen.num_images,
        "new_set_aside": len(suspects),
        "renewal": renewal,
        "thresholds": thresholds,
        "auroc": None,
        "notes": notes + sorted(set(unreadable)),
        "fit_seconds": time.perf_counter() - started,
    }
    try:
        store.put_version(name, inputs.candidate, files, manifest)
    except VersionExists:
        # On a machine that rounds otherwise; the first one is the candidate.
        return None
    return held_out


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
