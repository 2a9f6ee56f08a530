"""Model versions: what there is, and which one scores."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from cluster.commands.shared import Model, out

app = typer.Typer(help="Model versions: list, show, promote, roll back.", no_args_is_help=True)


@app.command("list")
def models_list(model: Model = "default") -> None:
    """Versions, newest first."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    table = Table(box=None, pad_edge=False)
    for column in ("", "version", "kind", "created", "parent", "gate", "AUROC"):
        table.add_column(column)
    for one in Registry(load_settings(), model).list():
        table.add_row(
            "*" if one.current else "",
            one.version,
            one.kind,
            one.created_at,
            one.parent or "",
            one.decision,
            "" if one.auroc is None else f"{one.auroc:.3f}",
        )
    out.print(table)


@app.command("show")
def models_show(
    version: Annotated[str | None, typer.Argument(help="Default: the current one.")] = None,
    model: Model = "default",
) -> None:
    """All that is known of a version, as JSON; its files are verified."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    print(json.dumps(Registry(load_settings(), model).show(version), indent=2, sort_keys=True))


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
    out.print(f"current: {pointer.version}")


@app.command("rollback")
def models_rollback(
    why: Annotated[str, typer.Option(help="Kept with the pointer.")] = "rolled back by hand",
    model: Model = "default",
) -> None:
    """Go back to the version before the current one."""
    from infra.settings import load_settings
    from pipelines.registry import Registry

    pointer = Registry(load_settings(), model).rollback(why)
    out.print(f"current: {pointer.version}")
