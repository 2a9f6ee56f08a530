"""`dpdl up`, `down` and `status`: the embedded services, for a person at a terminal.

A service that a person configured elsewhere (say DPDL_KAFKA_BOOTSTRAP) is never started here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.embedded import SERVICE_NAMES, ServiceStatus, Stack
from infra.errors import DpdlError, SettingsError
from infra.kafka_client import make_consumer
from infra.redis_connection import make_redis
from infra.s3_client import make_minio, s3_errors
from infra.settings import Settings, load_settings


def open_stack(
    settings: Settings, *, detached: bool = False, say: Callable[[str], None] = lambda _: None
) -> Stack:
    """The stack of the state folder, with the services that nobody configured elsewhere."""
    wanted = [name for name in SERVICE_NAMES if not settings.is_external(name)]
    own = settings.embedded
    fixed = {"kafka": own.kafka_port, "s3": own.s3_port, "redis": own.redis_port}
    return Stack(
        settings.state_dir,
        services=wanted,
        detached=detached,
        ports={name: port for name, port in fixed.items() if port},
        cache_dir=own.cache_dir,
        say=say,
    )


@contextlib.contextmanager
def own_state_folder(name: str) -> Iterator[Settings]:
    """<state>/<name>, emptied, for this process and its children; one process at a time.

    SettingsError where a service is configured elsewhere: frames that are made up must not come
    among a plant's own.
    """
    outer = load_settings()
    if sources := {outer.configured_by(one) for one in SERVICE_NAMES} - {""}:
        raise SettingsError(
            f"the {name} has services of its own, and {', '.join(sorted(sources))} leads to "
            "others: leave that out for this command"
        )
    folder = outer.state_dir / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"another {name} runs in {folder}: wait for its end, or set DPDL_STATE_DIR"
            ) from None
        os.environ["DPDL_STATE_DIR"] = str(folder)
        if "DPDL_SERVE_HTTP_PORT" not in os.environ:
            os.environ["DPDL_SERVE_HTTP_PORT"] = str(_free_port(load_settings().serve.http_port))
        for data in ("kafka", "s3", "redis"):
            shutil.rmtree(folder / data, ignore_errors=True)
        yield load_settings()


def _free_port(wanted: int) -> int:
    """`wanted`, or any free port where somebody has that one."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise SettingsError("no free port on 127.0.0.1 for the console: set DPDL_SERVE_HTTP_PORT")


def up(settings: Settings, console: Console | None = None) -> None:
    """Start the services and leave them running until down().

    Raises SettingsError or ServiceUnavailable, in one line; then nothing new is left running.
    """
    console = console or Console()
    stack = open_stack(settings, detached=True, say=lambda line: console.print(line, style="dim"))
    stack.start()
    show_services(settings, console)


def down(settings: Settings, console: Console | None = None) -> None:
    """Stop every service of the state folder; its data stays."""
    console = console or Console()
    stack = Stack(settings.state_dir, detached=True)
    num_running = sum(one.pid is not None for one in stack.status())
    stack.stop()
    console.print(f"{num_running} services stopped" if num_running else "no service was running")


def show_services(settings: Settings, console: Console | None = None) -> list[ServiceStatus]:
    """Print what runs and how it is; returns the same, for the exit code.

    A service that is configured elsewhere is asked too: it is healthy when it answers.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("service", "state", "pid", "endpoint", "memory", "up"):
        table.add_column(column, justify="right" if column in ("pid", "memory", "up") else "left")
    found = [
        _asked(settings, one) if settings.is_external(one.name) else one
        for one in Stack(settings.state_dir).status()
    ]
    for one in found:
        if settings.is_external(one.name):
            colour = "green" if one.healthy else "red"
            table.add_row(
                one.title, f"[{colour}]{escape(one.detail)}[/]", "", _endpoint(settings, one.name)
            )
            continue
        colour = "green" if one.healthy else "dim" if one.pid is None else "red"
        table.add_row(
            one.title,
            f"[{colour}]{one.detail}[/]",
            str(one.pid or ""),
            f"127.0.0.1:{one.port}" if one.port else "",
            f"{one.memory_bytes / 1e6:.0f} MB" if one.pid else "",
            _duration(one.uptime_s) if one.pid else "",
        )
    (console or Console()).print(table)
    return found


def _asked(settings: Settings, one: ServiceStatus) -> ServiceStatus:
    """One real request, with the settings' credentials."""
    try:
        if one.name == "kafka":
            make_consumer(settings).close()
        elif one.name == "redis":
            make_redis(settings).close()
        else:
            with s3_errors(settings.s3):
                make_minio(settings).bucket_exists(settings.s3.models_bucket)
    except DpdlError as error:
        return replace(one, healthy=False, detail=f"configured elsewhere: {error}")
    return replace(one, healthy=True, detail="configured elsewhere, answers")


def _endpoint(settings: Settings, name: str) -> str:
    return {
        "kafka": settings.kafka.bootstrap,
        "s3": settings.s3.endpoint,
        "redis": f"{settings.redis.host}:{settings.redis.port}",
    }[name]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
