"""`dpdl camera set` and `dpdl camera list` on a real Redis and S3."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from infra.errors import NotFound
from infra.messages import FrameResult
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets

pytestmark = pytest.mark.integration


def run(*words):
    done = CliRunner().invoke(cli, ["camera", *words], env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def said(camera, offset):
    return FrameResult(
        frame_id=f"frames/0/{offset}",
        camera=camera,
        captured_at_ns=1,
        scored_at_ns=2,
        score=0.5,
        threshold=1.25,
        energy=0.0,
        is_anomaly=False,
        model="default",
        version="v1",
        evidence_key="",
    )


def test_a_camera_is_set_shown_and_cleared(settings):
    ensure_buckets(settings)
    store = ModelStore(settings)
    store.put_version("special", "s1", {"config.json": b"{}"}, {})
    store.move_pointer("special", "s1", None, by="test", why="test")
    results = ResultStore(settings)
    results.publish("g", "frames", 0, 0, 2, [said("cam-1", 0), said("cam-2", 1)])

    words = ["--model", "special", "--threshold", "3.5", "--alert", "2/5", "--by", "ada"]
    assert "threshold 3.5, model special, alerts at 2/5" in run("set", "cam-1", *words)
    shown = {line.split()[0]: line for line in run("list").splitlines()}
    assert "special (last scored by default)" in shown["cam-1"]
    assert "3.500" in shown["cam-1"]
    assert all(f"{what}: ada 20" in shown["cam-1"] for what in ("threshold", "model", "alert 2/5"))
    assert "1.250" in shown["cam-2"]
    assert "default" in shown["cam-2"]

    run("set", "cam-1", "--clear-model", "--clear-threshold", "--clear-alert")
    assert results.bindings() == {}
    state = results.camera("cam-1")
    assert (state.override, state.binding, state.debounce) == (None, None, None)
    assert "ada" not in run("list")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["--model", "ghost"], NotFound, "no current version"),
        (["--alert", "3"], ValueError, "wanted K/N"),
        (["--alert", "5/3"], ValueError, "k <= n"),
        (["--threshold", "1", "--clear-threshold"], ValueError, "keep one"),
        ([], ValueError, "nothing to set"),
    ],
)
def test_what_cannot_be_set_says_so_and_changes_nothing(settings, words, error, says):
    ensure_buckets(settings)
    with pytest.raises(error, match=says):
        run("set", "cam-1", *words)
    assert ResultStore(settings).cameras() == []
