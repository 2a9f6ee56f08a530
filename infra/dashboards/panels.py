"""Panels, queries and layout of Grafana's dashboard JSON, as far as our dashboards use them.

Written for Grafana 11.6 to 13: the classic model, schemaVersion 39, which all of them read and
store as it stands. Nothing that a later migration would rewrite is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

SCHEMA_VERSION = 39
WIDTH = 24
CONSOLE_URL = "http://127.0.0.1:8000"
PROMETHEUS = {"type": "prometheus", "uid": "dpdl-prometheus"}
ALERT_API = {"type": "yesoreyeram-infinity-datasource", "uid": "dpdl-alert-api"}
GRAFANA = {"type": "grafana", "uid": "-- Grafana --"}

GREEN, YELLOW, RED, BLUE, GREY = "green", "#e0b400", "red", "blue", "#808080"


# Queries --------------------------------------------------------------------------------------


def prom(expr: str, legend: str = "", *, instant: bool = False, heatmap: bool = False) -> Json:
    """A PromQL query; `instant` for tables and single values, `heatmap` for buckets."""
    return {
        "datasource": PROMETHEUS,
        "editorMode": "code",
        "expr": " ".join(expr.split()),
        "legendFormat": legend or "__auto",
        "instant": instant,
        "range": not instant,
        "format": "heatmap" if heatmap else "table" if instant and not legend else "time_series",
    }


def api(
    path: str,
    root: str,
    columns: Mapping[str, tuple[str, str]],
    *,
    params: Mapping[str, str] | None = None,
    format: str = "table",
) -> Json:
    """A GET of the alert API by Infinity's backend parser, which alerting can use too.

    root: where the rows are, in gjson's notation. columns: field -> (title, Infinity's type).
    """
    return {
        "datasource": ALERT_API,
        "type": "json",
        "parser": "backend",
        "source": "url",
        "format": format,
        "url": path,
        "url_options": {
            "method": "GET",
            "data": "",
            "params": [{"key": key, "value": value} for key, value in (params or {}).items()],
        },
        "root_selector": root,
        "columns": [
            {"selector": field, "text": title, "type": kind}
            for field, (title, kind) in columns.items()
        ],
        "filters": [],
    }


# Panels ---------------------------------------------------------------------------------------


def panel(
    kind: str,
    title: str,
    *queries: Json,
    help: str,
    size: tuple[int, int],
    unit: str = "short",
    defaults: Json | None = None,
    options: Json | None = None,
    overrides: Sequence[Json] = (),
    transformations: Sequence[Json] = (),
) -> Json:
    """size: width of 24 columns, height of 30 px rows. help is what the panel's (i) says."""
    return {
        "type": kind,
        "title": title,
        "description": help,
        "datasource": queries[0]["datasource"],
        "targets": [query | {"refId": "ABCDEF"[i]} for i, query in enumerate(queries)],
        "gridPos": {"w": size[0], "h": size[1]},
        "fieldConfig": {
            "defaults": {"unit": unit} | (defaults or {}),
            "overrides": list(overrides),
        },
        "options": options or {},
        "transformations": list(transformations),
    }


def timeseries(
    title: str, *queries: Json, stacked: bool = False, points: bool = False, **kw: Any
) -> Json:
    custom: Json = {
        "lineWidth": 1,
        "fillOpacity": 20 if stacked else 5,
        "showPoints": "always" if points else "never",
    }
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults = {"custom": custom, "min": 0} | kw.pop("defaults", {})
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, *queries, defaults=defaults, options=options, **kw)


def stat(title: str, query: Json, *, steps: Json | None = None, **kw: Any) -> Json:
    defaults = {"noValue": "none"} | ({"thresholds": steps} if steps else {})
    return panel(
        "stat",
        title,
        query,
        defaults=defaults | kw.pop("defaults", {}),
        options={
            "colorMode": "background" if steps else "value",
            "graphMode": "none",
            "textMode": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        **kw,
    )


def heatmap(title: str, query: Json, *, unit: str, **kw: Any) -> Json:
    """Of a Prometheus histogram's buckets over time."""
    options = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64, "exponent": 0.5},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
        "cellGap": 1,
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": True},
    }
    return panel("heatmap", title, query, options=options, **kw)


def table(title: str, *queries: Json, sort: str = "", **kw: Any) -> Json:
    options: Json = {"showHeader": True, "cellHeight": "sm"}
    if sort:
        options["sortBy"] = [{"displayName": sort, "desc": True}]
    return panel("table", title, *queries, options=options, **kw)


def steps(*pairs: tuple[float | None, str]) -> Json:
    """Colours from a value on; the first value is None."""
    return {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in pairs]}


def override(field: str, **properties: Any) -> Json:
    """For one field of a table; dots in property names are written as two underscores."""
    return {
        "matcher": {"id": "byName", "options": field},
        "properties": [{"id": k.replace("__", "."), "value": v} for k, v in properties.items()],
    }


def link(title: str, url: str, *, new_tab: bool = False) -> list[Json]:
    return [{"title": title, "url": url, "targetBlank": new_tab}]


# Dashboards -----------------------------------------------------------------------------------


def dashboard(
    uid: str,
    title: str,
    *,
    help: str,
    rows: Sequence[Sequence[Json]],
    variables: Sequence[Json] = (),
    span: str = "now-6h",
    refresh: str = "15s",
) -> Json:
    """Rows of panels, laid out from left to right; annotations of promotions on all of them."""
    return {
        "uid": uid,
        "title": title,
        "description": help,
        "tags": ["dpdl"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": span, "to": "now"},
        "refresh": refresh,
        "templating": {"list": list(variables)},
        "annotations": {"list": [_builtin(), _moves()]},
        "links": [
            {
                "type": "dashboards",
                "title": "DPDL",
                "tags": ["dpdl"],
                "asDropdown": False,
                "includeVars": False,
                "keepTime": True,
            }
        ],
        "panels": _placed(rows),
    }


def labels(name: str, title: str, metric: str, label: str) -> Json:
    """A variable with the values of a label of a metric."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "label": title,
        "type": "query",
        "datasource": PROMETHEUS,
        "definition": query,
        "query": {"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "sort": 7,
        "multi": False,
        "includeAll": False,
        "options": [],
        "current": {},
    }


def console(url: str) -> Json:
    """Where a browser finds the console; links to images lead there."""
    value = {"text": url, "value": url}
    return {
        "name": "console",
        "label": "Console",
        "type": "textbox",
        "query": url,
        "current": value,
        "options": [value | {"selected": True}],
    }


def _placed(rows: Sequence[Sequence[Json]]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for row in rows:
        x = 0
        for each in row:
            size = each["gridPos"]
            placed.append(each | {"id": len(placed) + 1, "gridPos": size | {"x": x, "y": y}})
            x += size["w"]
        assert x <= WIDTH, f"row at {y} is {x} wide"
        y += max(each["gridPos"]["h"] for each in row)
    return placed


def _builtin() -> Json:
    return {
        "builtIn": 1,
        "datasource": GRAFANA,
        "enable": True,
        "hide": True,
        "iconColor": BLUE,
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }


def _moves() -> Json:
    """Promotions, rollbacks and held refreshes, written by infra/grafana_client.py."""
    return {
        "datasource": GRAFANA,
        "enable": True,
        "iconColor": "purple",
        "name": "Versions",
        "target": {"type": "tags", "tags": ["dpdl", "version"], "matchAny": False, "limit": 100},
    }
