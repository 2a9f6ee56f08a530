"""Training and renewal on a cluster: `dpdl job train|refresh`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.commands import learn
from cluster.commands.shared import err, key_values, out

app = typer.Typer(help="Run train or refresh on a Ray cluster and follow it.", no_args_is_help=True)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Address = Annotated[
    str, typer.Option(envvar="RAY_ADDRESS", help="The head's dashboard: http://HOST:8265.")
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Follow the log and end as the job ends.")
]
Upload = Annotated[
    bool, typer.Option("--upload", help="Run this checkout's code, not what the cluster has.")
]
Variables = Annotated[
    list[str] | None,
    typer.Option("--env", help="DPDL_NAME=VALUE over the cluster's settings; no secrets."),
]
LOCAL_FORWARD = "http://127.0.0.1:8265"
"""Where `ray dashboard ray_cluster.yaml` and `kubectl port-forward` bring the head's dashboard."""


@app.command(context_settings=PASS_ON)
def train(
    context: typer.Context,
    address: Address = LOCAL_FORWARD,
    wait: Wait = True,
    upload: Upload = False,
    env: Variables = None,
) -> None:
    """Train on the cluster. Every other argument is one of `dpdl train`.

    Ctrl-C leaves the job running and says how to follow and how to stop it.
    """
    _check("train", context.args)
    _run("train", context.args, address, wait, upload, env, cpus=0, gpus=0)


@app.command(context_settings=PASS_ON)
def refresh(
    context: typer.Context,
    address: Address = LOCAL_FORWARD,
    wait: Wait = True,
    upload: Upload = False,
    env: Variables = None,
) -> None:
    """Renew the current version on the cluster. Every other argument is one of `dpdl refresh`.

    With --device cuda it waits for three quarters of a card; else it runs on a CPU. Ctrl-C leaves
    the job running and says how to follow and how to stop it.
    """
    from infra.ray_runtime import TRAINING_GPU_SHARE

    device = _check("refresh", context.args)["device"]
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"--device {device}: in a job Ray says which card, take --device cuda")
    # The work is in the command itself, so it has what it takes reserved, on any machine; a card
    # that is not, it must not take.
    gpus = TRAINING_GPU_SHARE if device == "cuda" else 0.0
    arguments = context.args if device else [*context.args, "--device", "cpu"]
    _run("refresh", arguments, address, wait, upload, env, cpus=1, gpus=gpus)


def _run(
    command: str,
    arguments: list[str],
    address: str,
    wait: bool,
    upload: bool,
    env: list[str] | None,
    *,
    cpus: float,
    gpus: float,
) -> None:
    from cluster.jobs import JobRequest, Jobs

    request = JobRequest(
        command=command,
        arguments=arguments,
        variables=key_values(env, "--env"),
        upload=upload,
        cpus=cpus,
        gpus=gpus,
    )
    jobs = Jobs(address)
    job = jobs.submit(request)
    out.print(job, markup=False, highlight=False)
    if not wait:
        return
    try:
        jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        err.print(
            f"{job} goes on. Follow or stop it (with RAY_AUTH_MODE=token in the environment): "
            f"ray job logs --address {address} --follow {job}; "
            f"ray job stop --address {address} {job}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _check(command: str, arguments: list[str]) -> dict[str, Any]:
    """The command's options by name. Refuses here those that it does not know, or that do not go
    together: on the cluster that would take minutes."""
    group = typer.main.get_group(learn.app)
    context = group.commands[command].make_context(f"dpdl {command}", list(arguments))
    learn.CHECKS[command](context)
    return context.params
