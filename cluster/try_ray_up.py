"""`ray up ray_cluster.yaml`, really tried on one machine: an ssh server on loopback is the head.

    python -m cluster.try_ray_up --report ray-up.json

    sshd > ray up > ray job submit (a training) > dpdl job refresh > no token, no entry > ray down

The whole trial runs in process, network and mount namespaces of its own. The shipped file's start
commands and `ray down` contain `ray stop`, which ends every Ray process it sees: here only the
trial's. The network has only loopback, so ports 22, 6379 and 8265 are free and the file is used as
it is, with its marked values filled in and no workers. Namespaces need root.

Not tried: workers (one machine), and the installation: `make setup` finds a prepared environment,
a .venv that borrows the packages of the Python that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = "http://127.0.0.1:8265"
TOOLS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync", "unshare", "ip", "mount")
SMALL = (
    "image_size=64 pooled_spaces=7 patch_spaces=5+7 patch_prototypes=16 patch_side=4 "
    "pseudo_normals=16 folds=2"
)


def missing() -> str | None:
    """Why the trial cannot run here; None if it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install openssh-server rsync iproute2"
    if os.geteuid() != 0:
        return "namespaces of its own need root: run it by sudo, or in a container as root"
    probe = subprocess.run(
        [*_namespaces(), "ip", "link", "set", "lo", "up"], capture_output=True, text=True
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
        # A shell comes first in the namespace: it collects orphans, for which `ray stop` waits.
        init = ["bash", "-c", '"$@"; exit $?', "init"]
        command = [*_namespaces(), *init, *inside, "--report", str(report.absolute())]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)


class Trial:
    """The steps, each of which raises when its command fails."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.host = work / "host"
        """Home on the machine that ssh reaches."""
        self.client = work / "client"
        """Home of the person who calls `ray up`."""
        self.checkout = work / "checkout"
        self.seconds: dict[str, float] = {}
        for folder in (self.host, self.client / ".ssh", work / "ray"):
            folder.mkdir(parents=True)

    def call(self, step: str, *command: str, ok: bool = True, **variables: str) -> str:
        """Run in the checkout, as the client. Output of both streams; it is printed too."""
        print(f"--- {step}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        environment = os.environ | {
            "HOME": str(self.client),
            "TMPDIR": str(self.work),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.checkout),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": DASHBOARD,
        }
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        self.seconds[step] = round(time.monotonic() - started, 1)
        print(done.stdout, flush=True)
        if (done.returncode == 0) != ok:
            raise SystemExit(f"{step}: exit code {done.returncode} ({' '.join(command)})")
        return done.stdout

    def dpdl(self, step: str, *arguments: str, ok: bool = True, **variables: str) -> str:
        command = (sys.executable, "-m", "cluster.cli", *arguments)
        return self.call(step, *command, ok=ok, **variables)


def own_namespaces(trial: Trial) -> None:
    """Loopback up; /run and /tmp/ray are the trial's alone."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["mount", "-t", "tmpfs", "run", "/run"],
        ["mount", "--bind", str(trial.work / "ray"), "/tmp/ray"],
    ):
        subprocess.run(command, check=True)
    Path("/run/sshd").mkdir(mode=0o755)


@contextlib.contextmanager
def ssh_server(trial: Trial) -> Iterator[None]:
    """Debian's sshd on 127.0.0.1:22 with fresh keys; who logs in is at home in trial.host."""
    for key in (trial.work / "host_key", trial.client / ".ssh" / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    config = trial.work / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:22\nHostKey {trial.work}/host_key\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {trial.client}/.ssh/id_ed25519.pub\nStrictModes no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f'SetEnv "HOME={trial.host}"\n'
    )
    log = trial.work / "sshd.log"
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-E", str(log), "-f", str(config)])
    try:
        time.sleep(0.5)
        if server.poll() is not None:
            raise SystemExit(f"sshd did not start: {log.read_text()}")
        yield
    finally:
        server.terminate()
        server.wait(10)


def prepare_checkout(trial: Trial) -> None:
    shutil.copytree(
        ROOT,
        trial.checkout,
        ignore=shutil.ignore_patterns(
            ".venv", ".dpdl", ".git", "__pycache__", "dpdl.yaml", ".*_cache", "reports"
        ),
        symlinks=True,
    )


def prepare_environment(trial: Trial) -> None:
    """~/dpdl/.venv on the host: the packages of this Python, the code of ~/dpdl."""
    venv = trial.host / "dpdl" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dpdl.pth").write_text(f"{venv.parent}\n{sysconfig.get_path('purelib')}\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("dpdl", "cluster.cli")):
        script = venv / "bin" / name
        script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    # Newer than what `make setup` compares it with.
    (venv / ".installed").touch()


def cluster_file(trial: Trial) -> Path:
    """The shipped file with its marked values filled in."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config["auth"] = {
        "ssh_user": getpass.getuser(),
        "ssh_private_key": str(trial.client / ".ssh" / "id_ed25519"),
    }
    config |= {"min_workers": 0, "max_workers": 0}
    path = trial.work / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


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
    from infra.embedded import Stack
    from infra.settings import load_settings

    prepare_checkout(trial)
    with Stack(trial.work / "state", services=["s3"]) as stack, ssh_server(trial):
        # What a person writes for a store of their own, mode 0600: it travels with the code.
        settings = trial.checkout / "dpdl.yaml"
        settings.write_text((stack.state_dir / "services.yaml").read_text())
        settings.chmod(0o600)
        load_settings({"DPDL_CONFIG": str(settings)})
        prepare_environment(trial)
        file = cluster_file(trial)
        trial.call("token", "ray", "get-auth-token", "--generate")
        trial.call("ray up", "ray", "up", "-y", "--no-config-cache", str(file))
        try:
            jobs(trial)
        finally:
            trial.call("ray down", "ray", "down", "-y", str(file))
    left = subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True).stdout
    if {"raylet", "gcs_server"} & set(left.split("\n")):
        raise SystemExit(f"Ray still runs after ray down:\n{left}")
    return {"ray": _version("ray"), "seconds": trial.seconds}


def jobs(trial: Trial) -> None:
    first = images(trial.work / "plates", seed=0, normals=80, defects=16)
    later = images(trial.work / "later", seed=1, normals=24, defects=0) / "normal"
    trial.dpdl("data import", "data", "import", str(first), "--name", "plates")
    train = ["train", "--dataset", "plates", "--model", "plates", "--workers", "1"]
    train += ["--false-alarm-rate", "0.1", *(f"--set={pair}" for pair in SMALL.split())]
    # Ray's own job commands send the token only when told.
    submit = ("ray", "job", "submit", "--", "dpdl", *train)
    trial.call("ray job submit train", *submit, RAY_AUTH_MODE="token")
    trial.dpdl("data add", "data", "add", str(later), "--name", "plates")
    done = trial.dpdl(
        "dpdl job refresh", "job", "refresh", "--once", "--model", "plates", "--min-new", "8"
    )
    if "refresh-" not in done:
        raise SystemExit("the refresh made no version")
    trial.dpdl("a job that fails", "job", "train", "--dataset", "nothing", ok=False)
    stranger = trial.work / "stranger"
    stranger.mkdir()
    refused = trial.dpdl("without token", "job", "refresh", ok=False, HOME=str(stranger))
    if "token" not in refused:
        raise SystemExit("without a token the wrong thing was said")


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
