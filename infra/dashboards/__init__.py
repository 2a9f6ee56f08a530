"""Grafana dashboards as plain Python that makes JSON. `python -m infra.dashboards` writes the files
that Grafana is provisioned from (infra/grafana); `dpdl dashboards push` sends the same."""

from __future__ import annotations

from infra.dashboards.camera import camera
from infra.dashboards.model import model
from infra.dashboards.panels import CONSOLE_URL, Json
from infra.dashboards.pipeline import pipeline
from infra.dashboards.wall import wall


def dashboards(console_url: str = CONSOLE_URL) -> dict[str, Json]:
    """File name -> dashboard. console_url is where a browser finds the console."""
    return {
        "wall": wall(console_url),
        "camera": camera(console_url),
        "model": model(),
        "pipeline": pipeline(),
    }
