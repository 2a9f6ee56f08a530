"""The cluster files against Ray's own checks, offline: machines of one's own, and EC2."""

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
