"""Renew the deployed model on the new normals in S3; the gate decides; the pointer moves once.

    1. inputs     objects in incoming/ that no decision has used
    2. candidate  renew (VQ, dpdl_core) > thresholds > version in S3
    3. gate       candidate against current on the same held-out images
    4. pointer    conditional PUT, if promoted
    5. record     <model>/decisions/<candidate>.json, if-none-match

Guarantee: killed between any two steps and run again, there is one version and one decision. The
candidate's id is a digest of its parent and inputs, so a second run finds or repeats the same
version. What a version has used stands in its own manifest, which becomes current in the one PUT of
step 4; a held candidate's inputs stand in its record. Either way the inputs count as used exactly
when the decision stands: that is the watermark, with no clock and no order of keys to rely on.
After a rollback the record remains, so what a person has taken back does not come again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dpdl_core import artifact
from dpdl_core.artifact import LoadedVersion
from dpdl_core.fit import RenewReport, renew, set_aside
from infra import decisions
from infra.errors import DataError, DpdlError, VersionExists
from infra.model_store import ModelStore
from infra.settings import Settings
from pipelines.dataset_index import (
    DatasetIndex,
    Progress,
    check_snapshot,
    incoming,
    load_index,
    snapshot,
)
from pipelines.gate import GateLimits, Verdict
from pipelines.held_out import HeldOut, images, is_held_out
from pipelines.promotion import code_version, consider, load
from pipelines.scoring import calibrate, yield_cores
from pipelines.sources import RowRef, row_groups, stack


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    model_name: str = "default"
    min_new: int = 16
    """Fewer new images than this wait for company."""
    seed: int = 0
    limits: GateLimits = field(default_factory=GateLimits)


@dataclass(frozen=True)
class RefreshReport:
    decision: str
    """promoted, held, or none: nothing to do yet."""
    from_version: str
    to_version: str | None
    why: str
    seconds: float
    new_normals: int = 0
    set_aside: int = 0
    """New images that look like defects to the current model: listed in set_aside.json."""
    renewal: dict[str, Any] = field(default_factory=dict)
    """Prototypes kept, replaced, revived; score shift."""
    thresholds_before: dict[str, Any] = field(default_factory=dict)
    thresholds_after: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """The gate's."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Inputs:
    """What a candidate is made of; its id follows from this alone."""

    parent: str
    dataset: str
    objects: dict[str, str]
    """Of the data set, key -> ETag."""
    used: dict[str, str]
    """Incoming objects that the parent has used already."""
    new: dict[str, str]
    set_aside: list[str]
    """Digests that the parent's renewals set aside."""
    seed: int

    @property
    def candidate(self) -> str:
        identity = json.dumps(asdict(self), sort_keys=True).encode()
        return f"refresh-{hashlib.sha256(identity).hexdigest()[:12]}"


def refresh_once(
    settings: Settings, options: RefreshOptions | None = None, progress: Progress | None = None
) -> RefreshReport:
    """Bring the current model up to what is in incoming/ now.

    Raises DataError where there is no current version or its data set is gone, PointerConflict
    (retryable) when another process moved the pointer meanwhile: nothing is used up then. The
    calling thread is nice from here on.
    """
    options = options or RefreshOptions()
    started = time.perf_counter()
    yield_cores()
    store = ModelStore(settings)
    name = options.model_name
    pointer = store.current(name)
    if pointer is None:
        raise DataError(f"model {name!r} has no current version: run `dpdl train` first")
    parent = store.manifest(name, pointer.version)
    index = load_index(settings, parent["data"]["dataset"])
    check_snapshot(settings, index)
    past = {decision.candidate: decision for decision in decisions.recorded(settings, name)}
    if parent["kind"] == "refresh" and pointer.version not in past:
        # Killed between pointer and record: without it, a rollback would bring these inputs again.
        _record(settings, name, pointer.version, parent, Verdict(True, pointer.why, {}))
    inputs = _inputs(settings, pointer.version, parent, index, past.values(), options.seed)
    waiting = sum(group.rows for group in row_groups(settings, inputs.new))
    if waiting < max(1, options.min_new):
        return RefreshReport(
            decision="none",
            from_version=pointer.version,
            to_version=None,
            why=f"{waiting} new images, {options.min_new} are awaited",
            seconds=time.perf_counter() - started,
        )
    current = load(store, name, pointer.version)
    held_out = None
    if inputs.candidate not in store.list_versions(name):
        held_out = _build(settings, store, name, inputs, parent, index, current, progress)
    manifest = store.manifest(name, inputs.candidate)
    verdict = consider(
        settings,
        store,
        name,
        inputs.candidate,
        limits=options.limits,
        held_out=held_out,
        progress=progress,
    )
    _record(settings, name, inputs.candidate, manifest, verdict)
    return RefreshReport(
        decision="promoted" if verdict.promote else "held",
        from_version=pointer.version,
        to_version=inputs.candidate,
        why=verdict.why,
        seconds=time.perf_counter() - started,
        new_normals=manifest["new_normals"],
        set_aside=manifest["new_set_aside"],
        renewal=manifest["renewal"],
        thresholds_before=dict(current.thresholds),
        thresholds_after=manifest["thresholds"],
        numbers=verdict.numbers,
        notes=manifest["notes"],
    )


