"""infra/prometheus: every rule is tested by promtool, and names metrics that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Histogram, Metric

from infra.metrics import ExpiryMetrics, ReplicaMetrics, ScorerMetrics, StreamMetrics, WatchMetrics

FOLDER = Path(__file__).parents[2] / "infra" / "prometheus"
RULES, TESTS = FOLDER / "dpdl.rules.yml", FOLDER / "dpdl.rules_test.yml"


def rules() -> list[dict]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exported() -> set[str]:
    """What our metrics are called in Prometheus."""
    names = set()
    owners = (
        StreamMetrics(), ScorerMetrics(), WatchMetrics(), ExpiryMetrics(),
        ReplicaMetrics("scorer", 0),
    )  # fmt: skip
    for metric in [v for owner in owners for v in vars(owner).values() if isinstance(v, Metric)]:
        name = f"ray_{metric.info['name']}"
        names |= {f"{name}_bucket"} if isinstance(metric, Histogram) else {name}
    return names


def test_every_rule_says_what_is_the_matter_and_what_to_do() -> None:
    found = {rule["alert"] for rule in rules()}
    assert found == {
        "CameraSilent", "LagGrowing", "FramesExpired", "FramesLost", "LatencyOverBudget",
        "AlarmRateJumped", "Drift", "DeadLetters", "VersionRefused", "ModelReplaced",
        "RefreshHeld", "RefreshSilent", "EvidenceOwed", "EvidenceLost", "StoreAway",
        "ReplicaRestarting", "PartGone", "NothingScraped",
    }  # fmt: skip
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["labels"]["product"] == "dpdl"  # a plant has rules of its own
        assert set(rule["annotations"]) == {"summary", "action"}
        assert all(len(text) > 30 for text in rule["annotations"].values())


def test_every_rule_reads_metrics_that_we_export() -> None:
    for rule in rules():
        used = set(re.findall(r"ray_\w+", rule["expr"]))
        assert used <= exported(), rule["alert"]
        assert used or "up{" in rule["expr"]


def test_every_rule_is_tested_to_fire_and_not_to_fire() -> None:
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for rule in rules():
        mine = [case["exp_alerts"] for case in cases if case["alertname"] == rule["alert"]]
        assert any(mine), rule["alert"]
        assert not all(mine), rule["alert"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("test", "rules", TESTS.name),
        ("check", "rules", "--lint=all", "--lint-fatal", RULES.name),
        ("check", "config", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool(arguments) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
