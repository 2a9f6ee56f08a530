"""Two versions on the same frames: where they agree, and whose alerts the other does not raise.

Pure arithmetic, streaming: memory grows with cameras, never with frames.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.messages import FrameResult

MAX_EXAMPLES = 50


@dataclass(slots=True)
class Tally:
    """Of one camera, or of all. `then` is what the stream said, `now` what the replay says."""

    frames: int = 0
    compared: int = 0
    """Frames whose result of then is still kept."""
    agree: int = 0
    """Both over their threshold, or both not."""
    alerts_then: int = 0
    alerts_now: int = 0
    alerts_only_then: int = 0
    alerts_only_now: int = 0
    versions_then: Counter[str] = field(default_factory=Counter)
    """model/version -> frames."""
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _origin: tuple[float, float] | None = None

    def add(self, then: FrameResult | None, now: FrameResult, alerts: tuple[bool, bool]) -> None:
        self.frames += 1
        if then is None:
            return
        alert_then, alert_now = alerts
        self.compared += 1
        self.agree += then.is_anomaly == now.is_anomaly
        self.alerts_then += alert_then
        self.alerts_now += alert_now
        self.alerts_only_then += alert_then and not alert_now
        self.alerts_only_now += alert_now and not alert_then
        self.versions_then[f"{then.model}/{then.version}"] += 1
        # From the first pair on, not from 0: scores far from 0 would cancel.
        self._origin = self._origin or (then.score, now.score)
        x, y = then.score - self._origin[0], now.score - self._origin[1]
        for at, term in enumerate((x, y, x * x, y * y, x * y)):
            self._sums[at] += term

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the scores; None where one of them never changes."""
        n, (x, y, xx, yy, xy) = self.compared, self._sums
        spread = (n * xx - x * x) * (n * yy - y * y)
        if n < 2 or spread <= 0:
            return None
        return max(-1.0, min(1.0, (n * xy - x * y) / math.sqrt(spread)))

    def report(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "compared": self.compared,
            "agreement": self.agree / self.compared if self.compared else None,
            "alerts_then": self.alerts_then,
            "alerts_now": self.alerts_now,
            "alerts_only_then": self.alerts_only_then,
            "alerts_only_now": self.alerts_only_now,
            "score_correlation": self.correlation,
            "versions_then": dict(self.versions_then),
        }


@dataclass(slots=True)
class Comparison:
    total: Tally = field(default_factory=Tally)
    cameras: dict[str, Tally] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first frames that only one of the two alerts for."""

    def add(
        self, then: FrameResult | None, now: FrameResult, *, alert_then: bool, alert_now: bool
    ) -> None:
        alerts = (alert_then, alert_now)
        self.total.add(then, now, alerts)
        self.cameras.setdefault(now.camera, Tally()).add(then, now, alerts)
        if then is not None and alert_then != alert_now and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(
                {
                    "frame": now.frame_id,
                    "camera": now.camera,
                    "alert": "only then" if alert_then else "only now",
                    "score_then": then.score,
                    "threshold_then": then.threshold,
                    "score_now": now.score,
                    "threshold_now": now.threshold,
                }
            )

    def report(self) -> Mapping[str, Any]:
        cameras = {name: tally.report() for name, tally in sorted(self.cameras.items())}
        return {**self.total.report(), "cameras": cameras, "examples": self.examples}
