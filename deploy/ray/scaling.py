"""How many replicas the engines' queues ask for. Ray's controller unpickles this module by value: it imports nothing
of ours."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


class QueuePolicy:
    """Ray's autoscaling policy over what replica.record_autoscaling_stats tells of the engines."""

    def __init__(self, target_load: float) -> None:
        self.target_load = target_load

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """-> replicas wanted (Ray applies the bounds and the delays), and what `serve status` shows of it."""
        metrics = context.aggregated_metrics or {}
        running, waiting, rows = (list(metrics.get(name, {}).values()) for name in ("running", "waiting", "rows"))
        outside = context.total_queued_requests or 0.0
        if not rows:  # no engine has said anything yet
            return max(context.target_num_replicas, 1 if outside else 0), {}
        load = sum(running) + sum(waiting) + outside
        capacity = self.target_load * sum(rows) / len(rows)
        state = {"running": sum(running), "waiting": sum(waiting), "outside": outside, "rows": sum(rows)}
        return math.ceil(load / capacity), state
