"""`ray up ray_cluster.yaml`, really tried: a head and two workers, reached by ssh.

    python -m cluster.try_ray_up --report ray-up.json

    ray up > three nodes > ray job submit: a training on two machines, of which one is lost; a
    job that fails; no token, no entry > dpdl job refresh > the lost machine is back > ray up, an
    upgrade > ray down, and nothing runs any more on any machine

The machines are namespaces of this computer (machines.py), the file is the shipped one but for
the key's path, and the person who calls `ray up` is on a fourth. The whole trial runs in namespaces
of its own, whose network leads nowhere: `ray stop`, which ends every Ray process it sees, sees the
trial's only. Namespaces need root.

Not tried: the installation: `make setup` finds a prepared environment, a .venv that borrows the
packages of the Python that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml

from cluster import machines
from infra.embedded import Stack
from infra.embedded.seaweedfs import SeaweedFs
from infra.embedded.service import Command, Place
from infra.model_store import ModelStore
from infra.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
FILE = "ray_cluster.yaml"
DASHBOARD = "http://127.0.0.1:8265"
STEP_S = 600.0
WORKERS_S = 120.0
"""How long the head may take to bring its workers up."""
DOWN_S = 20.0
"""How long anything may go on anywhere after `ray down`."""
SMALL = (
    "image_size=64 pooled_spaces=7 patch_spaces=5+7 patch_prototypes=16 patch_side=4 "
    "pseudo_normals=16 folds=2"
)
TUNED = "tuned_stages=1 tune_epochs=4 tune_iterations=4 tune_prototypes=6"
"""With epochs, so that there are checkpoints to go on from."""


def missing() -> str | None:
    """Why the trial cannot run here; None if it can."""
    absent = [tool for tool in machines.TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install openssh-server rsync iproute2"
    if os.geteuid() != 0:
        return "namespaces of its own need root: run it by sudo, or in a container as root"
    probe = subprocess.run(
        [*_namespaces(), "ip", "link", "add", "name", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def _namespaces() -> list[str]:
    return ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc"]


def run_trial(report: Path) -> None:
    """Run it in namespaces of its own. CalledProcessError when a step fails; nothing stays."""
    with tempfile.TemporaryDirectory(prefix="ray-up-") as work:
        inside = [sys.executable, "-m", "cluster.try_ray_up", "--inside", work]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPDL_"))}
        environment["PYTHONPATH"] = str(ROOT)
        # A shell comes first in the namespace: it collects orphans.
        init = ["bash", "-c", '"$@"; exit $?', "init"]
        command = [*_namespaces(), *init, *inside, "--report", str(report.absolute())]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1500)


class Trial:
    """The steps, each of which raises when its command fails."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.client = work / "client"
        """Home of the person who calls `ray up`."""
        self.checkout = work / "checkout"
        self.seconds: dict[str, float] = {}
        for folder in (self.client, work / "ray"):
            folder.mkdir(parents=True)

    def start(self, step: str, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Begin it in the checkout, as the client, in a process group of its own; both its streams
        are in stdout."""
        print(f"--- {step}: {' '.join(command)}", flush=True)
        environment = os.environ | {
            "HOME": str(self.client),
            "TMPDIR": str(self.work),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.checkout),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return subprocess.Popen(
            command,
            cwd=self.checkout,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def lines(self, step: str, *command: str, ok: bool = True, **variables: str) -> Iterator[str]:
        """Run it to its end: what it says as it says it, printed too."""
        started = time.monotonic()
        with self.start(step, *command, **variables) as running:
            clock = threading.Timer(STEP_S, running.kill)
            clock.start()
            for line in running.stdout or []:
                print(f"{time.monotonic() - started:6.1f} {line}", end="", flush=True)
                yield line
            code = running.wait()
            clock.cancel()
        self.seconds[step] = round(time.monotonic() - started, 1)
        if (code == 0) != ok:
            raise SystemExit(f"{step}: exit code {code} ({' '.join(command)})")

    def call(self, step: str, *command: str, ok: bool = True, **variables: str) -> str:
        return "".join(self.lines(step, *command, ok=ok, **variables))

    def dpdl(self, step: str, *arguments: str, ok: bool = True, **variables: str) -> str:
        command = (sys.executable, "-m", "cluster.cli", *arguments)
        return self.call(step, *command, ok=ok, **variables)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 1)


def own_namespaces(trial: Trial) -> None:
    """Loopback up; /run and /tmp/ray are the trial's alone."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["mount", "-t", "tmpfs", "run", "/run"],
        ["mount", "--bind", str(trial.work / "ray"), "/tmp/ray"],
    ):
        subprocess.run(command, check=True)


