"""Renew the deployed model on the new normals in S3; the gate decides; the pointer moves once.

    1. inputs     objects in incoming/ that no version of this line has used
    2. candidate  renew (VQ, dpdl_core) > thresholds > version in S3 (candidate.py)
    3. gate       candidate against current on the same held-out images
    4. pointer    conditional PUT, if promoted
    5. record     <model>/decisions/<candidate>.json, if-none-match

Guarantee: killed between any two steps and run again, there is one version and one decision. The
candidate's id is a digest of its parent and inputs, so a second run finds or repeats the same
version. What a version has used stands in its own manifest, which becomes current in the one PUT of
step 4, and in its record: after a rollback that remains, so what a person has taken back does not
come again on this line; a training begins another, which gets everything. A held candidate's record
says that these inputs together are not tried again; each of them is, in other company
(find_inputs). That is the watermark, with no clock and no order of keys to rely on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from infra import decisions
from infra.answers import is_answer
from infra.cores import num_cores
from infra.errors import DataError
from infra.model_store import ModelStore
from infra.settings import Settings
from pipelines.candidate import Found, Inputs, build, find_inputs
from pipelines.dataset_index import Progress, check_snapshot, load_index, snapshot
from pipelines.gate import GateLimits
from pipelines.people import repeated
from pipelines.promotion import consider, load
from pipelines.scoring import chosen_device, yield_cores
from pipelines.sources import damaged


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    model_name: str = "default"
    min_new: int = 16
    """Fewer new images than this wait for company."""
    seed: int = 0
    device: str = ""
    """Where models look at images: cpu or cuda; a GPU, where there is one, with ""."""
    limits: GateLimits = field(default_factory=GateLimits)


@dataclass(frozen=True)
class RefreshReport:
    decision: str
    """promoted, held, or none: nothing to do yet."""
    from_version: str
    to_version: str | None
    why: str
    seconds: float
    reasons: list[str] = field(default_factory=list)
    """`why` in its parts."""
    new_normals: int = 0
    set_aside: int = 0
    """New images that look like defects to the current model: listed in set_aside.json."""
    prototypes: dict[str, int] = field(default_factory=dict)
    """total, kept, replaced, and of the replaced those revived."""
    input_shift: float = 0.0
    """How far the new normals were from what the current model knows; 0: not at all."""
    relearnt: bool = False
    """Whether that made directions and heads be learnt anew."""
    score_shift: float = 0.0
    """Mean change of normals' scores, in units of their deviation."""
    thresholds_before: dict[str, Any] = field(default_factory=dict)
    thresholds_after: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """The gate's."""
    notes: list[str] = field(default_factory=list)


def refresh_once(
    settings: Settings, options: RefreshOptions | None = None, progress: Progress | None = None
) -> RefreshReport:
    """Bring the current model up to what is in incoming/ now.

    Raises DataError where there is no current version or its data set is gone or was imported anew,
    PointerConflict (retryable) when another process moved the pointer meanwhile: nothing is used up
    then. The calling thread is nice from here on.
    """
    options = options or RefreshOptions()
    started = time.perf_counter()
    yield_cores()
    # A job's driver is given one thread by Ray: it takes half of the cores, and a stream beside it
    # has the others. Else all, yielding.
    torch.set_num_threads(max(min(torch.get_num_threads(), num_cores()), num_cores() // 2))
    store = ModelStore(settings)
    name = options.model_name
    pointer = store.current(name)
    if pointer is None:
        raise DataError(f"model {name!r} has no current version: run `dpdl train` first")
    parent = store.manifest(name, pointer.version)
    index = load_index(settings, parent["data"]["dataset"])
    check_snapshot(settings, index)
    if _imported(snapshot(index)) != _imported(parent["data"]):
        raise DataError(
            f"data set {index.name!r} was imported anew since {pointer.version} was made, and what "
            "that has learnt may be held out now: train again, "
            f"`dpdl train --dataset {index.name}`"
        )
    if parent["kind"] == "refresh":
        # Killed between pointer and record: without it, a rollback would bring these inputs again.
        consider(settings, store, name, pointer.version)
    past = decisions.recorded(settings, name)

    def find(left_out: Mapping[str, str]) -> Found:
        return find_inputs(settings, pointer.version, parent, index, past, options.seed, left_out)

    found = find({})
    wanted = max(1, options.min_new)
    if found.waiting >= wanted and (unreadable := damaged(settings, found.inputs.new)):
        found = find(unreadable)
    inputs, notes = found.inputs, found.notes

    def nothing(why: str) -> RefreshReport:
        seconds = time.perf_counter() - started
        return RefreshReport("none", pointer.version, None, why, seconds, [why], notes=notes)

    if found.waiting < wanted:
        return nothing(f"{found.waiting} new images, {options.min_new} are awaited")
    decided = decisions.find(settings, name, inputs.candidate)
    if decided is not None:
        return nothing(f"{inputs.candidate} of the same images was {decided.decision} before")
    device = chosen_device(options.device)
    current = load(store, name, pointer.version, device)
    held_out = None
    if inputs.candidate not in store.list_versions(name):
        repeats = repeated(
            settings, index, used=inputs.used, new=inputs.new, set_aside=inputs.set_aside
        )
        if sum(map(len, repeats.values())) == found.images:
            why = f"all {found.images} new images are known already"
            _settle(settings, name, inputs, why)
            return nothing(why)
        held_out = build(
            settings, store, name, inputs, repeats, parent, index, current, device, progress
        )
    manifest = store.manifest(name, inputs.candidate)
    verdict = consider(
        settings,
        store,
        name,
        inputs.candidate,
        limits=options.limits,
        held_out=held_out,
        device=device,
        progress=progress,
    )
    now = store.current(name)
    if verdict.promote and now is not None and now.version != inputs.candidate:
        # Killed after it had moved the pointer, and rolled back; or another was quick.
        return nothing(f"{inputs.candidate} was promoted, and {now.version} is current since")
    renewal = manifest["renewal"]
    return RefreshReport(
        decision="promoted" if verdict.promote else "held",
        from_version=pointer.version,
        to_version=inputs.candidate,
        why=verdict.why,
        seconds=time.perf_counter() - started,
        reasons=verdict.reasons or [verdict.why],
        new_normals=manifest["new_normals"],
        set_aside=manifest["new_set_aside"],
        prototypes={
            "total": renewal["prototypes"],
            **{what: renewal[what] for what in ("kept", "replaced", "revived")},
        },
        input_shift=renewal["input_shift"],
        relearnt=renewal["relearnt"],
        score_shift=renewal["score_shift"],
        thresholds_before=dict(current.thresholds),
        thresholds_after=manifest["thresholds"],
        numbers=verdict.numbers,
        notes=[*notes, *manifest["notes"]],
    )


def _imported(data: Mapping[str, Any]) -> dict[str, str]:
    """Objects of the import itself, without what people have confirmed since."""
    return {key: etag for key, etag in data["objects"].items() if not is_answer(key)}


def _settle(settings: Settings, name: str, inputs: Inputs, why: str) -> None:
    """Record that there was nothing to learn: these objects do not come again."""
    decisions.record(
        settings,
        name,
        decisions.Decision(
            candidate=inputs.candidate,
            parent=inputs.parent,
            decision="none",
            why=why,
            numbers={},
            inputs=inputs.new,
        ),
    )
