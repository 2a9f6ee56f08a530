"""What Grafana is told beside the dashboards: data sources, and Prometheus' alert rules again.

The rules exist once, in infra/prometheus/dpdl.rules.yml. Prometheus evaluates them for who has an
Alertmanager; the copies here are evaluated by Grafana, for who is notified by its contact points.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import yaml

from infra.dashboards.panels import ALERT_API, PROMETHEUS, Json

FOLDER_UID, FOLDER = "dpdl", "DPDL"
EVERY = "1m"
EXPRESSION = "__expr__"


def data_sources(prometheus_url: str, alert_api_url: str, token: str | None = None) -> list[Json]:
    """As Grafana's API and its provisioning files take them.

    token: of the alert API, where it has one (DPDL_SERVE_TOKEN).
    """
    infinity: Json = {
        "name": "DPDL alert API",
        "uid": ALERT_API["uid"],
        "type": ALERT_API["type"],
        "access": "proxy",
        "url": alert_api_url.rstrip("/"),
        "jsonData": {
            "auth_method": "bearerToken" if token else "none",
            "allowedHosts": [alert_api_url.rstrip("/")],
            "timeoutInSeconds": 10,
        },
    }
    if token:
        infinity["secureJsonData"] = {"bearerToken": token}
    return [
        {
            "name": "DPDL Prometheus",
            "uid": PROMETHEUS["uid"],
            "type": PROMETHEUS["type"],
            "access": "proxy",
            "url": prometheus_url.rstrip("/"),
            "jsonData": {"httpMethod": "POST", "timeInterval": "15s"},
        },
        infinity,
    ]


def alert_rules() -> Json:
    """A provisioning file of Grafana's alerting, made from Prometheus' rules."""
    path = files("infra") / "prometheus" / "dpdl.rules.yml"
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return {
        "apiVersion": 1,
        "groups": [
            {
                "orgId": 1,
                "name": group["name"],
                "folder": FOLDER,
                "interval": EVERY,
                "rules": [_rule(rule) for rule in group["rules"]],
            }
            for group in groups
        ],
    }


def _rule(rule: Json) -> Json:
    """A holds the expression, whose rows are what is wrong; B is true for each of them.

    No rows mean that all is well. All our expressions give values above 0.
    """
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"]).lower()
    return {
        "uid": f"dpdl-{name}",
        "title": rule["alert"],
        "condition": "B",
        "for": rule.get("for", "0s"),
        "noDataState": "OK",
        "execErrState": "Error",
        "labels": rule["labels"],
        "annotations": {
            key: text.replace("$value", "$values.A.Value").strip()
            for key, text in rule["annotations"].items()
        },
        "data": [
            {
                "refId": "A",
                "datasourceUid": PROMETHEUS["uid"],
                "relativeTimeRange": {"from": 600, "to": 0},
                "model": {
                    "refId": "A",
                    "datasource": PROMETHEUS,
                    "editorMode": "code",
                    "expr": " ".join(
                        line.strip() for line in rule["expr"].splitlines() if line.strip()
                    ),
                    "instant": True,
                    "range": False,
                },
            },
            {
                "refId": "B",
                "datasourceUid": EXPRESSION,
                "relativeTimeRange": {"from": 0, "to": 0},
                "model": {
                    "refId": "B",
                    "datasource": {"type": EXPRESSION, "uid": EXPRESSION},
                    "type": "threshold",
                    "expression": "A",
                    "conditions": [{"evaluator": {"type": "gt", "params": [0]}}],
                },
            },
        ],
    }


def dashboard_provider() -> Json:
    """Where Grafana finds the dashboards' files (infra/compose.yaml mounts them there)."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "dpdl",
                "orgId": 1,
                "folder": FOLDER,
                "folderUid": FOLDER_UID,
                "type": "file",
                "disableDeletion": True,
                "allowUiUpdates": False,
                "updateIntervalSeconds": 60,
                "options": {"path": "/etc/grafana/dashboards"},
            }
        ],
    }


def provisioning() -> dict[str, Any]:
    """File below provisioning/ -> content. Addresses come from the container's environment.

    No token: Grafana and the alert API share the machine there, and loopback needs none.
    """
    sources = data_sources("$DPDL_PROMETHEUS_URL", "$DPDL_ALERT_API_URL")
    return {
        "datasources/dpdl.yaml": {
            "apiVersion": 1,
            "datasources": [source | {"orgId": 1, "editable": False} for source in sources],
        },
        "dashboards/dpdl.yaml": dashboard_provider(),
        "alerting/dpdl.yaml": alert_rules(),
    }
