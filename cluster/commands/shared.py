"""What the commands share: consoles, common options, reports, progress."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

out, err = Console(), Console(stderr=True)

Report = Annotated[Path | None, typer.Option("--report", help="Write what happened as JSON here.")]
Model = Annotated[str, typer.Option("--model", help="Name of the model.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu or cuda; default: a GPU where there is one.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the recipe; may be repeated.")
]


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write `report` as JSON, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=2, sort_keys=True, default=str) + "\n")
    partial.replace(path)
    err.print(f"report: {path}", style="dim", markup=False)


def key_values(pairs: list[str] | None, option: str = "--set") -> dict[str, str]:
    """`OPTION key=value`, repeated, as a dictionary. Raises ValueError for one without "="."""
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} {pair}: wanted key=value")
        found[key.strip()] = value.strip()
    return found


def duration(text: str) -> float:
    """ "30s", "15m", "6h" or "1d" in seconds. Raises BadParameter for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r}: wanted a time such as 30s, 15m, 6h or 1d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def check_device(text: str) -> None:
    """Raises ValueError for anything but "", cpu, and cuda or cuda:N as PyTorch will find it."""
    if text in ("", "cpu"):
        return
    found = re.fullmatch(r"cuda(?::(\d+))?", text)
    if found is None:
        raise ValueError(f"--device {text}: wanted cpu, cuda or cuda:N")
    import torch

    count = torch.cuda.device_count()
    if int(found[1] or 0) >= count:
        raise ValueError(f"--device {text}: PyTorch finds {count} GPUs here, take --device cpu")


def device_here(text: str) -> str:
    """The device that is meant, "" for a GPU where there is one, and said if it was not named.
    Raises as check_device()."""
    check_device(text)
    if text:
        return text
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    err.print(f"device: {found}", style="dim")
    return found


def numbers(text: str) -> list[int]:
    """ "0,1,2" as integers. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text}: wanted whole numbers with commas between") from None


EVENTS = ("start", "workers", "machines", "tuning", "renewal")
"""Stages of which every report is a line that stays: a run's name, workers and where they run,
epochs, renewals."""


@contextmanager
def progress_line(title: str) -> Iterator[Callable[[str, float, dict[str, Any]], None]]:
    """One line that says how far a long job is; stages go by as plain lines where no one looks."""
    if err.is_terminal:
        with err.status(title) as live:

            def show(stage: str, fraction: float, figures: dict[str, Any]) -> None:
                if stage in EVENTS:
                    err.print(f"{title}: {stage}  {_figures(figures)}")
                live.update(f"{title}: {stage} {fraction:.0%}  {_figures(figures)}")

            yield show
        return
    seen: list[str] = []

    def say(stage: str, fraction: float, figures: dict[str, Any]) -> None:
        if stage in EVENTS or "because" in figures:
            err.print(f"{title}: {stage}  {_figures(figures)}", soft_wrap=True)
        elif seen[-1:] != [stage]:
            err.print(f"{title}: {stage}", markup=False)
        seen.append(stage)

    yield say


def _figures(figures: dict[str, Any]) -> str:
    parts = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    return escape(", ".join(parts))
