"""Dashboards as data: golden files, layout, and no query of a metric that does not exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Histogram, Metric

from infra.dashboards import dashboards
from infra.dashboards.__main__ import FOLDER, written
from infra.dashboards.provisioning import alert_rules, data_sources
from infra.dashboards.queries import alarm_rate
from infra.metrics import ExpiryMetrics, ReplicaMetrics, ScorerMetrics, StreamMetrics, WatchMetrics

BOARDS = dashboards()


def exported() -> set[str]:
    names = set()
    owners = (
        StreamMetrics(), ScorerMetrics(), WatchMetrics(), ExpiryMetrics(),
        ReplicaMetrics("scorer", 0),
    )  # fmt: skip
    for metric in [v for owner in owners for v in vars(owner).values() if isinstance(v, Metric)]:
        name = f"ray_{metric.info['name']}"
        is_histogram = isinstance(metric, Histogram)
        names |= {f"{name}_bucket", f"{name}_count"} if is_histogram else {name}
    return names


def test_the_files_that_grafana_is_provisioned_from_are_what_the_code_makes() -> None:
    files = {
        str(path.relative_to(FOLDER)): path.read_text()
        for path in Path(FOLDER).rglob("*")
        if path.is_file()
    }
    assert files == written(), "run: python -m infra.dashboards"


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_its_place_its_help_and_its_query(name) -> None:
    board = BOARDS[name]
    taken = set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["description"].endswith(".")
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] in ("dpdl-prometheus", "dpdl-alert-api")


@pytest.mark.parametrize("name", BOARDS)
def test_queries_read_metrics_that_we_or_ray_export(name) -> None:
    text = str(BOARDS[name])
    assert set(re.findall(r"ray_dpdl_\w+", text)) <= exported()
    variables = {variable["name"] for variable in BOARDS[name]["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)\}?", text))
    assert used <= variables, "a variable that the dashboard does not have"


def test_tables_of_the_alert_api_are_of_the_model_that_is_chosen() -> None:
    targets = [target for panel in BOARDS["model"]["panels"] for target in panel["targets"]]
    asked = [each["url_options"]["params"] for each in targets if "url_options" in each]
    assert len(asked) == 2
    assert all({"key": "model", "value": "${model}"} in params for params in asked)


def test_the_wall_counts_our_rules_and_none_of_the_plants_own() -> None:
    counted = [each for each in re.findall(r"ALERTS\{[^}]*\}", str(BOARDS["wall"]))]
    assert counted
    assert all('product="dpdl"' in each for each in counted)


def promtool(tmp_path: Path, query: str, series: dict[str, str], wanted: dict[str, float]) -> None:
    """The query after 30 hours of minutes, by camera, as Prometheus itself says."""
    samples = [{"labels": f'{{camera="{name}"}}', "value": v} for name, v in wanted.items()]
    case = {
        "interval": "1m",
        "input_series": [{"series": f"ray_dpdl_{k}", "values": v} for k, v in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "1800m", "exp_samples": samples}],
    }
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_a_camera_that_never_alerted_has_an_alarm_rate(tmp_path) -> None:
    series = {
        'frames_total{camera="good",outcome="normal"}': "0+60x1800",
        'frames_total{camera="bad",outcome="normal"}': "0+45x1800",
        'frames_total{camera="bad",outcome="alert"}': "0+15x1800",
        'frames_total{camera="idle",outcome="normal"}': "7x1800",
    }
    promtool(tmp_path, alarm_rate("1h"), series, {"good": 0, "bad": 0.25})


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_the_wall_ranks_alarms_above_silence_and_forgets_what_was_taken_away(tmp_path) -> None:
    (query,) = [
        panel["targets"][0]["expr"]
        for panel in BOARDS["wall"]["panels"]
        if panel["title"] == "State"
    ]
    last = "camera_last_frame_timestamp_seconds"
    series = {
        f'{last}{{camera="good"}}': "0+60x1800",
        f'{last}{{camera="bad"}}': "0+60x1800",
        f'{last}{{camera="moved"}}': "0+60x1800",
        f'{last}{{camera="stopped"}}': "0+60x1790 107400x9",
        f'{last}{{camera="gone"}}': "0+60x60 3600x1740",
        'frames_total{camera="good",outcome="normal"}': "0+60x1800",
        'frames_total{camera="bad",outcome="alert"}': "0+15x1800",
        'frames_total{camera="stopped",outcome="alert"}': "0+15x1800",
        'frames_total{camera="other",outcome="alert"}': "0+15x1800",  # beyond the first 100
        'drift_psi{camera="moved"}': "2x1800",
        'drift_psi{camera="gone"}': "2x1800",
        'drift_bound{camera="moved"}': "1x1800",
        'drift_bound{camera="gone"}': "1x1800",
    }
    wanted = {"good": 0, "moved": 1, "stopped": 2, "bad": 3, "other": 3}
    promtool(tmp_path, query, series, wanted)


def test_links_lead_to_dashboards_that_exist() -> None:
    uids = {board["uid"] for board in BOARDS.values()}
    for board in BOARDS.values():
        assert set(re.findall(r"/d/([\w-]+)/", str(board))) <= uids


def test_grafanas_rules_are_prometheus_rules_and_find_their_data_source() -> None:
    rules_file = FOLDER.parent / "prometheus" / "dpdl.rules.yml"
    ours = {
        rule["alert"]: rule
        for group in yaml.safe_load(rules_file.read_text())["groups"]
        for rule in group["rules"]
    }
    (group,) = alert_rules()["groups"]
    assert [rule["title"] for rule in group["rules"]] == list(ours)
    sources = {source["uid"] for source in data_sources("http://p", "http://a")} | {"__expr__"}
    for rule in group["rules"]:
        query, threshold = rule["data"]
        assert query["model"]["expr"].split() == [
            word
            for line in ours[rule["title"]]["expr"].splitlines()
            for word in line.split()
        ]  # fmt: skip
        assert threshold["model"]["expression"] == query["refId"]
        assert rule["condition"] == threshold["refId"]
        assert {part["datasourceUid"] for part in rule["data"]} <= sources
        assert re.fullmatch(r"[a-z-]{1,40}", rule["uid"])
        assert set(rule["annotations"]) == {"summary", "action"}
        # Prometheus' $value is text in Grafana.
        assert "$value " not in str(rule["annotations"])


def test_a_token_is_a_secret_and_its_absence_is_none() -> None:
    _, with_token = data_sources("http://p/", "https://api:8000/", "s3cret")
    _, without = data_sources("http://p", "http://127.0.0.1:8000")
    assert with_token["secureJsonData"] == {"bearerToken": "s3cret"}
    assert with_token["url"] == with_token["jsonData"]["allowedHosts"][0] == "https://api:8000"
    assert "s3cret" not in str(with_token["jsonData"])
    assert "secureJsonData" not in without
    assert without["jsonData"]["auth_method"] == "none"
