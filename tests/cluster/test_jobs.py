"""`dpdl job`: what is refused before anything is sent. No cluster, no network."""

import subprocess
import sys

import pytest

from cluster.jobs import JobRequest, Jobs
from infra.errors import ServiceUnavailable, SettingsError


def dpdl(*args):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "job", *args],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["DPDL_REDIS_PASSWORD", "DPDL_S3_SECRET_KEY", "DPDL_SERVE_TOKEN"])
def test_a_secret_never_enters_a_jobs_environment(name):
    with pytest.raises(SettingsError, match=f"{name}_FILE"):
        JobRequest(command="train", variables={name: "x"})


def test_files_of_secrets_and_plain_settings_do():
    named = {"DPDL_REDIS_PASSWORD_FILE": "/run/x", "DPDL_REDIS_PORT": "1", "DPDL_CONFIG": "/x"}
    assert JobRequest(command="train", variables=named).variables == named


@pytest.mark.parametrize("name", ["DPDL_REDIS_PROT", "PATH", "DPDL_REDIS_PORT_FILE"])
def test_what_is_no_setting_is_refused(name):
    with pytest.raises(SettingsError, match="not a setting"):
        JobRequest(command="train", variables={name: "x"})


def test_no_cluster_is_one_line(monkeypatch):
    with pytest.raises(ServiceUnavailable, match="--address"):
        Jobs("http://127.0.0.1:9")


def test_a_misspelt_option_of_the_command_is_refused_before_it_is_sent():
    done = dpdl("train", "--dataset", "x", "--wrokers", "2")
    assert done.returncode == 2
    assert "--wrokers" in done.stderr
