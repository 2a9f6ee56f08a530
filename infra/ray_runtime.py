"""Join the Ray cluster that is there, or start one on this machine. One place for how.

Ray finds a cluster by RAY_ADDRESS or by the file that `ray start` leaves; with neither, one is
started here that ends with this process. Token authentication is Ray's own default.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import traceback
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from infra.errors import AuthFailed, ServiceUnavailable

OBJECT_STORE_BYTES = 1 << 30
"""Of a cluster started here. Decoded batches pass through it, whole data sets never do."""
ANSWER_S = 5.0
SCORER_GPU_SHARE, TRAINING_GPU_SHARE = 0.25, 0.75
"""Of a card: a scorer of the stream fits beside a training worker, two workers do not."""
_TEMP = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
_ADDRESS_FILE = Path(_TEMP) / "ray" / "ray_current_cluster"
"""Where `ray start` leaves it, for Ray to join."""

ENVIRONMENT = {
    # Ray prints a paragraph on token authentication at every start, and usage hints.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts its workers at nice 15: on a busy machine the stream's scorer would then yield to
    # everything else. Batch work makes itself nice instead (pipelines/train_worker.py).
    "RAY_worker_niceness": "0",
    # Serve gives its HTTP proxy five seconds to import everything, kills it, and tries again: on a
    # busy machine for ever.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    # Without the first Ray rotates its own logs, but not what its workers write: ours.
    "RAY_ROTATION_MAX_BYTES": "100000000",
    "RAY_ROTATION_BACKUP_COUNT": "3",
}
"""What Ray's processes should be started with; cluster/Dockerfile and the cluster files have the
same."""


def connect(*, dashboard: bool = False) -> None:
    """Make ray.* usable in this process; harmless when it already is.

    A cluster started here has its dashboard, if wanted, on loopback only. AuthFailed where a
    cluster refuses our token, or we have none; ServiceUnavailable where the cluster that Ray knows
    of does not answer.
    """
    if ray.is_initialized():
        return
    _check_answers()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                **quiet,
            )
        except ValueError:
            # Ray refuses sizes when it joins a cluster that runs already: that one has its own.
            ray.init(**quiet)
    except (AuthenticationError, ConnectionError) as error:
        # Of another cluster's token Ray says so only in the text of a lost connection's cause.
        if AuthenticationError.__name__ in "".join(traceback.format_exception(error)):
            raise refused("the Ray cluster") from error
        raise
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler dumps a stack and dies at once: nothing would be ended in order.
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_answers() -> None:
    """Ray would try a dead cluster for minutes, deaf to Ctrl-C."""
    named, left = os.environ.get("RAY_ADDRESS", ""), _ADDRESS_FILE
    address = named or (left.read_text().strip() if left.is_file() else "")
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in host:
        return  # none, "local", "auto", or not for us to try
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        mend = (
            "set RAY_ADDRESS to one that runs, or unset it"
            if named
            else f"it stands in {left}. Start it again, or let `ray stop` forget it"
        )
        raise ServiceUnavailable(
            f"the Ray cluster at {address} does not answer ({error}): {mend}"
        ) from None


def refused(cluster: str) -> AuthFailed:
    """Why a cluster does not let us in, and what to do: we have no token, or another one's."""
    ours = _token_source()
    mend = (
        "copy ~/.ray/auth_token from where the cluster was made, or name its file by "
        "RAY_AUTH_TOKEN_PATH"
    )
    if ours is None:
        return AuthFailed(f"{cluster} asks for its token, and there is none here: {mend}")
    return AuthFailed(f"{cluster} refuses the token of {ours}, which is not its own: {mend}")


def _token_source() -> str | None:
    """Where Ray takes our token from, in its order; None where it finds none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return str(path) if path.is_file() and path.read_text().strip() else None


def write_scrape_targets(path: Path) -> None:
    """Say where Prometheus finds the metrics of every living node, as its file_sd_configs reads it.

    Ray writes such a file itself only where its dashboard runs. Whole or not at all.
    """
    alive = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]  # type: ignore[no-untyped-call]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps([{"targets": sorted(targets)}]) + "\n")
    partial.replace(path)


def scrape_targets_file(state_dir: Path) -> Path:
    """Where `dpdl serve` keeps them."""
    return state_dir / "prometheus" / "ray.json"
