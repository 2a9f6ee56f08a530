"""`dpdl models list` and `show`: moments are kept as UTC and shown on the clock of who looks."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from pipelines import registry

MOMENT = "2026-11-25T22:30:00+00:00"
SHOWN = {
    "version": "v-1",
    "current": True,
    "manifest": {
        "parent": None,
        "created_at": MOMENT,
        "kind": "train",
        "data": {"dataset": "valves", "incoming": {}},
        "auroc": None,
    },
    "decision": {"decision": "promoted", "at": MOMENT, "why": "better", "numbers": {}},
    "thresholds": {
        "calibration_normals": 40, "default": 1.0, "false_alarm_rate": 0.01, "cameras": {},
    },
    "moves": [{"at": MOMENT, "by": "ann", "why": "better"}],
}  # fmt: skip


@pytest.fixture
def tokyo(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("words", "times"), [(["list"], 1), (["show", "v-1"], 3)])
def test_moments_are_local(tokyo, monkeypatch, words, times):
    row = SimpleNamespace(
        current=True, version="v-1", created_at=MOMENT, auroc=None, decision="", why=""
    )
    known = SimpleNamespace(list=lambda: [row], show=lambda version: SHOWN)
    monkeypatch.setattr(registry, "Registry", lambda settings, model: known)
    said = CliRunner().invoke(cli, ["models", *words], env={"COLUMNS": "200"}).output
    assert said.count("2026-11-26 07:30") == times
    assert "22:30" not in said
