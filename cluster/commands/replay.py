"""What another version would have said of the past."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.commands.shared import (
    Device,
    Report,
    device_here,
    err,
    out,
    progress_line,
    write_report,
)

app = typer.Typer()


@app.command("replay")
def replay_command(
    since: Annotated[
        str, typer.Option("--from", metavar="TIME|OFFSET", help="2026-11-25T08:00, 2h, or 1200.")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="VERSION", help="Version, or MODEL/VERSION.")
    ],
    until: Annotated[
        str | None, typer.Option("--to", metavar="TIME|OFFSET", help="Default: until now.")
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; may be repeated. Default: the model's cameras."),
    ] = None,
    keep_days: Annotated[float, typer.Option(min=0.001, help="Results expire after this.")] = 7.0,
    device: Device = "",
    report: Report = None,
) -> None:
    """Score the past in Kafka again with another version, beside the live stream; compare."""
    device = device_here(device)
    from infra.settings import load_settings
    from serving.replay import Place, ReplayOptions, replay

    name, _, version = model.rpartition("/")
    options = ReplayOptions(
        model=name or "default",
        version=version,
        start=Place.parse(since),
        end=Place.parse(until) if until is not None else None,
        cameras=camera or (),
        device=device,
        keep_days=keep_days,
    )
    with suppress(OSError):
        os.nice(10)  # the live stream goes first
    with progress_line("replay") as progress:
        done = replay(load_settings(), options, progress)
    _show(done)
    write_report(report, done)


def _show_begun(begun: dict[str, dict[str, Any]]) -> None:
    """Where it began; and a warning where that is later than was asked for."""

    def where(partition: str) -> str:
        one = begun[partition]
        at = datetime.fromisoformat(one["at"]).astimezone() if one["at"] else None
        of = f" of {at:%Y-%m-%d %H:%M:%S}" if at else ""
        return f"partition {partition} at offset {one['offset']}{of}"

    out.print(f"begun in {', '.join(map(where, begun))}", markup=False, highlight=False)
    if cut := [partition for partition, one in begun.items() if one["expired_before"]]:
        err.print(
            f"Kafka keeps nothing older of {', '.join(map(where, cut))}: if you asked for more, it "
            "has expired (kafka.retention_hours, kafka.retention_mb)",
            style="yellow",
            markup=False,
            highlight=False,
        )


def _show_expired(expired: dict[str, int]) -> None:
    for partition, number in expired.items():
        err.print(
            f"{number} frames of partition {partition} expired in Kafka before they were replayed",
            style="yellow",
        )


def _show(done: dict[str, Any]) -> None:
    _show_begun(done["begun"])
    _show_expired(done["expired"])
    table = Table(box=None, pad_edge=False)
    columns = ("frames", "compared", "agreement", "alerts then", "now", "only then", "only now")
    for column in ("camera", *columns, "correlation"):
        table.add_column(column, justify="left" if column == "camera" else "right")
    for camera, found in [*done["cameras"].items(), ("all", done)]:
        share, correlation = found["agreement"], found["score_correlation"]
        table.add_row(
            escape(camera),
            str(found["frames"]),
            str(found["compared"]),
            "" if share is None else f"{share:.1%}",
            str(found["alerts_then"]),
            str(found["alerts_now"]),
            str(found["alerts_only_then"]),
            str(found["alerts_only_now"]),
            "" if correlation is None else f"{correlation:.3f}",
        )
    out.print(table)
    if done["left_out"]:
        err.print(
            f"cameras left out, which other models are to score: {len(done['left_out'])} "
            "(--camera takes them in)",
            style="yellow",
        )
    out.print(
        f"{done['model']}/{done['version']} at {done['frames_per_second']:g} frames/s; results "
        f"below {done['results_below']} until {done['results_expire_at'][:16]} UTC",
        markup=False,
    )
