"""The broker's jars: fetched once by jgo, verified against committed hashes before every start.

Every jar is named by exact version in jars.txt: left to resolve Kafka by itself, jgo picks an
older kafka-clients and the broker cannot run. Only verified files ever enter the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from infra.errors import DataError, ServiceUnavailable

JARS_FILE = Path(__file__).with_name("jars.txt")
_NUM_DOWNLOADS = 6
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Jar:
    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.group}.{self.artifact}-{self.version}.jar"


def read_list(path: Path = JARS_FILE) -> list[Jar]:
    """Lines of `group:artifact:version sha256`; `#` starts a comment line."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [Jar(*coordinate.split(":"), sha256) for coordinate, sha256 in map(str.split, lines)]


def class_path(cache_dir: Path, jars: Iterable[Jar], say: Callable[[str], None]) -> str:
    """Java class path of the jars, each with its committed hash; fetches what is missing.

    Raises ServiceUnavailable when a jar cannot be fetched, DataError when it has another hash.
    """
    folder = cache_dir / "jars"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(jars)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first starts at once fetch once
        # A file with another hash is a damaged disk or somebody's hand: it is fetched again.
        missing = [jar for jar in wanted if _sha256(folder / jar.file_name) != jar.sha256]
        if missing:
            say(f"fetching {len(missing)} jars of Apache Kafka (45 MB in all, once)")
            with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
                list(pool.map(lambda jar: _fetch(jar, folder), missing))
    return os.pathsep.join(str(folder / jar.file_name) for jar in wanted)


def _fetch(jar: Jar, folder: Path) -> None:
    from jgo.maven import MavenContext, PythonResolver  # only a first start needs it
    from requests import RequestException

    name = f"{jar.group}:{jar.artifact}:{jar.version}"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        context = MavenContext(
            resolver=PythonResolver(), repo_cache=Path(scratch), local_repos=[], timeout=_TIMEOUT_S
        )
        project = context.project(jar.group, jar.artifact)
        try:
            path = project.at_version(jar.version).artifact().resolve()
        except (RequestException, RuntimeError) as error:
            raise ServiceUnavailable(
                f"cannot fetch {name} for the embedded Kafka ({type(error).__name__}): the first "
                "start needs the network (Maven Central); or set DPDL_KAFKA_BOOTSTRAP to a "
                "Kafka that you have"
            ) from error
        found = _sha256(path)
        if found != jar.sha256:
            raise DataError(
                f"{name} came with sha256 {found}, wanted {jar.sha256} ({JARS_FILE.name}): not "
                "used; check what stands between you and Maven Central"
            )
        path.replace(folder / jar.file_name)


def _sha256(path: Path) -> str:
    """Hex digest of a file, "" when there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
