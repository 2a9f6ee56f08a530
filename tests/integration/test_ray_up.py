"""`ray up ray_cluster.yaml` on three machines and jobs on them, by cluster/try_ray_up.py, where ssh
can be had."""

import json

import pytest

from cluster import try_ray_up

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.timeout(1500)
def test_ray_up_jobs_and_ray_down(tmp_path):
    """The trial fails at the first step that does; what it says is in the captured output."""
    reason = try_ray_up.missing()
    if reason is not None:
        pytest.skip(reason)
    report = tmp_path / "report.json"
    try_ray_up.run_trial(report)
    found = json.loads(report.read_text())
    assert found["machines"] == 3
    assert {
        "ray up",
        "three nodes",
        "ray job submit train",
        "dpdl job refresh",
        "the lost one again",
        "ray up again",
        "ray down",
    } <= set(found["seconds"])