def refresh_every(
    settings: Settings,
    options: RefreshOptions,
    interval_s: float,
    report: Callable[[RefreshReport | DpdlError], None],
    stop: threading.Event,
    progress: Progress | None = None,
) -> None:
    """Look for new normals every interval_s until `stop`; finding too few costs a listing.

    What may pass (a service away, a lost race for the pointer) is reported and tried again; any
    other error ends the loop.
    """
    while True:
        try:
            report(refresh_once(settings, options, progress))
        except DpdlError as error:
            if not error.retryable:
                raise
            report(error)
        if stop.wait(interval_s):
            return


def _inputs(
    settings: Settings,
    current: str,
    parent: Mapping[str, Any],
    index: DatasetIndex,
    past: Iterable[decisions.Decision],
    seed: int,
) -> _Inputs:
    """What is new to this version: not in its manifest, and not held or rolled back on its line.

    Decisions of another line do not count: a model trained from scratch gets everything again.
    """
    data = parent["data"]
    line = {current, *parent["line"]}
    settled = set(data["incoming"].items())
    for decision in past:
        if decision.parent in line:
            settled |= set(decision.inputs.items())
    stored = {o.key: o.etag for o in incoming(settings, index.name)}
    return _Inputs(
        parent=current,
        dataset=index.name,
        objects=snapshot(index)["objects"],
        used={key: etag for key, etag in data["incoming"].items() if key in stored},
        new={key: etag for key, etag in stored.items() if (key, etag) not in settled},
        set_aside=list(data["set_aside"]),
        seed=seed,
    )


def _build(
    settings: Settings,
    store: ModelStore,
    name: str,
    inputs: _Inputs,
    parent: Mapping[str, Any],
    index: DatasetIndex,
    current: LoadedVersion,
    progress: Progress | None,
) -> HeldOut | None:
    """Renew, calibrate, and store the candidate. Gives the held-out images, scored by it."""
    started = time.perf_counter()
    size = current.model.config.image_size
    aside = set(inputs.set_aside)

    def learnt(row: RowRef) -> bool:
        return not is_held_out(row) and row.digest not in aside

    train_keys = index.keys("train", 0)
    old = images(
        settings,
        [*train_keys, *inputs.used],
        size,
        lambda row: row.key not in inputs.used or learnt(row),
    )
    new = images(settings, inputs.new, size, learnt)
    defects = stack(images(settings, index.keys("train", 1), size))
    model, report = renew(
        current.model, old, new, defects, seed=inputs.seed, device="cpu", progress=progress
    )
    # The held-out share goes through the same sieve: a defect in it would lift the thresholds.
    unseen = images(
        settings, inputs.new, size, lambda row: is_held_out(row) and row.digest not in aside
    )
    doubtful = set_aside(current.model, unseen).nonzero().flatten().tolist()
    suspects = [new.rows[i] for i in report.set_aside] + [unseen.rows[i] for i in doubtful]
    data = {
        "dataset": index.name,
        "split_sha256": index.split_sha256,
        "objects": inputs.objects,
        "incoming": inputs.used | inputs.new,
        "new": inputs.new,
        "set_aside": sorted(aside | {row.digest for row in suspects}),
    }
    held_out = HeldOut(settings, data)
    held = held_out.score(inputs.candidate, model)
    thresholds, notes = calibrate(
        np.concatenate([held.old_normals, held.new_normals]),
        held_out.cameras("old", size) + held_out.cameras("new", size),
        parent["false_alarm_rate"],
    )
    reference = held_out.drift_reference(inputs.candidate, model)
    files = artifact.pack(model, thresholds=thresholds, metrics={"drift": reference})
    files["set_aside.json"] = _json([asdict(row) for row in suspects])
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
        "renewal": _plain(report),
        "thresholds": thresholds,
        "auroc": None,
        "notes": notes,
        "fit_seconds": time.perf_counter() - started,
    }
    try:
        store.put_version(name, inputs.candidate, files, manifest)
    except VersionExists:
        # Another refresh of the same inputs was quicker, on a machine that rounds otherwise: its
        # candidate is the candidate.
        return None
    return held_out


def _record(
    settings: Settings, name: str, candidate: str, manifest: Mapping[str, Any], verdict: Verdict
) -> None:
    decisions.record(
        settings,
        name,
        decisions.Decision(
            candidate=candidate,
            parent=manifest["parent"],
            decision="promoted" if verdict.promote else "held",
            why=verdict.why,
            numbers=verdict.numbers,
            inputs=manifest["data"]["new"],
        ),
    )


def _plain(report: RenewReport) -> dict[str, Any]:
    """The report's figures as JSON takes them; the set-aside indices stand in their own file."""
    return {key: value for key, value in asdict(report).items() if key != "set_aside"}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
