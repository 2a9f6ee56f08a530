"""Cameras and their settings."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.commands.shared import out

app = typer.Typer(help="Cameras: list them, set a threshold.", no_args_is_help=True)


@app.command("list")
def camera_list() -> None:
    """Cameras, the latest seen first."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    table = Table(box=None, pad_edge=False)
    for column in ("camera", "frames", "alerts", "last score", "threshold", "set by"):
        table.add_column(column, justify="left" if column in ("camera", "set by") else "right")
    for one in ResultStore(load_settings()).cameras():
        override = one.override
        used = override.threshold if override else one.threshold_used
        table.add_row(
            escape(one.camera),
            str(one.frames),
            str(one.alerts),
            "" if one.last_score is None else f"{one.last_score:.3f}",
            "" if used is None else f"{used:.3f}",
            escape(override.by) if override else "",
        )
    out.print(table)


@app.command("set")
def camera_set(
    camera: str,
    threshold: Annotated[
        float | None, typer.Option(help="Alert above this score; leave out to clear.")
    ] = None,
    by: Annotated[str, typer.Option(envvar="USER", help="Who sets it.")] = "unknown",
) -> None:
    """Set a camera's own threshold, in place of the model's; without --threshold, clear it."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    ResultStore(load_settings()).set_threshold(camera, threshold, by=by)
    shown = "the model's" if threshold is None else f"{threshold:g}"
    out.print(f"{camera}: threshold {shown}", markup=False)
