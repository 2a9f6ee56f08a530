"""Versions, refreshes and gate decisions; scores before and after."""

from __future__ import annotations

from infra.dashboards.panels import (
    GREEN,
    RED,
    Json,
    api,
    dashboard,
    labels,
    panel,
    prom,
    stat,
    steps,
    table,
    timeseries,
)
from infra.dashboards.queries import drift, quantile


def model() -> Json:
    mine = '{model="$model"}'
    return dashboard(
        "dpdl-model",
        "DPDL Model",
        help="Versions, refreshes and what the gate decided; scores before and after.",
        span="now-24h",
        variables=[
            labels("model", "Model", "ray_dpdl_active_version", "model"),
            labels("before", "Before", "ray_dpdl_version_score_count", "version"),
            labels("after", "After", "ray_dpdl_version_score_count", "version"),
        ],
        rows=[
            [
                stat(
                    "Version in use",
                    prom(f"max by (version) (ray_dpdl_active_version{mine})", "{{version}}"),
                    help="Two during a change: each scorer changes between two batches.",
                    size=(8, 5),
                    defaults={"displayName": "${__field.labels.version}"},
                ),
                stat(
                    "Refused",
                    prom(
                        f"count(max by (version) (ray_dpdl_version_refused{mine})) or vector(0)",
                        "n",
                    ),
                    steps=steps((None, GREEN), (1, RED)),
                    help="Current by the pointer, but broken or too new: not used.",
                    size=(4, 5),
                ),
                stat(
                    "Promoted",
                    prom(
                        'max(ray_dpdl_refresh_decisions{model="$model", decision="promoted"})',
                        "n",
                    ),
                    help="By the gate, ever: refreshes and trainings.",
                    size=(4, 5),
                ),
                stat(
                    "Held",
                    prom('max(ray_dpdl_refresh_decisions{model="$model", decision="held"})', "n"),
                    help="By the gate, ever: refreshes and trainings.",
                    size=(4, 5),
                ),
                stat(
                    "Last decision",
                    prom(
                        "topk(1, max by (decision) (1000 * "
                        f"ray_dpdl_refresh_decided_timestamp_seconds{mine} > 0))",
                        "{{decision}}",
                    ),
                    unit="dateTimeFromNow",
                    help="When the gate last decided, and how.",
                    size=(4, 5),
                    defaults={"displayName": "${__field.labels.decision}"},
                ),
            ],
            [
                panel(
                    "state-timeline",
                    "Versions",
                    prom(f"max by (version) (ray_dpdl_active_version{mine})", "{{version}}"),
                    help="Which version scored when; promotions and rollbacks are annotations, "
                    "with what the gate said.",
                    size=(24, 6),
                    defaults={"custom": {"fillOpacity": 80, "lineWidth": 0}},
                    options={"mergeValues": True, "showValue": "never", "rowHeight": 0.8},
                )
            ],
            [
                timeseries(
                    "Scores of all cameras",
                    *(
                        prom(
                            quantile(q, "ray_dpdl_version_score", where=mine),
                            f"p{100 * q:.0f}",
                        )
                        for q in (0.5, 0.9, 0.99)
                    ),
                    help="A step at a promotion is the version's, not the line's.",
                    size=(12, 9),
                ),
                timeseries(
                    "Share of frames that alert",
                    prom(
                        'sum(rate(ray_dpdl_frames_total{outcome="alert"}[$__rate_interval])) '
                        '/ (sum(rate(ray_dpdl_frames_total{camera!=""}[$__rate_interval])) > 0)',
                        "alarm rate",
                    ),
                    unit="percentunit",
                    help="All cameras together.",
                    size=(12, 9),
                ),
            ],
            [
                _distribution("Scores before", "$before"),
                _distribution("Scores after", "$after"),
            ],
            [
                table(
                    "Versions and what the gate decided",
                    api(
                        "/api/v1/versions",
                        "versions",
                        {
                            "version": ("Version", "string"),
                            "current": ("Current", "boolean"),
                            "kind": ("Kind", "string"),
                            "created_at": ("Made", "timestamp"),
                            "decision": ("Gate", "string"),
                            "why": ("Why", "string"),
                            "auroc": ("AUROC", "number"),
                            "threshold": ("Threshold", "number"),
                            "new_normals": ("New normals", "number"),
                            "parent": ("From", "string"),
                        },
                        params={"model": "${model}", "count": "100"},
                    ),
                    help="The newest 100, from the alert API. AUROC is of the test split, measured "
                    "at training.",
                    size=(16, 9),
                ),
                table(
                    "Promotions and rollbacks",
                    api(
                        "/api/v1/versions",
                        "promotions",
                        {
                            "at": ("When", "timestamp"),
                            "version": ("Version", "string"),
                            "by": ("By", "string"),
                            "why": ("Why", "string"),
                        },
                        params={"model": "${model}", "count": "1"},
                    ),
                    help="Every move of the pointer, the newest first; the last 200.",
                    size=(8, 9),
                ),
            ],
            [
                table(
                    "Drift by camera",
                    prom(f"topk(50, {drift('camera, of', mine)})", instant=True),
                    help="The highest 50 population stability indices now, as shares of their "
                    "bounds: above 1 a camera has moved.",
                    size=(24, 8),
                    sort="Value",
                    transformations=[
                        {"id": "organize", "options": {"excludeByName": {"Time": True}}}
                    ],
                )
            ],
        ],
    )


def _distribution(title: str, version: str) -> Json:
    return panel(
        "bargauge",
        f"{title}: {version}",
        prom(
            "sum by (le) (increase(ray_dpdl_version_score_bucket"
            f'{{model="$model", version="{version}"}}[$__range]))',
            "{{le}}",
            instant=True,
            heatmap=True,
        ),
        help="Frames by score that this version gave in the time shown; each bar up to its value.",
        size=(12, 8),
        options={
            "orientation": "vertical",
            "displayMode": "basic",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    )
