"""How many cores this process may use, which in a container are fewer than the machine has.

Knows Linux only. Used where torch is told its number of threads: more of them than a quota has
cores are all stopped together until its next period.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of the process's own control group as a container sees it: "200000 100000", or "max 100000"."""


def num_cores(quota: Path = _QUOTA) -> int:
    """At least 1; a share of a core counts as one."""
    allowed = len(os.sched_getaffinity(0))
    try:
        most, period = quota.read_text().split()
        if most != "max":
            allowed = min(allowed, math.ceil(int(most) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no such control group: no quota
    return max(1, allowed)
