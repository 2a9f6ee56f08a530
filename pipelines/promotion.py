"""From a stored candidate to the pointer: gate, one conditional PUT, the decision's record."""

from __future__ import annotations

import getpass
import socket
import subprocess
from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from dpdl_core.artifact import ArtifactError, LoadedVersion, unpack
from infra import decisions
from infra.errors import PointerConflict, VersionBroken
from infra.grafana_client import announce_move
from infra.model_store import ModelStore, Pointer
from infra.settings import Settings
from pipelines.dataset_index import Progress
from pipelines.gate import GateLimits, Verdict, judge
from pipelines.held_out import HeldOut, each_camera
from pipelines.scoring import chosen_device

RACES = 5
"""So often a training is judged anew when the pointer moves under it: a refresh takes longer than
the gate, so one lost race is rare, and five in a row say that something is wrong."""


def consider(
    settings: Settings,
    store: ModelStore,
    name: str,
    version: str,
    *,
    limits: GateLimits | None = None,
    held_out: HeldOut | None = None,
    device: str = "",
    progress: Progress | None = None,
) -> Verdict:
    """Promote `version` where there is no current one or where the gate lets it pass; record it.

    Once: where the decision stands it is what comes back, whatever is current by now. Killed before
    the record and called again, it decides as it would have done, or records what it has done.
    Raises PointerConflict when the pointer is, or moves meanwhile, away from the candidate's
    parent: what the candidate was judged against is then no longer what it would replace.
    """
    decided = decisions.find(settings, name, version)
    if decided is not None:
        return Verdict(decided.decision == "promoted", decided.why, decided.numbers)
    manifest, pointer = store.manifest(name, version), store.current(name)
    moved = [m for m in pointer.moves if m.version == version] if pointer is not None else []
    if moved:
        verdict = Verdict(True, moved[0].why, {})
    elif pointer is None:
        verdict = Verdict(True, "the first version", {})
    elif manifest["parent"] not in (None, pointer.version):
        raise PointerConflict(
            f"{version} descends from {manifest['parent']}, but {pointer.version} is current "
            "now: refresh again"
        )
    elif other := _of_another_data_set(store, name, manifest, pointer):
        verdict = Verdict(False, other, {}, [other])
    else:
        if held_out is None:
            current = store.manifest(name, pointer.version)
            each = each_camera(manifest["false_alarm_rate"])
            held_out = HeldOut(settings, manifest["data"], current["data"], each=each)
        best: Mapping[str, Any] = {}
        if manifest["parent"]:  # a training begins a line of its own
            before = decisions.find(settings, name, pointer.version)
            best = before.numbers if before is not None else {}
        verdict = _against_current(
            store, name, version, manifest, pointer, held_out, best, limits, device, progress
        )
    if verdict.promote and not moved:
        move(settings, store, name, version, pointer, verdict.why)
    _record(settings, name, version, manifest, verdict)
    return verdict


def _of_another_data_set(
    store: ModelStore, name: str, manifest: Mapping[str, Any], pointer: Pointer
) -> str:
    """Why a training of another product than the current version's is held; "" where it is not.

    Nothing that both have to know can tell: its own normals are strange to the current version.
    """
    mine = manifest["data"]["dataset"]
    current = store.manifest(name, pointer.version)["data"]["dataset"]
    if mine == current:
        return ""
    return (
        f"it learnt data set {mine}, {pointer.version}, which is current, {current}: give it a "
        "name of its own (`dpdl train --model NAME`), or `dpdl models promote` it if it is to "
        "replace that"
    )


def consider_training(
    settings: Settings,
    store: ModelStore,
    name: str,
    version: str,
    progress: Progress | None = None,
) -> Verdict:
    """consider() a version that descends from none: whatever a refresh makes current meanwhile, it
    can be judged against that. PointerConflict after RACES lost races."""
    for _ in range(RACES - 1):
        try:
            return consider(settings, store, name, version, progress=progress)
        except PointerConflict as error:
            if progress is not None:
                progress("gate", 0.0, {"because": f"{error}; judged against the new one"})
    return consider(settings, store, name, version, progress=progress)


def load(store: ModelStore, name: str, version: str, device: str = "cpu") -> LoadedVersion:
    """A verified version, ready to score on a device. VersionBroken when it is not."""
    try:
        return unpack(store.fetch(name, version), device)
    except ArtifactError as error:
        raise VersionBroken(f"{name} {version}: {error}") from None


def move(
    settings: Settings,
    store: ModelStore,
    name: str,
    version: str,
    seen: Pointer | None,
    why: str,
    *,
    back: bool = False,
) -> Pointer:
    """Point at `version` and annotate it in Grafana; harmless where another process did it first.

    Whoever moved it annotates it, so that one move is one annotation.
    """
    try:
        pointer = store.move_pointer(name, version, seen, by=who(), why=why, back=back)
        announce_move(settings, name, pointer)
        return pointer
    except PointerConflict:
        now = store.current(name)
        if now is not None and now.version == version:
            return now
        raise


def who() -> str:
    """user@host, for the pointer's history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = "?"
    return f"{user}@{socket.gethostname()}"


def code_version() -> dict[str, str | None]:
    """The package's version, and the git commit where it runs from a checkout."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"dpdl": package_version("dpdl"), "commit": commit}


def _record(
    settings: Settings, name: str, version: str, manifest: Mapping[str, Any], verdict: Verdict
) -> None:
    data = manifest["data"]
    decisions.record(
        settings,
        name,
        decisions.Decision(
            candidate=version,
            parent=manifest["parent"],
            decision="promoted" if verdict.promote else "held",
            why=verdict.why,
            numbers=verdict.numbers,
            inputs=data.get("new", {}) | data.get("new_defects", {}),
        ),
    )


def _against_current(
    store: ModelStore,
    name: str,
    version: str,
    manifest: Mapping[str, Any],
    pointer: Pointer,
    held_out: HeldOut,
    best: Mapping[str, Any],
    limits: GateLimits | None,
    device: str,
    progress: Progress | None,
) -> Verdict:
    where = chosen_device(device)
    current, candidate = (load(store, name, v, where) for v in (pointer.version, version))
    scores = []
    for step, (which, loaded) in enumerate(((pointer.version, current), (version, candidate))):
        if progress is not None:
            progress("gate", step / 2, {"version": which})
        scores.append(held_out.score(which, loaded.model))
    size = candidate.model.config.image_size
    verdict = judge(
        *scores,
        defect_cameras=held_out.cameras("defects", size),
        old_cameras=held_out.cameras("old", size),
        new_cameras=held_out.cameras("new", size),
        moments=held_out.moments(size),
        current_thresholds=dict(current.thresholds),
        candidate_thresholds=dict(candidate.thresholds),
        # A refresh sets its thresholds on old and new; a training has not seen the new ones.
        set_on_new=manifest["parent"] is not None,
        lasting=held_out.lasting(size),
        best=best,
        limits=limits,
    )
    if progress is not None:
        progress("gate", 1.0, {"decision": "promote" if verdict.promote else "hold"})
    return verdict
