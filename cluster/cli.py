"""The `dpdl` command: what people type. Wiring only; each command calls one function.

Heavy packages (torch, ray) are imported inside the commands, so that `dpdl --help` is quick.
Exit code 0 only if the command did what it says; an expected failure is one line on stderr.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from cluster.commands import (
    bench,
    cameras,
    dashboards,
    data,
    jobs,
    learn,
    machine,
    models,
    replay,
    research,
    stream,
)
from cluster.commands.shared import err

app = typer.Typer(
    help="Open-set visual anomaly detection for live camera streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for flat in (machine, learn, stream, replay, research):
    app.add_typer(flat.app)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(cameras.app, name="camera")
app.add_typer(bench.app, name="bench")
app.add_typer(jobs.app, name="job")
app.add_typer(dashboards.app, name="dashboards")

traceback_wanted = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of expected failures.")] = False,
) -> None:
    global traceback_wanted
    traceback_wanted = debug


interrupted = False


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # SIGTERM takes the same way out as Ctrl-C, so that context managers end what they started.
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: run a command, turn expected failures into one line and exit code 1."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores it
        signal.signal(signal.SIGINT, _interrupt)
    from infra.errors import DpdlError

    try:
        app()
    except Exception as error:
        expected = isinstance(error, DpdlError | ValueError | OSError)
        # What a signal broke off, such as the import of a C extension, ends in errors of any kind.
        if traceback_wanted or not (expected or interrupted):
            raise
        line = (" ".join(str(error).split()) or type(error).__name__) if expected else "interrupted"
        err.print(f"dpdl: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
