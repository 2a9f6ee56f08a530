"""How many consumers Kafka's lag wants. Runs in Ray Serve's controller; imports nothing.

Consumer.record_autoscaling_stats reports the frames that each replica's partitions are behind;
Ray Serve averages them over its look-back time, calls the policy, and applies the bounds and the
delays of build()'s AutoscalingConfig.
"""

from __future__ import annotations

from typing import Any

LAG = "lag_frames"


class LagPolicy:
    """As many consumers as it takes for each to be at most `lag_per_consumer` frames behind."""

    def __init__(self, lag_per_consumer: int) -> None:
        self._lag_per_consumer = lag_per_consumer

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(wanted replicas, no state). `context` is ray.serve.config.AutoscalingContext."""
        by_replica = (context.aggregated_metrics or {}).get(LAG)
        if not by_replica:
            # Nobody has said anything yet: a replica that starts must not be taken for idle.
            return context.target_num_replicas, {}
        wanted = -(-sum(by_replica.values()) // self._lag_per_consumer)
        return max(1, int(wanted)), {}
