"""Two Ray nodes on one machine: a node is lost in a training; who has no token is refused.

In a process of its own: Ray reads its token mode once per process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.try_ray_up import SMALL, images
from pipelines.datasets import import_dataset

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DRIVER = """
import contextlib, json, os, subprocess, sys
import psutil
import ray
from ray.cluster_utils import Cluster
from infra.settings import load_settings
from pipelines.train import TrainOptions, train

temp, stranger, impostor, small = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "object_store_memory": 1 << 28, "include_dashboard": False, "temp_dir": temp})
node = cluster.add_node(num_cpus=1, object_store_memory=1 << 28)
found = {}
try:
    connect = "from infra.ray_runtime import connect; connect()"
    for name, home in (("with", os.environ["HOME"]), ("without", stranger),
                       ("wrong", impostor)):
        done = subprocess.run([sys.executable, "-c", connect], capture_output=True, text=True,
            timeout=90, env=os.environ | {"HOME": home, "RAY_ADDRESS": cluster.address})
        found[name] = [done.returncode, done.stderr.strip().splitlines()[-1:]]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)

    def progress(stage, fraction, figures):
        raylets = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # Ray's processes come and go
                if any("RayTrainWorker" in part for part in process.cmdline()):
                    raylets.append(process.ppid())
        if "raylets" not in found and len(raylets) == 2:
            found["raylets"] = len(set(raylets))
            found["stage"] = stage
            cluster.remove_node(node, allow_graceful=False)

    options = TrainOptions(dataset="plates", model_name="plates", workers=(1, 2),
        overrides=dict(pair.split("=") for pair in small.split()), false_alarm_rate=0.1)
    report = train(load_settings(), options, progress)
    found |= {"decision": report.decision, "auroc": report.auroc}
finally:
    ray.shutdown()
    cluster.shutdown()
print("FOUND", json.dumps(found))
"""


def test_a_node_lost_in_mid_run_and_a_client_without_the_token(settings, tmp_path):
    folder = images(tmp_path / "plates", seed=0, normals=80, defects=16)
    import_dataset(settings, folder, "plates", shots=6, calibration_share=0.4)
    for home in ("home", "stranger", "impostor"):
        (tmp_path / home / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    (tmp_path / "impostor" / ".ray" / "auth_token").write_text("fedcba9876543210" * 4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            DRIVER,
            f"/tmp/ray2n{os.getpid()}",
            str(tmp_path / "stranger"),
            str(tmp_path / "impostor"),
            SMALL,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env=environment | {"HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "token"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[0].removeprefix("FOUND"))
    assert found["with"][0] == 0, found
    assert found["without"][0] == 1
    assert "AuthFailed: the Ray cluster asks for its token, and" in found["without"][1][0]
    assert found["wrong"][0] == 1, found
    assert "AuthFailed: the Ray cluster refuses the token of /" in found["wrong"][1][0]
    assert found["raylets"] == 2  # a worker on each
    assert found["decision"] == "promoted"
    assert found["auroc"] > 0.9
