"""End Ray on all machines of one's own; runs on the head, just before `ray down`.

    ray exec ray_cluster.yaml 'python -m cluster.stop_ray' && ray down ray_cluster.yaml

By itself `ray down` ends Ray on the head only: the workers would notice after a minute, during
which their GPUs stay taken, and each would keep a log monitor until the next `ray up`. The head
first: its autoscaler would bring the workers up again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RAY = "dpdl/.venv/bin/ray"
"""From the home folder, as ray_cluster.yaml lays it out."""
STOP_S = 60.0


def stop_all(config: dict[str, Any], home: Path) -> list[str]:
    """`config` is what `ray up` left on the head. Returns a line for each machine that failed."""
    failed = [_stop("the head", [str(home / RAY), "stop"])]
    auth = config["auth"]
    ssh = ["ssh", "-i", str(Path(auth["ssh_private_key"]).expanduser())]
    # As Ray calls it: host keys are not known, and nobody is there to be asked.
    for option in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"):
        ssh += ["-o", option]
    ssh += ["-o", "ConnectTimeout=10", "-l", auth["ssh_user"]]
    workers = config["provider"]["worker_ips"]
    with ThreadPoolExecutor(max_workers=16) as pool:
        failed += pool.map(lambda worker: _stop(worker, [*ssh, worker, f"{RAY} stop"]), workers)
    return [line for line in failed if line]


def _stop(machine: str, command: list[str]) -> str:
    """What went wrong; "" if nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STOP_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"{machine}: {error}"
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return f"{machine}: {said[-1:]}, exit code {done.returncode}" if done.returncode else ""


def main() -> None:
    home = Path.home()
    path = home / "ray_bootstrap_config.yaml"
    if not path.is_file():
        sys.exit(f"{path} is not there: call this on the head of a cluster that `ray up` made")
    failed = stop_all(json.loads(path.read_text()), home)
    if failed:
        sys.exit("\n".join(["Ray may still run on", *failed]))


if __name__ == "__main__":
    main()
