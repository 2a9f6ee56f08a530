"""What is called to end Ray on all machines. That it ends: cluster/try_ray_up.py."""

import pytest

from cluster.stop_ray import RAY, stop_all

CONFIG = {
    "auth": {"ssh_user": "dpdl", "ssh_private_key": "~/ray_bootstrap_key.pem"},
    "provider": {"worker_ips": ["192.0.2.11", "192.0.2.12"]},
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A head's home, whose `ray` and `ssh` write down how they were called; .12 is down."""
    for program in (tmp_path / RAY, tmp_path / "bin" / "ssh"):
        program.parent.mkdir(parents=True)
        program.write_text(
            f'#!/bin/sh\necho "{program.name} $*" >> {tmp_path}/calls\n'
            'case "$*" in *192.0.2.12*) echo "No route to host" >&2; exit 255;; esac\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_head_is_first_and_a_machine_that_is_down_is_named(home):
    (failed,) = stop_all(CONFIG, home)
    assert failed == "192.0.2.12: ['No route to host'], exit code 255"
    first, *others = (home / "calls").read_text().splitlines()
    assert first == "ray stop"
    for address in ("192.0.2.11", "192.0.2.12"):
        (call,) = [line for line in others if address in line]
        assert f"-i {home}/ray_bootstrap_key.pem" in call
        assert call.endswith(f"-l dpdl {address} {RAY} stop")
