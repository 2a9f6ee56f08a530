"""Secrets and the files that hold them: written whole or not at all, for their owner only."""

from __future__ import annotations

import os
import secrets
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Replace path by text with mode 0600; a reader sees the old content or the new."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def new_secret(name: str) -> str:
    """A random value for the secret of that name."""
    if name == "cluster_id":  # Kafka wants a UUID in its own spelling
        found = "-"
        while found.startswith("-"):  # its tool would take that for an option
            found = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        return found
    return secrets.token_hex(10 if name == "access_key" else 24)
