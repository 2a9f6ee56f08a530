"""The streaming application: builds it, deploys it, takes it down.

    camera > Kafka > Consumer > Scorer > (back in Consumer) > Redis, S3      Console > people

`build` is what `serve deploy` and `serve run serving.app:build` import; `deploy` is what
`dpdl serve` and `dpdl demo` call.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeInstanceDetails

from infra import ray_runtime
from infra.errors import DataError, DpdlError, ServiceUnavailable, SettingsError
from infra.kafka_client import ensure_topics, kafka_errors, make_consumer, partitions_of
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets, expire_evidence
from infra.settings import Settings, load_settings
from serving.console.api import Console
from serving.consume import CLOSE_S, DRAIN_S, Consumer
from serving.score import Scorer

APP_NAME = "dpdl"
CONSUMER, SCORER, CONSOLE = "Consumer", "Scorer", "Console"
BIG_MACHINE_CPUS = 8
"""From here on replicas reserve whole CPUs; below, they must fit beside training on two cores."""
LAG_POLICY = "serving.scaling:LagPolicy"
LOOK_BACK_S = 20.0
UP_DELAY_S, DOWN_DELAY_S = 5.0, 300.0
"""A consumer that comes or goes makes the group share out anew, which holds the stream for a
moment: more at once when frames wait, fewer only after five quiet minutes."""
_US = secrets.token_hex(8)
"""This process, as the one that deployed an application (DEPLOYED_BY of its console's replica).
Serve knows no better: what it calls time of deployment becomes that of its controller's restart."""


class AppArgs(BaseModel):
    """The arguments of `build`, as in a Serve config file's `args` (serve_config.yaml)."""

    model_config = ConfigDict(extra="forbid")

    model_name: str = Field(default="default", min_length=1)
    """The model of the store that scores where a camera is bound to no other."""
    device: Literal["", "cpu", "cuda"] = ""
    """Empty: a GPU where the cluster has one by now. cuda waits for one."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application, not yet deployed. Creates topics and buckets that do not exist.

    args: AppArgs as a dict; Serve turns it into a model only where annotations are no strings.
    Reads the settings of the process that it runs in: numbers of replicas are settings.serve's.
    Errors: ValidationError (args), DataError (no usable model version), AuthFailed,
    ServiceUnavailable, SettingsError.
    """
    wanted = AppArgs.model_validate(args)
    settings = load_settings()
    num_partitions = _prepare(settings, wanted.model_name)
    return application(wanted, settings, _nodes(), num_partitions)


def application(
    args: AppArgs,
    settings: Settings,
    nodes: Sequence[Mapping[str, float]],
    num_partitions: int,
    owner: str = "",
) -> serve.Application:
    """The three deployments, sized for nodes with these resources. Asks no service."""
    num_cpus = int(sum(node.get("CPU", 0) for node in nodes))
    num_gpus = sum(node.get("GPU", 0) for node in nodes)
    # A head without CPUs is not to work, and takes whatever reserves none: its workers may be few
    # or still to come.
    reserve = num_cpus >= BIG_MACHINE_CPUS or any(not node.get("CPU", 0) for node in nodes)
    on_gpu = args.device == "cuda" or (not args.device and num_gpus > 0)
    consumers = consumer_bounds(settings, num_cpus, num_partitions)
    # Two paths travel, never a secret: replicas read the settings again.
    environment = settings.worker_env()

    def actor(cpus: float, *, gpus: float = 0.0, **variables: str) -> dict[str, Any]:
        return {
            "num_cpus": cpus if reserve else 0,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": environment | variables},
        }

    in_flight = settings.stream.max_in_flight
    scorer = serve.deployment(
        name=SCORER,
        # One heap for all threads: it is a thread that scores, and a thread's own heap holds no
        # block above 64 MB, which would be given back after every layer (dpdl_core/memory.py).
        ray_actor_options=actor(
            1, gpus=ray_runtime.SCORER_GPU_SHARE if on_gpu else 0, MALLOC_ARENA_MAX="1"
        ),
        # A queue before the device, never a refusal: the consumers bound what is in flight.
        max_ongoing_requests=consumers[1] * in_flight * settings.stream.max_models + 4,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        # A consumer that waits for scores has all its calls in flight: one scorer for each such.
        **_replicas(
            settings.serve.min_scorers,
            max(settings.serve.min_scorers, settings.serve.max_scorers),
            target_ongoing_requests=in_flight,
        ),
    )(Scorer).bind(args.model_name, args.device)
    policy = {"lag_per_consumer": settings.serve.lag_per_consumer}
    consumer = serve.deployment(
        name=CONSUMER,
        ray_actor_options=actor(1),
        max_ongoing_requests=16,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_S + CLOSE_S + 5,
        graceful_shutdown_wait_loop_s=0.5,
        **_replicas(
            *consumers,
            policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function=LAG_POLICY, policy_kwargs=policy
            ),
        ),
    )(Consumer).bind(scorer)
    console: serve.Application = serve.deployment(
        name=CONSOLE,
        num_replicas=1,
        ray_actor_options=actor(0.5, DEPLOYED_BY=owner),
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
    )(Console).bind(consumer, scorer, args.model_name)
    return console


def consumer_bounds(settings: Settings, num_cpus: int, num_partitions: int) -> tuple[int, int]:
    """(min, max) consumer replicas: more than partitions would have nothing to do."""
    wanted = settings.serve
    most = min(wanted.max_consumers or max(1, num_cpus // 8), num_partitions)
    most = max(most, min(wanted.min_consumers, num_partitions))
    return min(wanted.min_consumers, most), most


def _replicas(low: int, high: int, **autoscaling: Any) -> dict[str, Any]:
    if low == high:
        return {"num_replicas": low}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=low,
            initial_replicas=low,
            max_replicas=high,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=UP_DELAY_S,
            downscale_delay_s=DOWN_DELAY_S,
            **autoscaling,
        )
    }


