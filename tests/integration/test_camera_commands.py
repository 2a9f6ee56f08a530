"""`dpdl camera set` and `dpdl camera list` on a real Redis and S3."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from infra.errors import NotFound
from infra.messages import FrameResult
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets
from infra.settings import load_settings

pytestmark = pytest.mark.integration


def run(*words):
    done = CliRunner().invoke(cli, ["camera", *words], env={"COLUMNS": "300"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def listed():
    """Camera -> its line."""
    return {line.split()[0]: line for line in run("list").splitlines()}


def said(camera, offset, scored_at_ns=2, model="default", version="v1"):
    return FrameResult(
        frame_id=f"frames/0/{offset}",
        camera=camera,
        captured_at_ns=1,
        scored_at_ns=scored_at_ns,
        score=0.5,
        threshold=1.25,
        energy=0.0,
        is_anomaly=False,
        model=model,
        version=version,
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
    assert "model special, threshold 3.5, alerts at 2/5" in run("set", "cam-1", *words)
    shown = listed()
    assert "special (last scored by default)" in shown["cam-1"]
    words = ("threshold 3.5 for model special", "model", "alert 2/5")
    assert all(f"{what}: ada 20" in shown["cam-1"] for what in words)
    assert "1.250" in shown["cam-1"]  # what default scores is not held against 3.5
    assert "1.250" in shown["cam-2"]
    assert "default" in shown["cam-2"]

    results.publish("g", "frames", 0, 2, 3, [said("cam-1", 2, model="special", version="s1")])
    assert "threshold 3.5: ada" in listed()["cam-1"]
    assert "3.500" in listed()["cam-1"]
    run("set", "cam-1", "--threshold", "3.75", "--by", "ada")
    results.publish("g", "frames", 0, 3, 4, [said("cam-1", 3, model="special", version="s2")])
    assert "threshold 3.75 for version s1: ada" in listed()["cam-1"]
    assert "3.750" in listed()["cam-1"]

    with pytest.raises(ValueError, match="finite"):
        run("set", "cam-2", "--model", "special", "--threshold", "nan")
    assert set(results.bindings()) == {"cam-1"}

    run("set", "cam-1", "--clear-model", "--clear-threshold", "--clear-alert")
    assert results.bindings() == {}
    state = results.camera("cam-1")
    assert (state.override, state.binding, state.debounce) == (None, None, None)
    assert "ada" not in run("list")


def test_a_camera_that_has_sent_nothing_is_set_and_said_to_be_unknown(settings):
    results, now_ns = ResultStore(settings), time.time_ns()
    names = ["belt-1", "belt-2", "dock", "gate", "hall", "cam-7"]
    rows = [said(name, i, now_ns) for i, name in enumerate(names)]
    results.publish("g", "frames", 0, 0, len(rows), rows)
    told = run("set", "cam7", "--threshold", "3")
    assert "cam7: threshold 3" in told
    assert "cam7 has sent no frame yet; known: cam-7, " in told
    assert "cam7 has sent no frame yet" in run("set", "cam7", "--clear-threshold")
    assert "yet" not in run("set", "cam-7", "--threshold", "3")
    assert " never " in listed()["cam7"]
    assert f"{datetime.fromtimestamp(now_ns / 1e9):%Y-%m-%d %H:%M}" in listed()["dock"]


def test_forgotten_cameras_make_room_for_others(settings, monkeypatch):
    monkeypatch.setenv("DPDL_STREAM_MAX_CAMERAS", "3")
    results, now = ResultStore(load_settings()), time.time_ns()
    day = 86400 * 10**9
    rows = [
        said("invented", 0, now - 31 * day),
        said("set", 1, now - 31 * day),
        said("sends", 2, now - 29 * day),
        said("late", 3, now),
    ]
    results.publish("g", "frames", 0, 0, 4, rows)
    results.set_threshold("set", 3.0, by="ada")
    assert {one.camera for one in results.cameras()} == {"invented", "set", "sends"}

    assert "1 cameras forgotten" in run("forget", "--silent-for", "30d")
    assert {one.camera for one in results.cameras()} == {"set", "sends"}
    assert results.scores("invented") == []
    results.publish("g", "frames", 0, 4, 5, [said("late", 4, now)])
    assert {one.camera for one in results.cameras()} == {"set", "sends", "late"}

    results.bind_model("set", "special", by="ada")
    assert "2 cameras forgotten" in run("forget", "set", "sends")
    assert results.bindings() == {}
    assert [one.camera for one in results.cameras()] == ["late"]
    results.publish("g", "frames", 0, 5, 6, [said("set", 5, now)])  # sends again: begins anew
    assert (results.camera("set").frames, results.camera("set").override) == (1, None)


def test_what_cannot_be_forgotten_says_so(settings):
    ResultStore(settings).publish("g", "frames", 0, 0, 1, [said("cam-1", 0)])
    with pytest.raises(NotFound, match="no such camera: cam-2"):
        run("forget", "cam-1", "cam-2")
    for words in ([], ["cam-1", "--silent-for", "1d"]):
        with pytest.raises(ValueError, match="either names"):
            run("forget", *words)
    assert [one.camera for one in ResultStore(settings).cameras()] == ["cam-1"]


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["--model", "ghost"], NotFound, "no current version"),
        (["--alert", "3"], ValueError, "wanted K/N"),
        (["--threshold", "3", "--alert", "5/3"], ValueError, "K <= N"),
        (["--threshold", "nan"], ValueError, "finite"),
        (["--threshold", "inf"], ValueError, "finite"),
        (["--threshold", "1", "--clear-threshold"], ValueError, "keep one"),
        ([], ValueError, "nothing to set"),
    ],
)
def test_what_cannot_be_set_says_so_and_changes_nothing(settings, words, error, says):
    ensure_buckets(settings)
    with pytest.raises(error, match=says):
        run("set", "cam-1", *words)
    assert ResultStore(settings).cameras() == []
