"""Who trains on what: workers and their shares of a cluster, by its CPUs and GPUs."""

import pytest

from infra.errors import DataError
from infra.ray_runtime import SCORER_GPU_SHARE
from pipelines.train import WORKER_CPUS, TrainOptions, share_out


def shares(cpus, gpus, *, row_groups=99, **options):
    low, high, each = share_out(TrainOptions(dataset="d", **options), row_groups, cpus, gpus)
    return low, high, each.get("GPU", 0)


def test_a_worker_for_each_gpu_and_two_without():
    assert shares(16, 0) == (2, 2, 0)
    assert shares(1, 0) == (1, 1, 0)
    low, high, gpu = shares(16, 3)
    assert (low, high) == (3, 3)
    assert gpu > 0
    assert shares(16, 3, device="cpu") == (2, 2, 0)
    assert shares(16, 1, workers=2) == (2, 2, 0)
    assert shares(16, 1, workers=(1, 4))[2] > 0
    assert shares(16, 8, row_groups=3)[:2] == (3, 3)


def test_a_worker_and_a_scorer_fit_on_one_gpu_and_two_workers_do_not():
    gpu = shares(16, 1)[2]
    assert gpu + SCORER_GPU_SHARE <= 1 < 2 * gpu


def test_gpus_that_are_not_there_yet_are_waited_for():
    assert shares(2, 0, device="cuda")[0::2] == shares(2, 1)[0::2]
    low, high, gpu = shares(0, 0, device="cuda", workers=2)
    assert (low, high) == (2, 2)
    assert gpu > 0


def test_cpus_that_will_never_be_there_are_an_error():
    with pytest.raises(DataError, match="lower --workers"):
        shares(1, 0, workers=round(1 / WORKER_CPUS) + 1)
    with pytest.raises(DataError, match="--device cuda"):
        shares(0, 1, workers=2)
    with pytest.raises(DataError, match="workers=4 need 2 CPUs"):
        shares(1, 4)  # GPUs for all, and nobody said that it should wait
    with pytest.raises(ValueError, match="device=tpu"):
        shares(2, 0, device="tpu")
