"""Queries and columns that several dashboards share."""

from __future__ import annotations

from infra.dashboards.panels import (
    link,
    override,
)

LAST_FRAME = "ray_dpdl_camera_last_frame_timestamp_seconds"
CAMERA_LINK = "/d/dpdl-camera/dpdl-camera?${__url_time_range}&var-camera="
ENCODED = "${__value.raw:percentencode}"
"""A table's cell, fit for a URL: a camera's name may hold anything."""

ALERT_COLUMNS = {
    "captured_at_ms": ("Time", "timestamp_epoch"),
    "camera": ("Camera", "string"),
    "score": ("Score", "number"),
    "threshold": ("Threshold", "number"),
    "version": ("Version", "string"),
    "frame_url": ("Frame", "string"),
    "heat_url": ("Heat map", "string"),
}
ALERT_LINKS = [
    override("Frame", links=link("Open the frame", "${console}/${__value.raw}", new_tab=True)),
    override("Heat map", links=link("Open the map", "${console}/${__value.raw}", new_tab=True)),
    override("Time", unit="dateTimeAsLocal"),
]


def drift(by: str, camera: str = "") -> str:
    """PSI as a share of its bound: above 1, a camera's frames have moved."""
    return f"max by ({by}) (ray_dpdl_drift_psi{camera} / ray_dpdl_drift_bound{camera})"


def alarm_rate(window: str, camera: str = '!=""') -> str:
    """Alerts as a share of frames; 0 for a camera that has never alerted and has no such series."""
    frames = f"sum by (camera) (increase(ray_dpdl_frames_total{{camera{camera}}}[{window}]))"
    alerts = (
        "sum by (camera) "
        f'(increase(ray_dpdl_frames_total{{camera{camera}, outcome="alert"}}[{window}]))'
    )
    return f"({alerts} or 0 * {frames}) / ({frames} > 0)"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    le = f"le, {by}" if by else "le"
    return (
        f"histogram_quantile({q}, sum by ({le}) (rate({metric}_bucket{where}[$__rate_interval])))"
    )
