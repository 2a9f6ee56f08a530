"""The streaming application: builds it, deploys it, takes it down.

    camera > Kafka > Consumer > Scorer > (back in Consumer) > Redis, S3      Console > people

`build` is what `serve deploy` and `serve run serving.app:build` import; `deploy` is what
`dpdl serve` and `dpdl demo` call.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from infra import ray_runtime
from infra.errors import DataError, ServiceUnavailable, SettingsError
from infra.kafka_client import ensure_topics
from infra.model_store import ModelStore
from infra.s3_client import ensure_buckets
from infra.settings import Settings, load_settings
from serving.console.api import Console
from serving.consume import CLOSE_S, DRAIN_S, Consumer
from serving.score import Scorer

APP_NAME = "dpdl"
CONSUMER, SCORER, CONSOLE = "Consumer", "Scorer", "Console"
BIG_MACHINE_CPUS = 8
"""From here on replicas reserve whole CPUs; below, they must fit beside training on two cores."""
SCORER_GPU_SHARE = 0.25
"""Training and its refreshes want the rest of the same card."""


class AppArgs(BaseModel):
    """The arguments of `build`, as in a Serve config file's `args`."""

    model_config = ConfigDict(extra="forbid")

    model_name: str = Field(min_length=1)
    """Which model of the store; its pointer is followed."""
    consumers: int = Field(default=0, ge=0)
    """Consumer replicas; 0: one per eight CPUs, at most one per partition."""
    scorers: int = Field(default=1, ge=1)
    device: str = ""
    """"cpu" or "cuda"; empty: a GPU where the cluster has one."""


def build(args: AppArgs) -> serve.Application:
    """The application, not yet deployed. Reads the settings of the process that it runs in."""
    settings = load_settings()
    cluster: dict[str, float] = {}
    if ray.is_initialized():
        cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_cpus = int(cluster.get("CPU", 0))
    roomy = num_cpus >= BIG_MACHINE_CPUS
    on_gpu = args.device == "cuda" or (not args.device and cluster.get("GPU", 0) > 0)
    consumers = args.consumers or max(1, min(settings.kafka.partitions, num_cpus // 8))
    # Two paths travel, never a secret: replicas read the settings again.
    runtime_env = {"env_vars": settings.worker_env()}

    def actor(cpus: float, gpus: float = 0.0) -> dict[str, Any]:
        return {
            "num_cpus": cpus if roomy else 0,
            "num_gpus": gpus,
            "runtime_env": runtime_env,
        }

    scorer = serve.deployment(
        name=SCORER,
        num_replicas=args.scorers,
        ray_actor_options=actor(1, SCORER_GPU_SHARE if on_gpu else 0),
        # A queue before the device, never a refusal: the consumers bound what is in flight.
        max_ongoing_requests=consumers * settings.stream.max_in_flight + 4,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )(Scorer).bind(args.model_name, args.device)
    consumer = serve.deployment(
        name=CONSUMER,
        num_replicas=consumers,
        ray_actor_options=actor(1),
        max_ongoing_requests=16,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_S + CLOSE_S + 5,
        graceful_shutdown_wait_loop_s=0.5,
    )(Consumer).bind(scorer)
    console: serve.Application = serve.deployment(
        name=CONSOLE,
        num_replicas=1,
        ray_actor_options=actor(0.5),
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
    )(Console).bind(consumer, scorer, args.model_name)
    return console


@dataclass(frozen=True, slots=True)
class Deployed:
    url: str
    """Where the console and its API answer."""
    consumers: int
    version: str
    """In use when the deployment became ready."""


def deploy(
    settings: Settings,
    *,
    model_name: str,
    consumers: int = 0,
    device: str = "",
    deadline_s: float = 180.0,
    say: Callable[[str], None] = lambda _: None,
) -> Deployed:
    """Deploys the application and waits until all of it runs; deploying again replaces it.

    Creates topics and buckets that do not exist. `settings` must be what load_settings() gives
    in this process: the replicas read the same sources.

    Errors: SettingsError (port taken, no token for a public address), DataError (no usable model
    version), ServiceUnavailable (not running at the deadline).
    """
    _check_address(settings)
    pointer = ModelStore(settings).current(model_name)
    if pointer is None:
        raise DataError(
            f"model {model_name!r} has no current version: train one with `dpdl train`, or "
            "promote one with `dpdl models promote`"
        )
    ensure_topics(settings)
    ensure_buckets(settings)
    ray_runtime.connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of every step of its own
    host, port = settings.serve.http_host, settings.serve.http_port
    if not _serve_runs():
        _check_port(host, port)
    say(f"starting the stream application on http://{host}:{port}/")
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port)
        )
    except (RayError, TimeoutError) as error:
        raise ServiceUnavailable(
            f"Ray Serve did not start ({type(error).__name__}): try again, and look at the logs "
            "under /tmp/ray/session_latest/logs/serve"
        ) from error
    if APP_NAME in serve.status().applications:
        # Serve keeps replicas whose arguments are unchanged, and theirs would keep old settings.
        serve.delete(APP_NAME)
    app = build(AppArgs(model_name=model_name, consumers=consumers, device=device))
    serve.run_many(
        [serve.RunTarget(app, name=APP_NAME, route_prefix="/")],
        wait_for_applications_running=False,
    )
    _wait_running(deadline_s)
    return Deployed(
        url=f"http://{host}:{port}/",
        consumers=len(serve.status().applications[APP_NAME].deployments[CONSUMER].replica_states),
        version=str(scorer_info()["version"]),
    )


def shutdown() -> None:
    """Takes the application down; what is in flight is published first. Harmless when not up."""
    if not ray.is_initialized() or not _serve_runs():
        return
    serve.delete(APP_NAME)


def scorer_info() -> dict[str, Any]:
    """What the scorer says of itself (serving.score.Scorer.info)."""
    handle = serve.get_deployment_handle(SCORER, APP_NAME)
    return dict(handle.info.remote().result(timeout_s=30))


def consumer_stats() -> dict[str, Any]:
    """What one consumer replica says of itself (serving.consume.Consumer.stats)."""
    handle = serve.get_deployment_handle(CONSUMER, APP_NAME)
    return dict(handle.stats.remote().result(timeout_s=30))


def _wait_running(deadline_s: float) -> None:
    until = time.monotonic() + deadline_s
    while True:
        app = serve.status().applications[APP_NAME]
        if app.status == ApplicationStatus.RUNNING:
            return
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise DataError(f"the stream application did not start: {_reason(app)}")
        if time.monotonic() > until:
            raise ServiceUnavailable(
                f"the stream application is {app.status} after {deadline_s:.0f} s: {_reason(app)}"
            )
        time.sleep(0.2)


def _reason(app: Any) -> str:
    """The last line of what went wrong in a replica: there stands our own error."""
    messages = [each.message for each in app.deployments.values() if each.message] or [app.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Unavailable" in line]
    return str((errors or lines or ["no reason given"])[-1])


def _check_address(settings: Settings) -> None:
    host = settings.serve.http_host
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and settings.serve.token is None:
        raise SettingsError(
            f"serve.http_host={host} is reachable from outside and serve.token is not set: set "
            "DPDL_SERVE_TOKEN_FILE, or use 127.0.0.1"
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"serve.http_port={port} on {host}: {error.strerror}. Set DPDL_SERVE_HTTP_PORT "
                "to a free port"
            ) from None


def _serve_runs() -> bool:
    return bool(serve.status().proxies)
