"""One camera: scores against the threshold, alerts, drift."""

from __future__ import annotations

from infra.dashboards.panels import (
    GREEN,
    RED,
    YELLOW,
    Json,
    api,
    console,
    dashboard,
    heatmap,
    labels,
    override,
    prom,
    stat,
    steps,
    table,
    timeseries,
)
from infra.dashboards.queries import (
    ALERT_COLUMNS,
    ALERT_LINKS,
    LAST_FRAME,
    alarm_rate,
    drift,
    quantile,
)

THRESHOLD = override(
    "threshold",
    color={"mode": "fixed", "fixedColor": RED},
    custom__showPoints="never",
    custom__lineStyle={"fill": "dash", "dash": [10, 10]},
)


def camera(console_url: str) -> Json:
    mine = '{camera="$camera"}'
    return dashboard(
        "dpdl-camera",
        "DPDL Camera",
        help="One camera: its scores against the threshold, its alerts, its drift.",
        variables=[labels("camera", "Camera", LAST_FRAME, "camera"), console(console_url)],
        rows=[
            [
                timeseries(
                    "Score against threshold",
                    api(
                        "/api/v1/cameras/${camera:percentencode}/scores",
                        "scores",
                        {
                            "captured_at_ms": ("Time", "timestamp_epoch"),
                            "score": ("score", "number"),
                            "threshold": ("threshold", "number"),
                        },
                        params={"count": "500", "from": "${__from}", "to": "${__to}"},
                        format="timeseries",
                    ),
                    points=True,
                    help="Every frame, from the alert API: the newest 500 of the time shown. What "
                    "lies above the threshold is an anomaly.",
                    size=(16, 9),
                    overrides=[THRESHOLD],
                ),
                stat(
                    "Silent for",
                    prom(f"time() - max({LAST_FRAME}{mine})", "silent"),
                    unit="s",
                    steps=steps((None, GREEN), (60, YELLOW), (300, RED)),
                    help="Since its last frame was scored.",
                    size=(4, 9),
                ),
                stat(
                    "Alarm rate, 1 h",
                    prom(alarm_rate("1h", '="$camera"'), "alarm rate"),
                    unit="percentunit",
                    steps=steps((None, GREEN), (0.02, YELLOW), (0.05, RED)),
                    help="Share of its frames that raised an alert.",
                    size=(4, 9),
                ),
            ],
            [
                timeseries(
                    "Score quantiles",
                    prom(quantile(0.5, "ray_dpdl_score", where=mine), "score p50"),
                    prom(quantile(0.95, "ray_dpdl_score", where=mine), "score p95"),
                    prom(quantile(0.99, "ray_dpdl_score", where=mine), "score p99"),
                    prom(f"max(ray_dpdl_threshold{mine})", "threshold"),
                    help="Over any time, from Prometheus. Beyond the first 100 cameras of a "
                    "consumer there is only the camera `other`.",
                    size=(8, 8),
                    overrides=[THRESHOLD],
                ),
                timeseries(
                    "Frames by outcome",
                    prom(
                        f"sum by (outcome) (rate(ray_dpdl_frames_total{mine}[$__rate_interval]))",
                        "{{outcome}}",
                    ),
                    unit="reqps",
                    stacked=True,
                    help="Anomaly: over the threshold, but not often enough for an alert (k of n).",
                    size=(8, 8),
                ),
                timeseries(
                    "Drift",
                    prom(drift("model, of", mine), "{{model}} {{of}}"),
                    help="Population stability index of the last 500 frames against the version's "
                    "held-out normals, as a share of the version's own bound: above 1 it has "
                    "moved. Empty for the first 200 frames of a process or version, and where a "
                    "version has under 40 held-out normals.",
                    size=(8, 8),
                    defaults={"thresholds": steps((None, GREEN), (0.7, YELLOW), (1, RED))},
                ),
            ],
            [
                heatmap(
                    "Scores",
                    prom(
                        f"sum by (le) (increase(ray_dpdl_score_bucket{mine}[$__rate_interval]))",
                        "{{le}}",
                        heatmap=True,
                    ),
                    unit="short",
                    help="How many frames had which score.",
                    size=(12, 8),
                ),
                heatmap(
                    "Energy",
                    prom(
                        f"sum by (le) (increase(ray_dpdl_energy_bucket{mine}[$__rate_interval]))",
                        "{{le}}",
                        heatmap=True,
                    ),
                    unit="short",
                    help="The part of the score that is distance to normal prototypes.",
                    size=(12, 8),
                ),
            ],
            [
                table(
                    "Alerts",
                    api(
                        "/api/v1/alerts",
                        "alerts",
                        ALERT_COLUMNS,
                        params={"count": "200", "camera": "${camera}"},
                    ),
                    help="Its newest 200 among as many alerts of all cameras as the alert API "
                    "looks through in 2 s; those further back are in the console, "
                    "which goes on as you scroll. Images open there.",
                    size=(24, 12),
                    overrides=ALERT_LINKS,
                )
            ],
        ],
    )
