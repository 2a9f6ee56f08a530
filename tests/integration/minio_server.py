"""A real MinIO in the place of the embedded S3: `make test-minio` runs the storage tests on it.

Run as a program it prints the server's path, building it with Go where there is none: the module
is pinned, the binary (150 MB) is kept in the cache folder, Go's own caches take 1.2 GB more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import urllib3
from minio import Minio

from infra.embedded.files import write_private
from infra.embedded.service import HOST, PROBE_TIMEOUT_S, Command, Place, ServiceName
from infra.settings import EmbeddedSettings

MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"


class MinioServer:
    """As a service of the embedded stack (infra/embedded/service.py)."""

    name: ServiceName = "s3"
    title = "MinIO"
    port_uses = ("s3", "console")
    secret_names = ("access_key", "secret_key")
    grace_s = 5.0

    def fetch(self, cache_dir: Path, say: Callable[[str], None]) -> None:
        assert program() is not None, "no minio: run `make test-minio`"

    def prepare(self, place: Place) -> Command:
        keys = place.home / "minio.env"
        write_private(
            keys,
            f"MINIO_ROOT_USER={place.secrets['access_key']}\n"
            f"MINIO_ROOT_PASSWORD={place.secrets['secret_key']}\n",
        )
        argv = [
            str(program()),
            "server",
            f"--address={HOST}:{place.ports['s3']}",
            f"--console-address={HOST}:{place.ports['console']}",
            str(place.home / "data"),
        ]
        environment = {
            "HOME": str(place.home),
            "MINIO_CONFIG_ENV_FILE": str(keys),
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        return Command(argv, place.home, environment)

    def probe(self, place: Place) -> None:
        pool = urllib3.PoolManager(timeout=PROBE_TIMEOUT_S, retries=False)
        try:
            Minio(
                f"{HOST}:{place.ports['s3']}",
                access_key=place.secrets["access_key"],
                secret_key=place.secrets["secret_key"],
                secure=False,
                http_client=pool,
            ).list_buckets()
        finally:
            pool.clear()

    def settings(self, place: Place) -> dict[str, object]:
        return {
            "endpoint": f"{HOST}:{place.ports['s3']}",
            "access_key": place.secrets["access_key"],
            "secret_key": place.secrets["secret_key"],
            "secure": False,
        }

    def litter(self, place: Place) -> list[Path]:
        return []


def program() -> Path | None:
    """`minio` on the PATH, or the one built earlier."""
    built = EmbeddedSettings().cache_dir / "minio"
    found = shutil.which("minio") or (str(built) if built.is_file() else None)
    return Path(found) if found else None


def build() -> Path | None:
    """Build it with Go; None where there is no Go. A failed build is CalledProcessError."""
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        return None
    folder = EmbeddedSettings().cache_dir
    folder.mkdir(parents=True, exist_ok=True)
    print(f"test-minio: building {MODULE} into {folder}, some minutes", file=sys.stderr)
    subprocess.run([go, "install", MODULE], env=os.environ | {"GOBIN": str(folder)}, check=True)
    return program()


if __name__ == "__main__":
    found = program() or build()
    if found is None:
        print(
            "test-minio: SKIPPED, nothing was tested: there is neither `minio` on the PATH nor "
            "`go` (1.26 or newer) to build it with",
            file=sys.stderr,
        )
    else:
        print(found)
