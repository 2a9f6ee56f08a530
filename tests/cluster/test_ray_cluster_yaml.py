"""The cluster files against Ray's own checks, offline: machines of one's own, and EC2."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.ray_runtime import ENVIRONMENT

ROOT = Path(__file__).parents[2]
OWN, CLOUD = ROOT / "ray_cluster.yaml", ROOT / "cluster" / "ray_cluster_aws.yaml"
BOTH = pytest.mark.parametrize("path", [OWN, CLOUD], ids=["own", "aws"])


def load(path):
    return yaml.safe_load(path.read_text())


def test_ray_accepts_machines_of_ones_own():
    config = prepare_config(load(OWN))
    validate_config(config)
    node_type = config["available_node_types"]["local.cluster.node"]
    assert node_type["max_workers"] == len(load(OWN)["provider"]["worker_ips"])


def test_ray_accepts_the_cloud():
    config = prepare_config(load(CLOUD))
    validate_config(config)
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1


@BOTH
def test_what_make_setup_installs_is_enough_for_rays_provider(path):
    """Ray imports boto3 for EC2 when `ray up` begins, and again in the head's autoscaler."""
    assert _get_node_provider_cls(load(path)["provider"])


@BOTH
def test_every_top_level_key_is_explained(path):
    lines = path.read_text().splitlines()
    for key in load(path):
        at = lines.index(next(line for line in lines if line.startswith(f"{key}:")))
        explained = lines[at - 1].startswith("#") or lines[at + 1].lstrip().startswith("#")
        follows_explained = lines[at - 1] and not lines[at - 1].startswith("#")
        assert explained or follows_explained, f"{key} has no comment"


@BOTH
def test_it_holds_no_secret_and_starts_ray_as_this_machine_would(path):
    config = load(path)
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for variable in ("RAY_AUTH_MODE=token", *(f"{k}={v}" for k, v in ENVIRONMENT.items())):
        assert all(f" {variable} " in line for line in starts if "ray start" in line), variable
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_a_new_machine_gets_what_the_documented_commands_call():
    page = (ROOT / "docs" / "cluster.md").read_text()
    needs = page[page.index("Each needs") : page.index("No root.")]
    (install,) = load(CLOUD)["initialization_commands"]
    for package in ("make", "rsync", "tmux"):
        assert package in needs.replace(",", "").split()
        assert package in install.split()


@BOTH
def test_ray_down_finds_ray(path):
    """It calls a bare `ray stop` in a login shell: the environment must be on that shell's PATH."""
    assert any("~/.bashrc" in line for line in load(path)["setup_commands"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_listens_at_the_address_that_ssh_reached(kind, tmp_path):
    """Its start command in a shell, with a `ray` that says what it was called with. By itself Ray
    takes the default route's address, or without one Debian's 127.0.1.1 (cluster/try_ray_up.py)."""
    (tmp_path / "dpdl").mkdir()
    ray = tmp_path / "ray"
    ray.write_text("#!/usr/bin/env python3\nimport json, os, sys\n")
    ray.write_text(ray.read_text() + "print(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
    ray.chmod(0o755)
    given = {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SSH_CONNECTION": "192.0.2.1 40000 192.0.2.11 22",
        "RAY_HEAD_IP": "192.0.2.10",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` sets it
    }
    (start,) = [line for line in load(OWN)[f"{kind}_start_ray_commands"] if "ray start" in line]
    said = subprocess.run(
        ["bash", "-c", start], env=given, capture_output=True, text=True, check=True
    ).stdout
    arguments, environment = json.loads(said)
    assert "--node-ip-address=192.0.2.11" in arguments
    assert environment["DPDL_CONFIG"] == f"{tmp_path}/dpdl/dpdl.yaml"
    if kind == "head":  # 2.60's second autoscaler starts one worker too few of a `local` provider
        assert environment["RAY_enable_autoscaler_v2"] == "0"
    else:
        assert "--address=192.0.2.10:6379" in arguments
