"""A cluster that is known of and does not answer: one line at once, where Ray would hang."""

import socket

import pytest

from infra import ray_runtime
from infra.errors import ServiceUnavailable


@pytest.fixture
def dead():
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_dead_cluster_of_the_environment(dead, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(ServiceUnavailable, match=f"{dead} does not answer .*unset it"):
        ray_runtime.connect()


def test_a_dead_cluster_that_ray_start_left(dead, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    left = tmp_path / "ray_current_cluster"
    left.write_text(f"{dead}\n")
    monkeypatch.setattr(ray_runtime, "_ADDRESS_FILE", left)
    with pytest.raises(ServiceUnavailable, match=f"{dead} does not answer .*ray stop"):
        ray_runtime.connect()


@pytest.mark.parametrize("address", ["", "local", "auto", "ray://head:10001"])
def test_what_is_no_address_of_ours_to_try(address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_runtime, "_ADDRESS_FILE", tmp_path / "none")
    ray_runtime._check_answers()
