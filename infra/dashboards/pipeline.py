"""Lag, stages, batches, restarts, machines."""

from __future__ import annotations

from infra.dashboards.panels import (
    Json,
    dashboard,
    heatmap,
    prom,
    table,
    timeseries,
)
from infra.dashboards.queries import quantile


def pipeline() -> Json:
    starts = "ray_dpdl_replica_started_timestamp_seconds"
    return dashboard(
        "dpdl-pipeline",
        "DPDL Pipeline",
        help="Where frames wait, how long each stage takes, how full batches are, who restarts.",
        rows=[
            [
                timeseries(
                    "Lag",
                    prom("max by (partition) (ray_dpdl_lag_frames)", "partition {{partition}}"),
                    help="Frames in Kafka whose result is not yet published, asked of Kafka and "
                    "Redis: it grows also when no consumer lives.",
                    size=(12, 8),
                ),
                timeseries(
                    "Latency from capture to result",
                    *(
                        prom(quantile(q, "ray_dpdl_latency_seconds"), f"p{100 * q:.0f}")
                        for q in (0.5, 0.9, 0.99)
                    ),
                    unit="s",
                    help="By the clocks of camera and consumer; 2 s (p99) is the budget.",
                    size=(12, 8),
                ),
            ],
            [
                timeseries(
                    "Stages (p50)",
                    prom(quantile(0.5, "ray_dpdl_stage_seconds", "stage"), "{{stage}}"),
                    unit="s",
                    help="From one mark to the next: consumed (since capture, by frame), decoded, "
                    "scored, published (by batch).",
                    size=(12, 8),
                ),
                timeseries(
                    "Stages (p99)",
                    prom(quantile(0.99, "ray_dpdl_stage_seconds", "stage"), "{{stage}}"),
                    unit="s",
                    help="As beside, one in a hundred takes longer.",
                    size=(12, 8),
                ),
            ],
            [
                heatmap(
                    "Frames per batch",
                    prom(
                        "sum by (le) (increase(ray_dpdl_batch_frames_bucket[$__rate_interval]))",
                        "{{le}}",
                        heatmap=True,
                    ),
                    unit="short",
                    help="Full batches (stream.max_batch) mean that scoring is the bottleneck.",
                    size=(8, 8),
                ),
                timeseries(
                    "Batches in flight",
                    prom("sum by (WorkerId) (ray_dpdl_in_flight_batches)", "consumer"),
                    help="Between poll and publish, per consumer; at most stream.max_in_flight.",
                    size=(8, 8),
                ),
                timeseries(
                    "Frames by outcome",
                    prom(
                        "sum by (outcome) (rate(ray_dpdl_frames_total[$__rate_interval]))",
                        "{{outcome}}",
                    ),
                    unit="reqps",
                    stacked=True,
                    help="All cameras together; dead are those put aside.",
                    size=(8, 8),
                ),
            ],
            [
                timeseries(
                    "Dead letters by reason",
                    prom(
                        "sum by (reason) (rate(ray_dpdl_dead_letters_total[$__rate_interval]))",
                        "{{reason}}",
                    ),
                    unit="reqps",
                    help="Kept in the topic of dead letters with their reason.",
                    size=(8, 8),
                ),
                timeseries(
                    "Begun in 15 minutes",
                    prom(
                        f"count by (part, rank) (max_over_time({starts}[15m]) > time() - 900)",
                        "{{part}} {{rank}}",
                    ),
                    help="How often each place of the application has begun: once is a start, "
                    "again and again is trouble.",
                    size=(8, 8),
                ),
                table(
                    "Replicas",
                    prom(f"time() - max by (part, rank) ({starts})", instant=True),
                    unit="s",
                    help="What runs, and for how long.",
                    size=(8, 8),
                    transformations=[
                        {
                            "id": "organize",
                            "options": {
                                "excludeByName": {"Time": True},
                                "renameByName": {"Value": "Runs for"},
                            },
                        }
                    ],
                ),
            ],
            [
                timeseries(
                    "GPU",
                    prom("avg by (instance) (ray_node_gpus_utilization)", "{{instance}}"),
                    unit="percent",
                    help="Utilisation by node; empty where there is none.",
                    size=(8, 8),
                ),
                timeseries(
                    "CPU",
                    prom("avg by (instance) (ray_node_cpu_utilization)", "{{instance}}"),
                    unit="percent",
                    help="Utilisation by node.",
                    size=(8, 8),
                ),
                timeseries(
                    "Memory",
                    prom(
                        "max by (instance) (ray_node_mem_used) "
                        "/ max by (instance) (ray_node_mem_total)",
                        "{{instance}}",
                    ),
                    unit="percentunit",
                    help="Used share by node.",
                    size=(8, 8),
                ),
            ],
        ],
    )
