"""What people keep in a checkout stays there: out of git, `ray up`, `--upload` and the image."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.command_runner import SSHCommandRunner

from cluster.jobs import CODE, code_of
from infra.errors import DataError

ROOT = Path(__file__).parents[2]
SECRET = ("dpdl.yaml", "grafana.token", "infra/.env", "infra/serve.token")
STATE = (
    ".venv/bin/python", ".git/config", ".dpdl/embedded.json", "cluster/__pycache__/cli.pyc",
    ".mypy_cache/x", "dpdl.egg-info/PKG-INFO", ".hypothesis/x", "build/x", "reports/a.json",
)  # fmt: skip
PROGRAM = ("pyproject.toml", "cluster/cli.py", "infra/publish.lua", "infra/embedded/jars.txt")
OTHER = ("Makefile", "constraints.txt", "docs/cluster.md", "cameras.yaml", "notes.txt")


@pytest.fixture
def checkout(tmp_path):
    for name in (*SECRET, *STATE, *PROGRAM, *OTHER):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    return tmp_path


def uploaded(checkout, folder) -> Path:
    """The package that Ray makes and sends."""
    environment = code_of(checkout)
    package = folder / "package.zip"
    create_package(
        environment["working_dir"],
        package,
        include_gitignore=True,
        excludes=environment["excludes"],
    )
    return package


def names(package) -> set[str]:
    with ZipFile(package) as found:
        return {name for name in found.namelist() if not name.endswith("/")}


def test_upload_sends_code_and_nothing_else(checkout, tmp_path_factory):
    assert names(uploaded(checkout, tmp_path_factory.mktemp("upload"))) == set(PROGRAM)


def test_upload_wants_a_checkout(tmp_path):
    with pytest.raises(DataError, match="--upload"):
        code_of(tmp_path)


def test_what_is_uploaded_is_all_that_a_job_needs(tmp_path):
    """It has every file of the packages, and runs where nothing else of the checkout is."""
    package = uploaded(ROOT, tmp_path)
    wanted = {
        str(path.relative_to(ROOT))
        for name in CODE
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert names(package) == wanted | {"pyproject.toml"}
    job = tmp_path / "job"
    with ZipFile(package) as found:
        found.extractall(job)
    code = "import sys, cluster.cli, pipelines.train; print(cluster.__file__); cluster.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--help"],
        cwd=job,
        env=os.environ | {"PYTHONPATH": str(job)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(job))


@pytest.mark.skipif(not shutil.which("rsync"), reason="apt-get install rsync")
@pytest.mark.parametrize("file", ["ray_cluster.yaml", "cluster/ray_cluster_aws.yaml"])
def test_ray_up_copies_the_settings_and_no_other_secret(checkout, tmp_path_factory, file):
    """By rsync itself, with the arguments that Ray makes of the file."""
    there = tmp_path_factory.mktemp("there")
    (checkout / ".git" / "HEAD").write_text("x")  # a version names its commit
    chosen = SSHCommandRunner._create_rsync_filter_args(
        None, yaml.safe_load((ROOT / file).read_text())
    )
    subprocess.run(["rsync", "-az", *chosen, f"{checkout}/", str(there)], check=True, timeout=60)
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {"dpdl.yaml", ".gitignore", ".git/HEAD", *PROGRAM, *OTHER}


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_git_ignores_secrets(checkout, tmp_path_factory):
    environment = os.environ | {"GIT_DIR": str(tmp_path_factory.mktemp("git") / "x")}
    git = ["git", "--work-tree", str(checkout)]
    subprocess.run([*git, "init", "-q"], env=environment, check=True)
    found = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(PROGRAM) <= set(found)
    assert not {*SECRET} & {*found}


def test_the_image_holds_no_secret():
    """It copies whole packages, and infra/.env with Compose's passwords lies in one."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"dpdl.yaml", "infra/.env", "**/*.token"} <= set(ignored)
