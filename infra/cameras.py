"""What is known of a camera and what a person set for it, as it lies in the camera's Redis hash.

Knows no client: redis_client.py writes and fetches the hash, publish.lua counts in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SILENT_S = 300.0
"""A camera none of whose frames was scored for so long is silent: in the console and `dpdl status`,
and by the same number in the rule CameraSilent and on Grafana's wall."""
SMOOTHED_S = 900.0
"""A camera's rates are of about the last so many seconds; older frames count e-fold less."""


@dataclass(frozen=True, slots=True)
class ThresholdOverride:
    """A person's threshold for one camera, in place of the model's."""

    threshold: float
    by: str
    at_ns: int
    model: str
    """That the camera was bound to then, "" for the default one. Scores of different models do not
    compare, so it holds while this one scores and for no other's."""
    version: str
    """That had scored the camera last, "" for none of that model."""


@dataclass(frozen=True, slots=True)
class ModelBinding:
    """The model that a person bound a camera to, in place of the default one."""

    model: str
    by: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Debounce:
    """A camera's own rule: an anomaly is an alert when k of its last n frames are anomalous."""

    k: int
    n: int
    by: str
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraState:
    """What is known of one camera. The fields of its last result are None before the first."""

    camera: str
    frames: int
    anomalies: int
    alerts: int
    last_captured_at_ns: int | None
    last_scored_at_ns: int | None
    last_score: float | None
    last_frame: str | None
    threshold_used: float | None
    model: str | None
    version: str | None
    override: ThresholdOverride | None
    frames_per_s: float | None
    """Over about SMOOTHED_S until now; None before the second batch."""
    alert_share: float | None
    """Of its frames, smoothed in the same way."""
    last_alert_at_ns: int | None
    """When the frame was captured."""
    last_alert_frame: str | None
    last_alert_evidence: str | None
    binding: ModelBinding | None = None
    debounce: Debounce | None = None

    @property
    def override_is_for(self) -> str:
        """What the override was chosen for where that does not score now, "" where it does: a
        model, and then it does not hold; or a version, and then a person should look again."""
        if self.override is None:
            return ""
        chosen, bound = self.override.model, self.binding.model if self.binding else ""
        if chosen != bound or (chosen and self.model not in (None, chosen)):
            return f"model {chosen}" if chosen else "the default model"
        if self.override.version and self.override.version != self.version:
            return f"version {self.override.version}"
        return ""

    @property
    def threshold(self) -> float | None:
        """The override where it holds, else that of the last frame."""
        if self.override and self.override_is_for in ("", f"version {self.override.version}"):
            return self.override.threshold
        return self.threshold_used

    def is_silent(self, now_s: float) -> bool:
        """By when a frame was scored, not captured: a camera's clock may be anything.

        Scored in the future: by a scorer whose clock was ahead, so nothing is known of now.
        """
        return abs(now_s - (self.last_scored_at_ns or 0) / 1e9) > SILENT_S


def camera_state(camera: str, found: Mapping[str, str]) -> CameraState:
    """A camera's hash (infra/redis_client.py, infra/publish.lua), read."""

    def number(name: str, kind: type[Any]) -> Any:
        return kind(found[name]) if name in found else None

    frames_per_s, alert_share = _rates(found)
    binding = None
    if "bound" in found:
        binding = ModelBinding(found["bound"], found["bound_by"], int(found["bound_at"]))
    debounce = None
    if "alert_k" in found:
        debounce = Debounce(
            int(found["alert_k"]),
            int(found["alert_n"]),
            found["alert_by"],
            int(found["alert_at"]),
        )
    return CameraState(
        camera=camera,
        frames=int(found.get("frames", 0)),
        anomalies=int(found.get("anomalies", 0)),
        alerts=int(found.get("alerts", 0)),
        last_captured_at_ns=number("last_captured_at", int),
        last_scored_at_ns=number("last_scored_at", int),
        last_score=number("last_score", float),
        last_frame=found.get("last_frame"),
        threshold_used=number("threshold_used", float),
        model=found.get("model"),
        version=found.get("version"),
        override=threshold_override(found),
        frames_per_s=frames_per_s,
        alert_share=alert_share,
        last_alert_at_ns=number("last_alert_at", int),
        last_alert_frame=found.get("last_alert_frame"),
        last_alert_evidence=found.get("last_alert_evidence"),
        binding=binding,
        debounce=debounce,
    )


OVERRIDE_FIELDS = (
    "threshold", "threshold_by", "threshold_at", "threshold_model", "threshold_version", "bound",
)  # fmt: skip


def threshold_override(found: Mapping[str, str]) -> ThresholdOverride | None:
    """Of these fields of a camera's hash, as far as it has them."""
    if "threshold" not in found:
        return None
    return ThresholdOverride(
        threshold=float(found["threshold"]),
        by=found["threshold_by"],
        at_ns=int(found["threshold_at"]),
        # One that was set before this was kept stays with the model that the camera has.
        model=found.get("threshold_model", found.get("bound", "")),
        version=found.get("threshold_version", ""),
    )


def _rates(found: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Frames a second and share of alerts, faded from the last batch until now (publish.lua)."""
    if "rate_at" not in found:
        return None, None
    frames, alerts = float(found["rate_frames"]), float(found["rate_alerts"])
    kept = math.exp(-max(0.0, time.time() - float(found["rate_at"])) / SMOOTHED_S)
    seconds = float(found["rate_s"]) * kept + SMOOTHED_S * (1 - kept)
    return frames * kept / seconds if float(found["rate_s"]) else None, alerts / frames