class ReachableS3(SeaweedFs):
    """The embedded S3, for the machines too."""

    def prepare(self, place: Place) -> Command:
        command = super().prepare(place)
        return Command([*command.argv, "-s3.ip.bind=0.0.0.0"], command.cwd, command.env)

    def settings(self, place: Place) -> dict[str, object]:
        endpoint = f"{machines.COMPUTER}:{place.ports['s3']}"
        return super().settings(place) | {"endpoint": endpoint}


def prepare_checkout(trial: Trial) -> None:
    shutil.copytree(
        ROOT,
        trial.checkout,
        ignore=shutil.ignore_patterns(
            ".venv", ".dpdl", ".git", "__pycache__", "dpdl.yaml", ".*_cache", "reports"
        ),
        symlinks=True,
    )


def cluster_file(path: Path, key: Path) -> list[str]:
    """Fill in the one marked value that is not as shipped; the addresses, the head's first."""
    text = path.read_text()
    provider = yaml.safe_load(text)["provider"]
    path.write_text(text.replace("~/.ssh/id_ed25519", str(key)))
    return [provider["head_ip"], *provider["worker_ips"]]


def images(folder: Path, *, seed: int, normals: int, defects: int) -> Path:
    """64 px plates of grey noise; a defect carries a bright square."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for kind, count in (("normal", normals), ("anomaly/spot", defects)):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(110, 12, (64, 64))
            if kind != "normal":
                x, y = rng.integers(4, 40, 2)
                pixels[y : y + 20, x : x + 20] = 250
            out = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
            (folder / kind / f"{i:03}.png").write_bytes(out.getvalue())
    return folder


def try_it(trial: Trial) -> dict[str, Any]:
    """All steps in order; what the report holds."""
    started = time.monotonic()
    prepare_checkout(trial)
    addresses = cluster_file(trial.checkout / FILE, trial.client / ".ssh" / "id_ed25519")
    key = machines.new_login(trial.client)
    with (
        machines.network(trial.work / "machines", addresses, key) as found,
        Stack(trial.work / "state", services=["s3"], instead=[ReachableS3()]) as stack,
    ):
        # What a person writes for a store of their own, mode 0600: it travels with the code.
        file = trial.checkout / "dpdl.yaml"
        file.write_text((stack.state_dir / "services.yaml").read_text())
        file.chmod(0o600)
        settings = load_settings({"DPDL_CONFIG": str(file)})
        for machine in found:
            machines.prepare_environment(machine, "dpdl")
        trial.call("token", "ray", "get-auth-token", "--generate")
        trial.call("ray up", "ray", "up", "-y", FILE)
        try:
            with dashboard(trial):
                wait_for_nodes(trial, "three nodes", addresses)
                jobs(trial, settings, found)
            upgrade(trial, found)
        except BaseException:
            print_autoscaler(found[0])
            raise
        finally:
            trial.call("stop", "ray", "exec", FILE, "python -m cluster.stop_ray")
            trial.call("ray down", "ray", "down", "-y", FILE)
        wait_for_end()
    seconds = trial.seconds | {"in all": round(time.monotonic() - started, 1)}
    return {"ray": _version("ray"), "machines": len(addresses), "seconds": seconds}


@contextlib.contextmanager
def dashboard(trial: Trial) -> Iterator[None]:
    """The head's dashboard on this computer's loopback, as long as the block."""
    forward = trial.start("ray dashboard", "ray", "dashboard", FILE)
    try:
        yield
    finally:
        os.killpg(forward.pid, signal.SIGTERM)  # its ssh too
        forward.communicate(timeout=30)


def alive(trial: Trial) -> list[str]:
    """Addresses of the nodes that Ray holds for alive; none while the dashboard is out of reach."""
    token = (trial.client / ".ray" / "auth_token").read_text().strip()
    request = Request(
        f"{DASHBOARD}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except OSError:
        return []
    return sorted(each["ip"] for each in nodes if each["raylet"]["state"] == "ALIVE")


def wait_for_nodes(trial: Trial, step: str, addresses: list[str]) -> None:
    """Until all of them are in the cluster, and no others."""
    with trial.timed(step):
        deadline = time.monotonic() + WORKERS_S
        while (found := alive(trial)) != sorted(addresses):
            if time.monotonic() > deadline:
                raise SystemExit(f"{step}: after {WORKERS_S:.0f} s there are {found}")
            time.sleep(0.5)


def wait_for_end() -> None:
    """Until nothing runs any more on any machine."""
    deadline = time.monotonic() + DOWN_S
    while left := machines.processes():
        if time.monotonic() > deadline:
            raise SystemExit("\n".join([f"{DOWN_S:.0f} s after ray down there still run:", *left]))
        time.sleep(0.5)


def print_autoscaler(head: machines.Machine) -> None:
    sessions = sorted((head.folder / "tmp" / "ray").glob("session_2*"))
    for log in sorted(sessions[-1].glob("logs/monitor*")) if sessions else []:
        print(f"--- {log.name}\n{log.read_text()[-20000:]}", flush=True)


def jobs(trial: Trial, settings: Settings, found: list[machines.Machine]) -> None:
    first = images(trial.work / "plates", seed=0, normals=80, defects=16)
    later = images(trial.work / "later", seed=1, normals=24, defects=0) / "normal"
    trial.dpdl("data import", "data", "import", str(first), "--name", "plates")
    lost = train_and_lose_a_machine(trial, settings, found)
    lost.start()
    trial.dpdl("data add", "data", "add", str(later), "--name", "plates")
    done = trial.dpdl(
        "dpdl job refresh", "job", "refresh", "--once", "--model", "plates", "--min-new", "8"
    )
    if "refresh-" not in done:
        raise SystemExit("the refresh made no version")
    wait_for_nodes(trial, "the lost one again", [machine.address for machine in found])


def refusals(trial: Trial) -> None:
    trial.dpdl("a job that fails", "job", "train", "--dataset", "nothing", ok=False)
    stranger = trial.work / "stranger"
    stranger.mkdir()
    refused = trial.dpdl("without token", "job", "refresh", ok=False, HOME=str(stranger))
    if "token" not in refused:
        raise SystemExit("without a token the wrong thing was said")


def upgrade(trial: Trial, found: list[machines.Machine]) -> None:
    """Another checkout, and `ray up` again: every machine has it, and joins anew."""
    (trial.checkout / "docs" / "new.md").write_text("new\n")
    trial.call("ray up again", "ray", "up", "-y", FILE)
    with dashboard(trial):
        wait_for_nodes(trial, "three nodes again", [machine.address for machine in found])
    without = [m.name for m in found if not (m.home / "dpdl" / "docs" / "new.md").exists()]
    if without:
        raise SystemExit(f"the upgrade did not reach {without}")


def train_and_lose_a_machine(
    trial: Trial, settings: Settings, found: list[machines.Machine]
) -> machines.Machine:
    """Two workers on two machines; after an epoch one of these, not the head, loses its power."""
    train = ["dpdl", "train", "--dataset", "plates", "--model", "plates", "--workers", "1:2"]
    train += ["--false-alarm-rate", "0.1"]
    train += [f"--set={pair}" for pair in f"{SMALL} {TUNED}".split()]
    # Ray's own job commands send the token only when told.
    submit = ("ray", "job", "submit", "--address", DASHBOARD, "--", *train)
    workers = {machine.address: machine for machine in found[1:]}
    where: list[list[str]] = []
    lost = None
    said = trial.lines("ray job submit train", *submit, RAY_AUTH_MODE="token")
    for line in said:
        if "training: machines" in line:
            where.append(line.split(" at ")[1].split())
        elif "training: tuning" in line and lost is None:
            lost = next(workers[address] for address in where[0] if address in workers)
            lost.lose()
            print(f"--- {lost.address} is lost", flush=True)
            refusals(trial)  # it takes Ray a minute to notice
    (version,) = (store := ModelStore(settings)).list_versions("plates")
    ended = store.manifest("plates", version)["machines"]
    told = f"the workers ran on {where}, at the end on {ended}"
    if lost is None or len(where) < 2 or len(set(where[0])) != 2 or lost.address in ended:
        raise SystemExit(f"{told}, lost was {lost and lost.address}")
    print(f"--- {told}", flush=True)
    return lost


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--report", type=Path, required=True, help="JSON: seconds of each step")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside is None:
        reason = missing()
        if reason is not None:
            sys.exit(reason)
        # An exception ends the namespaces with all that runs in them; a bare death would not.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_trial(chosen.report)
        return
    trial = Trial(chosen.inside)
    own_namespaces(trial)
    chosen.report.write_text(json.dumps(try_it(trial), indent=2) + "\n")


if __name__ == "__main__":
    main()