@dataclass(frozen=True, slots=True)
class Deployed:
    url: str
    """Where the console and its API answer."""
    consumers: int
    version: str
    """In use when the deployment became ready."""
    device: str
    """On which the scorer scores."""


def deploy(
    settings: Settings,
    *,
    model_name: str,
    device: Literal["", "cpu", "cuda"] = "",
    deadline_s: float = 180.0,
    say: Callable[[str], None] = lambda _: None,
) -> Deployed:
    """Deploys the application and waits until all of it runs; deploying again replaces it.

    `settings` must be what load_settings() gives in this process: the replicas read the same
    sources. Errors: those of build(), SettingsError (port taken, Serve runs at another address, no
    token for a public one), ServiceUnavailable (not running at the deadline).
    """
    _check_address(settings)
    num_partitions = _prepare(settings, model_name)
    ray_runtime.connect()
    args, nodes = AppArgs(model_name=model_name, device=device), _nodes()
    app = application(args, settings, nodes, num_partitions, owner=_US)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of every step of its own
    host, port = settings.serve.http_host, settings.serve.http_port
    _check_port(host, port)
    say(f"starting the stream application on {settings.serve.url}")
    if device == "cuda" and not any(node.get("GPU", 0) for node in nodes):
        say("the cluster has no GPU yet: the scorer waits for one")
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port)
        )
    except (RayError, TimeoutError) as error:
        raise ServiceUnavailable(
            f"Ray Serve did not start ({type(error).__name__}): try again, and look at the logs "
            "under /tmp/ray/session_latest/logs/serve"
        ) from error
    if _owner() is not None:
        # Serve keeps replicas whose arguments are unchanged, and theirs would keep old settings.
        serve.delete(APP_NAME)
    serve.run_many(
        [serve.RunTarget(app, name=APP_NAME, route_prefix="/")],
        wait_for_applications_running=False,
    )
    _wait_running(deadline_s)
    scorer = scorer_info()
    return Deployed(
        url=settings.serve.url,
        consumers=consumers_running(),
        version=str(scorer["version"]),
        device=str(scorer["device"]),
    )


def shutdown() -> None:
    """Takes down what this process deployed; what is in flight is published first.

    Harmless when it is not up, or when something else was deployed in its place.
    """
    if ray.is_initialized() and _owner() == _US:
        serve.delete(APP_NAME)


def check_ours() -> None:
    """DpdlError where the application is no longer the one that this process deployed."""
    owner = _owner()
    if owner != _US:
        became = "was deleted" if owner is None else "was replaced by a later deployment"
        raise DpdlError(f"the stream application of this command {became}: this one ends")


def _owner() -> str | None:
    """Who deployed the application: "" where `serve deploy` did; None where there is none."""
    running = _running()
    if running is None or APP_NAME not in running.applications:
        return None
    console = running.applications[APP_NAME].deployments.get(CONSOLE)
    options = console and console.deployment_config.ray_actor_options
    environment = options.runtime_env.get("env_vars", {}) if options else {}
    return str(environment.get("DEPLOYED_BY", ""))


def _running() -> ServeInstanceDetails | None:
    """What Ray Serve says of itself, as its REST API has it; None where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    try:
        return ServeInstanceDetails(**client.get_serve_details()) if client else None
    except ActorDiedError:  # by `serve shutdown`
        return None


def consumers_running() -> int:
    """Consumer replicas that run now; lag brings more, up to the settings' bound."""
    states = serve.status().applications[APP_NAME].deployments[CONSUMER].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


def scorer_info() -> dict[str, Any]:
    """What the scorer says of itself (serving.score.Scorer.info)."""
    handle = serve.get_deployment_handle(SCORER, APP_NAME)
    return dict(handle.info.remote().result(timeout_s=30))


def consumer_stats() -> dict[str, Any]:
    """What one consumer replica says of itself (serving.consume.Consumer.stats)."""
    handle = serve.get_deployment_handle(CONSUMER, APP_NAME)
    return dict(handle.stats.remote().result(timeout_s=30))


def _prepare(settings: Settings, model_name: str) -> int:
    """Every service is asked here, so that what is wrong is said before anything starts.

    The number of partitions of the frames' topic, which may be older than our settings.
    """
    ResultStore(settings).close()
    ensure_topics(settings)
    ensure_buckets(settings)
    expire_evidence(settings)
    if ModelStore(settings).current(model_name) is None:
        raise DataError(
            f"model {model_name!r} has no current version: train one with `dpdl train`, or "
            "promote one with `dpdl models promote`"
        )
    with closing(make_consumer(settings)) as consumer, kafka_errors(settings.kafka):
        return len(partitions_of(consumer, settings.kafka.topic))


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that lives now; one that is to run no tasks names no CPU."""
    if not ray.is_initialized():
        return []
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


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
    running = _running()
    if running is not None and running.http_options is not None:
        bound = running.http_options.host, running.http_options.port
        if bound != (host, port):
            raise SettingsError(
                f"serve.http_port={port} on {host}: Ray Serve runs on {bound[0]}:{bound[1]} and "
                "stays there. `serve shutdown -y` first, or set DPDL_SERVE_HTTP_HOST and "
                "DPDL_SERVE_HTTP_PORT to these"
            )
        return
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
