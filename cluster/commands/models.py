"""Model versions: what there is, and which one scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.commands.shared import Model, out

app = typer.Typer(
    help="Model versions: list, show, promote, roll back, prune.", no_args_is_help=True
)


@app.command("list")
def models_list(model: Model = "default") -> None:
    """Versions, newest first, with the gate's verdict and its numbers; * is current."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("version", no_wrap=True)
    for column in ("created", "test AUROC", "gate", "why"):
        table.add_column(column)
    for one in Registry(load_settings(), model).list():
        table.add_row(
            "*" if one.current else "",
            one.version,
            _local(one.created_at),
            "" if one.auroc is None else f"{one.auroc:.3f}",
            one.decision,
            escape(one.why),
        )
    out.print(table)


@app.command("show")
def models_show(
    version: Annotated[str | None, typer.Argument(help="Default: the current one.")] = None,
    model: Model = "default",
    everything: Annotated[bool, typer.Option("--json", help="All that is known, as JSON.")] = False,
) -> None:
    """What a version is, what the gate found, and who made it current; its files are verified."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    shown = Registry(load_settings(), model).show(version)
    if everything:
        print(json.dumps(shown, indent=2, sort_keys=True))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _lines(shown):
        table.add_row(name, escape(value))
    out.print(table)


def _local(moment: str) -> str:
    """Of ISO 8601, which is kept as UTC, on this machine's clock."""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"


def _lines(shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What people ask of a version first, as (name, text)."""
    manifest = shown["manifest"]
    yield "version", shown["version"] + (", current" if shown["current"] else "")
    parent = f" of {manifest['parent']}" if manifest["parent"] else ""
    yield "made", f"{_local(manifest['created_at'])}, {manifest['kind']}{parent}"
    data = manifest["data"]
    yield "data", f"{data['dataset']}, {len(data['incoming'])} objects of later normals"
    if "new_normals" in manifest:
        aside = f"{manifest['new_set_aside']} set aside (set_aside.json)"
        yield "new normals", f"{manifest['new_normals']}, {aside}"
        renewal = manifest["renewal"]
        yield "prototypes", ", ".join(f"{renewal[k]} {k}" for k in ("kept", "replaced", "revived"))
        shift = f"{renewal['input_shift']:+.2f} of the new normals"
        yield "shift", f"{shift}, {renewal['score_shift']:+.2f} of the scores"
    if manifest["auroc"] is not None:
        yield "test AUROC", f"{manifest['auroc']:.3f}"
    if "decision" in shown:
        gate = shown["decision"]
        yield "gate", f"{gate['decision']} {_local(gate['at'])}: {gate['why']}"
        for name, value in sorted(gate["numbers"].items()):
            yield f"  {name}", f"{value:.4g}"
    found = shown["thresholds"]
    normals = f"from {found['calibration_normals']} held-out normals"
    yield "threshold", f"{found['default']:.4g} at {found['false_alarm_rate']:.3g}, {normals}"
    for camera, value in sorted(found["cameras"].items()):
        yield f"  {camera}", f"{value:.4g}"
    for move in shown.get("moves", []):
        yield "made current", f"{_local(move['at'])} by {move['by']}: {move['why']}"
    for note in manifest.get("notes", []):
        yield "note", note


@app.command("promote")
def models_promote(
    version: str,
    why: Annotated[str, typer.Option(help="Kept with the pointer.")] = "promoted by hand",
    model: Model = "default",
) -> None:
    """Make a version current, whatever the gate said; it is verified first."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    pointer = Registry(load_settings(), model).promote(version, why)
    out.print(f"current: {pointer.version}, before: {pointer.previous}", markup=False)


@app.command("rollback")
def models_rollback(
    why: Annotated[str, typer.Option(help="Kept with the pointer.")] = "rolled back by hand",
    model: Model = "default",
) -> None:
    """Go back to the version before the current one."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    pointer = Registry(load_settings(), model).rollback(why)
    out.print(f"current: {pointer.version}, before: {pointer.previous}", markup=False)


@app.command("prune")
def models_prune(
    keep: Annotated[int, typer.Option(min=0, help="So many of the others stay, the newest.")],
    model: Model = "default",
) -> None:
    """Delete versions that nothing leads to, and the checkpoints of finished trainings.

    The current version stays, and so do those that `rollback` goes through.
    """
    from infra.settings import load_settings
    from pipelines.registry import Registry

    gone = Registry(load_settings(), model).prune(keep)
    for name in gone:
        out.print(name, markup=False, highlight=False)
    out.print(f"{len(gone)} deleted", markup=False)
