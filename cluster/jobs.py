"""Training and renewal as jobs of a Ray cluster that runs: `ray job submit`, with what we know.

    dpdl job train ARGS  >  head of the cluster: `dpdl train ARGS`  >  its log and its end, here

What a job is given: the command's arguments, variables that hold no secret, and, if wanted, the
code of this checkout. Settings are the cluster's own: its machines find dpdl.yaml and secret files
where `ray up` or Kubernetes put them. Ray keeps a job's command line, environment and uploaded code
where everyone with the dashboard can read them, so no secret may be in any of the three.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.errors import DataError, DpdlError, ServiceUnavailable, SettingsError
from infra.ray_runtime import refused
from infra.settings import is_secret, is_setting

CHECKOUT = Path(__file__).resolve().parents[1]
CODE = ("cluster", "dpdl_core", "infra", "pipelines", "serving", "pyproject.toml")
NOT_UPLOADED = ["/*", "!/.", *(f"!/{name}" for name in CODE), ".[!.]*", "*.token", "__pycache__"]
"""All but the code, whatever else people keep in a checkout; "/." is the checkout itself. Patterns
of .gitignore: the last one that matches decides. infra/.env holds Compose's passwords.
"""
RECONNECT_S = 60.0
"""A cluster that cannot be reached for so long is reported; its job goes on."""
POLL_S = 1.0
SILENCE_S = 60.0
"""After so long without a line the job is asked for: a head that lost its power closes nothing."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    command: str
    """train or refresh: a command of `dpdl`."""
    arguments: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """DPDL_* over the cluster's own. SettingsError for a secret or a name that is no setting."""
    upload: bool = False
    """Run this checkout's code instead of what the cluster has installed."""
    cpus: float = 0.0
    """Reserved for the command itself; 0 places it on the head, where a driver only waits."""
    gpus: float = 0.0
    """Of a card, likewise: Ray shows the command that card alone; with 0 all that the machine has,
    whosever they are."""

    def __post_init__(self) -> None:
        for name in self.variables:
            _check_variable(name)


class Jobs:
    """Jobs of one cluster. Errors of every method: AuthFailed, ServiceUnavailable, DpdlError."""

    def __init__(self, address: str) -> None:
        """`address`: http://HOST:8265 of the dashboard, or HOST:6379 of the head."""
        self.address = address
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)  # Ray would prefer them to what its caller says
        os.environ["no_proxy"] = "*"  # Ray would send the token through http_proxy, loopback or not
        with self._in_one_line():
            _authenticate()
            self._client = JobSubmissionClient(address)

    def submit(self, request: JobRequest) -> str:
        """Start a job; its id. It runs on whatever becomes of this process."""
        environment: dict[str, Any] = {"env_vars": dict(request.variables)}
        if request.upload:
            environment |= code_of(CHECKOUT)
        with self._in_one_line():
            return str(
                self._client.submit_job(
                    submission_id=f"dpdl-{request.command}-{uuid.uuid4().hex[:8]}",
                    # Not `dpdl`: python looks in the working directory first, so that uploaded
                    # code goes before installed code.
                    entrypoint=shlex.join(
                        ["python", "-m", "cluster.cli", request.command, *request.arguments]
                    ),
                    runtime_env=environment,
                    metadata={"dpdl": request.command},
                    entrypoint_num_cpus=request.cpus,
                    entrypoint_num_gpus=request.gpus,
                )
            )

    def follow(self, job: str, write: Callable[[str], None]) -> None:
        """Pass the job's log on until it has ended, over connections that break.

        DpdlError if it failed or was stopped; ServiceUnavailable when the cluster stayed out of
        reach for RECONNECT_S.
        """
        shown = 0
        lost_at: float | None = None

        async def tail() -> None:
            nonlocal shown, lost_at
            seen = 0
            chunks = self._client.tail_job_logs(job)  # always from the beginning
            with suppress(TimeoutError, StopAsyncIteration):
                while True:
                    chunk = await asyncio.wait_for(anext(chunks), SILENCE_S)
                    lost_at = None
                    seen += len(chunk)
                    if seen > shown:
                        write(chunk[len(chunk) - (seen - shown) :])
                        shown = seen

        while True:
            try:
                asyncio.run(tail())
                with self._in_one_line():
                    info = self._client.get_job_info(job)
                lost_at = None
            except (RuntimeError, OSError, aiohttp.ClientError, ServiceUnavailable) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise ServiceUnavailable(
                        f"{self.address} cannot be reached for {RECONNECT_S:.0f} s ({error}): job "
                        f"{job} goes on; follow it with "
                        f"`RAY_AUTH_MODE=token ray job logs --follow {job}`"
                    ) from error
            else:
                if info.status.is_terminal():
                    break
            time.sleep(POLL_S)
        if info.status != JobStatus.SUCCEEDED:
            raise DpdlError(f"job {job} {info.status}: {_last_line(info.message)}")

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise refused(self.address) from error
        except OSError as error:
            raise ServiceUnavailable(
                f"no Ray cluster answers at {self.address}: name the head's dashboard by --address "
                "or RAY_ADDRESS; `ray dashboard ray_cluster.yaml` brings it to 127.0.0.1:8265"
            ) from error
        except RuntimeError as error:
            raise DpdlError(f"{self.address}: {_last_line(str(error))}") from error


def _authenticate() -> None:
    """Send the token, if there is one; Ray's job client does so only when told."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _check_variable(name: str) -> None:
    setting = name.removesuffix("_FILE")
    if is_secret(name):
        raise SettingsError(
            f"{name} is a secret, and everyone with the dashboard can read a job's environment: "
            f"put it in a file on the cluster's machines and pass {name}_FILE"
        )
    if not is_setting(name) and not (name != setting and is_secret(setting)):
        raise SettingsError(f"{name} is not a setting: `dpdl config` lists them")


def code_of(checkout: Path) -> dict[str, Any]:
    """A runtime environment with a checkout's code. DataError for a folder that is none."""
    if not (checkout / "pyproject.toml").is_file():
        raise DataError(
            f"--upload wants a checkout, and {checkout} is an installation: call dpdl from a "
            "checkout's .venv, or leave --upload out"
        )
    return {"working_dir": str(checkout), "excludes": NOT_UPLOADED}


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
