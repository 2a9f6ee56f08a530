"""`ray_cluster.yaml` against Ray's own checks, offline."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"


def load() -> dict:
    return yaml.safe_load(CLUSTER_FILE.read_text())


def test_ray_accepts_it():
    config = prepare_config(load())
    validate_config(config)
    node_type = config["available_node_types"]["local.cluster.node"]
    assert node_type["max_workers"] == len(load()["provider"]["worker_ips"])


def test_every_top_level_key_is_explained():
    lines = CLUSTER_FILE.read_text().splitlines()
    for key in load():
        at = lines.index(next(line for line in lines if line.startswith(f"{key}:")))
        explained = lines[at - 1].startswith("#") or lines[at + 1].lstrip().startswith("#")
        follows_explained = lines[at - 1] and not lines[at - 1].startswith("#")
        assert explained or follows_explained, f"{key} has no comment"


def test_it_holds_no_secret_and_asks_for_the_token():
    starts = load()["head_start_ray_commands"] + load()["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
