"""The wall: all cameras at a glance."""

from __future__ import annotations

from infra.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    RED,
    YELLOW,
    Json,
    api,
    console,
    dashboard,
    link,
    override,
    panel,
    prom,
    stat,
    steps,
    table,
)
from infra.dashboards.queries import (
    ALERT_COLUMNS,
    ALERT_LINKS,
    CAMERA_LINK,
    ENCODED,
    LAST_FRAME,
    alarm_rate,
    drift,
    quantile,
)


def wall(console_url: str) -> Json:
    age = f"time() - max by (camera) ({LAST_FRAME})"
    state = f"""
        topk(200, max by (camera) (
          label_replace(
            3 * ({alarm_rate("15m")} > bool 0.05 unless {age} > 300), "why", "alarms", "", "")
          or label_replace(2 * ({age} > bool 300), "why", "silent", "", "")
          or label_replace({drift("camera")} > bool 1, "why", "drift", "", "")
        ) unless {age} > 86400)"""
    mapping = {
        str(value): {"text": text, "color": color, "index": value}
        for value, (text, color) in enumerate(
            [("ok", GREEN), ("drift", BLUE), ("silent", GREY), ("alarms", RED)]
        )
    }
    to_camera = link("Open the camera", CAMERA_LINK + "${__field.labels.camera:percentencode}")
    return dashboard(
        "dpdl-wall",
        "DPDL Wall",
        help="All cameras at a glance: state, alarm rate, last alerts.",
        variables=[console(console_url)],
        span="now-1h",
        rows=[
            [
                stat(
                    "Cameras",
                    prom(f"count(count by (camera) ({LAST_FRAME} > time() - 86400))", "cameras"),
                    help="Cameras that sent a frame in the last day.",
                    size=(4, 4),
                ),
                stat(
                    "Silent",
                    prom(
                        f"count(max by (camera) ({LAST_FRAME}) < time() - 300 "
                        f"and max by (camera) ({LAST_FRAME}) > time() - 86400) or vector(0)",
                        "silent",
                    ),
                    steps=steps((None, GREEN), (1, YELLOW)),
                    help="Of those, the ones that have sent nothing for five minutes.",
                    size=(4, 4),
                ),
                stat(
                    "Frames",
                    prom(
                        'sum(rate(ray_dpdl_frames_total{camera!=""}[$__rate_interval]))', "frames"
                    ),
                    unit="reqps",
                    help="Frames a second brought to their end, all cameras together.",
                    size=(4, 4),
                ),
                stat(
                    "Alerts in the last hour",
                    prom('sum(increase(ray_dpdl_frames_total{outcome="alert"}[1h]))', "alerts"),
                    defaults={"decimals": 0},
                    help="Of all cameras.",
                    size=(4, 4),
                ),
                stat(
                    "Latency (p99)",
                    prom(quantile(0.99, "ray_dpdl_latency_seconds"), "p99"),
                    unit="s",
                    steps=steps((None, GREEN), (1, YELLOW), (2, RED)),
                    help="From capture to result; 2 s is the budget.",
                    size=(4, 4),
                ),
                stat(
                    "Rules firing",
                    prom(
                        'count(ALERTS{alertstate="firing", product="dpdl"}) or vector(0)', "firing"
                    ),
                    steps=steps((None, GREEN), (1, RED)),
                    help="Alert rules of Prometheus (infra/prometheus/dpdl.rules.yml); a plant's "
                    "others are not counted.",
                    size=(4, 4),
                ),
            ],
            [
                stat(
                    "State",
                    prom(state, "{{camera}}"),
                    help="Alarms: over 5 % of the frames of 15 minutes alert. Silent: nothing for "
                    "5 minutes; after a day a camera counts as taken away. Drift: PSI above its "
                    "bound. The worst 200; a click opens one.",
                    size=(24, 9),
                    steps=steps((None, GREEN)),
                    defaults={
                        "mappings": [{"type": "value", "options": mapping}],
                        "links": to_camera,
                    },
                )
            ],
            [
                panel(
                    "bargauge",
                    "Alarm rate, the highest 20",
                    prom(f"topk(20, {alarm_rate('1h')})", "{{camera}}"),
                    unit="percentunit",
                    help="Share of a camera's frames of the last hour that raised an alert.",
                    size=(8, 12),
                    defaults={
                        "min": 0,
                        "thresholds": steps((None, GREEN), (0.02, YELLOW), (0.05, RED)),
                        "links": to_camera,
                    },
                    options={
                        "orientation": "horizontal",
                        "displayMode": "basic",
                        "reduceOptions": {
                            "calcs": ["lastNotNull"],
                            "fields": "",
                            "values": False,
                        },
                    },
                ),
                table(
                    "Last alerts",
                    api("/api/v1/alerts", "alerts", ALERT_COLUMNS, params={"count": "50"}),
                    help="The newest 50, from the alert API; images open in the console.",
                    size=(16, 12),
                    overrides=[
                        *ALERT_LINKS,
                        override("Camera", links=link("Camera", CAMERA_LINK + ENCODED)),
                    ],
                ),
            ],
            [
                table(
                    "All cameras",
                    api(
                        "/api/v1/cameras",
                        "cameras",
                        {
                            "camera": ("Camera", "string"),
                            "state": ("State", "string"),
                            "alert_share": ("Alarm rate", "number"),
                            "last_scored_at_ms": ("Last frame", "timestamp_epoch"),
                            "last_alert_at_ms": ("Last alert", "timestamp_epoch"),
                            "frames": ("Frames", "number"),
                            "anomalies": ("Anomalies", "number"),
                            "alerts": ("Alerts", "number"),
                            "last_score": ("Last score", "number"),
                            "threshold": ("Threshold", "number"),
                            "override": ("Set by hand", "number"),
                            "model": ("Model", "string"),
                            "version": ("Version", "string"),
                        },
                    ),
                    help="The worst first, from the alert API; alarm rate of about 15 minutes, "
                    "counts since the beginning.",
                    size=(24, 12),
                    overrides=[
                        override("Camera", links=link("Camera", CAMERA_LINK + ENCODED)),
                        override("Last frame", unit="dateTimeFromNow"),
                        override("Last alert", unit="dateTimeFromNow"),
                        override("Alarm rate", unit="percentunit"),
                    ],
                )
            ],
        ],
    )
