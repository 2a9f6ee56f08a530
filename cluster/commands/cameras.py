"""Cameras and their settings."""

from __future__ import annotations

import difflib
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.commands.shared import duration, out

if TYPE_CHECKING:
    from infra.cameras import CameraState
    from infra.redis_client import ResultStore

NAMED = 5
"""Cameras that are named, the most alike ones, beside one that is not known."""

app = typer.Typer(
    help="Cameras: list them, forget some; give one its own threshold, model or debounce rule.",
    no_args_is_help=True,
)


@app.command("list")
def camera_list() -> None:
    """Cameras, the latest seen first, and what a person set for them."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    settings = load_settings()
    store = ResultStore(settings)
    table = Table(box=None, pad_edge=False)
    for column in ("camera", "last frame"):
        table.add_column(column)
    for column in ("frames", "alerts", "last score", "threshold"):
        table.add_column(column, justify="right")
    for column in ("model", "set by"):
        table.add_column(column)
    for one in store.cameras():
        used = one.threshold
        table.add_row(
            escape(one.camera),
            "never" if one.last_scored_at_ns is None else _moment(one.last_scored_at_ns),
            str(one.frames),
            str(one.alerts),
            "" if one.last_score is None else f"{one.last_score:.3f}",
            "" if used is None else f"{used:.3f}",
            escape(_model(one)),
            escape("; ".join(_settings(one))),
        )
    out.print(table)
    if unlisted := store.unlisted_frames():
        out.print(
            f"{unlisted} frames of further cameras were scored and not kept: "
            f"stream.max_cameras={settings.stream.max_cameras}",
            markup=False,
        )


@app.command("set")
def camera_set(
    camera: str,
    threshold: Annotated[float | None, typer.Option(help="Alert above this score.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that scores this camera.")] = None,
    alert: Annotated[
        str | None, typer.Option(metavar="K/N", help="Alert at K anomalies in the last N frames.")
    ] = None,
    clear_threshold: Annotated[bool, typer.Option("--clear-threshold")] = False,
    clear_model: Annotated[bool, typer.Option("--clear-model")] = False,
    clear_alert: Annotated[bool, typer.Option("--clear-alert")] = False,
    by: Annotated[str, typer.Option(envvar="USER", help="Who sets it.")] = "unknown",
) -> None:
    """Give a camera its own threshold, model or debounce rule; --clear-... takes it back.

    Works within two seconds, on a running stream too.
    """
    from infra.errors import NotFound
    from infra.model_store import ModelStore
    from infra.redis_client import ResultStore, check_threshold
    from infra.settings import load_settings

    for name, given, clear in (
        ("threshold", threshold, clear_threshold),
        ("model", model, clear_model),
        ("alert", alert, clear_alert),
    ):
        if given is not None and clear:
            raise ValueError(f"--{name} and --clear-{name} are both given: keep one")
    rule = _rule(alert) if alert is not None else None
    check_threshold(threshold)
    settings = load_settings()
    if model is not None and ModelStore(settings).current(model) is None:
        raise NotFound(
            f"model {model} has no current version: `dpdl models list --model {model}` shows what "
            "there is, `dpdl models promote` makes one current"
        )
    store = ResultStore(settings)
    unseen = _unseen(camera, store)
    done = []
    if model is not None or clear_model:  # first: a threshold is for the model that is bound
        store.bind_model(camera, model, by=by)
        done.append("model " + (model or "the default one"))
    if threshold is not None or clear_threshold:
        store.set_threshold(camera, threshold, by=by)
        done.append("threshold " + ("the model's" if threshold is None else f"{threshold:g}"))
    if rule is not None or clear_alert:
        store.set_debounce(camera, rule, by=by)
        done.append("alerts " + (f"at {alert}" if rule else "as all cameras"))
    if not done:
        raise ValueError("nothing to set: give --threshold, --model, --alert or one to clear")
    out.print(f"{camera}: {', '.join(done)}", markup=False)
    if unseen:
        out.print(unseen, style="yellow", markup=False, highlight=False)


@app.command("forget")
def camera_forget(
    cameras: Annotated[list[str] | None, typer.Argument(help="By name.")] = None,
    silent_for: Annotated[
        float | None,
        typer.Option(
            parser=duration,
            metavar="TIME",
            help="All without a frame for 30d, 12h, ..., but for "
            "those that a person set something for.",
        ),
    ] = None,
) -> None:
    """Remove cameras from the list, with their scores and settings; their alerts stay.

    Makes room below stream.max_cameras. A camera that sends again is listed anew.
    """
    from infra.errors import NotFound
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    if bool(cameras) == (silent_for is not None):
        raise ValueError("give either names of cameras or --silent-for")
    store = ResultStore(load_settings())
    known = {one.camera: one for one in store.cameras()}
    if unknown := [name for name in cameras or () if name not in known]:
        raise NotFound(f"no such camera: {', '.join(unknown)}; `dpdl camera list` shows them")
    if silent_for is not None:
        before_ns = int((time.time() - silent_for) * 1e9)
        cameras = [
            name
            for name, one in known.items()
            if one.last_scored_at_ns is not None
            and one.last_scored_at_ns < before_ns
            and not (one.override or one.binding or one.debounce)
        ]
    out.print(f"{store.forget(cameras or ())} cameras forgotten")


def _unseen(camera: str, store: ResultStore) -> str:
    """What to say of a camera that has sent nothing: one to come, or a slip of the pen."""
    state = store.camera(camera)
    if state and state.frames:
        return ""
    known = [one.camera for one in store.cameras() if one.frames]
    alike = difflib.get_close_matches(camera, known, n=NAMED, cutoff=0.0)
    more = ", ..." if len(known) > NAMED else ""
    return f"{camera} has sent no frame yet; known: {', '.join(alike) or 'none'}{more}"


def _rule(text: str) -> tuple[int, int]:
    from infra.redis_client import MAX_ALERT_N

    try:
        k, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--alert {text}: wanted K/N, such as 3/5") from None
    if not 1 <= k <= n <= MAX_ALERT_N:
        raise ValueError(f"--alert {text}: wanted K/N with 1 <= K <= N <= {MAX_ALERT_N}")
    return k, n


def _model(one: CameraState) -> str:
    """What scores it, and what should where that is another."""
    used = one.model or ""
    if one.binding and one.binding.model != used:
        return f"{one.binding.model} (last scored by {used})" if used else one.binding.model
    return used


def _moment(at_ns: int) -> str:
    return f"{datetime.fromtimestamp(at_ns / 1e9):%Y-%m-%d %H:%M}"


def _settings(one: CameraState) -> list[str]:
    def stamp(by: str, at_ns: int) -> str:
        return f"{by} {_moment(at_ns)}"

    found = []
    if one.override:
        other = f" for {one.override_is_for}" if one.override_is_for else ""
        of = f"threshold {one.override.threshold:g}{other}"
        found.append(f"{of}: {stamp(one.override.by, one.override.at_ns)}")
    if one.binding:
        found.append(f"model: {stamp(one.binding.by, one.binding.at_ns)}")
    if one.debounce:
        rule = one.debounce
        found.append(f"alert {rule.k}/{rule.n}: {stamp(rule.by, rule.at_ns)}")
    return found
