"""What the HTTP API says and takes. Times are unix milliseconds (nanoseconds do not fit a number of
JavaScript); ids are stream ids, by which lists are paged; URLs are relative to the console's own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from infra.answers import Kind
from infra.redis_client import MAX_THRESHOLD

Name = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=60,
        pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$",
    ),
]
State = Literal["alerting", "silent", "ok"]


class Answered(BaseModel):
    kind: Kind
    defect: str
    """Class of the defect; "" for the other kinds."""
    by: str
    at_ms: float


class Frame(BaseModel):
    """A scored frame; in a list of alerts, one that raised one."""

    id: str
    frame_id: str
    camera: str
    captured_at_ms: float
    scored_at_ms: float
    score: float
    threshold: float
    is_anomaly: bool
    energy: float
    model: str
    version: str
    frame_url: str
    heat_url: str | None
    """None where no heat map is kept: the score was not above the threshold."""
    answer: Answered | None


class AlertPage(BaseModel):
    alerts: list[Frame]
    newest: str
    """For `after`, to ask what came since."""
    older: str | None
    """For `before`, to page back; None at the end."""
    skipped: bool
    """More came since `after` than fit: begin anew."""


class ScorePage(BaseModel):
    scores: list[Frame]
    older: str | None


class Timeline(BaseModel):
    """Columns, one entry a frame, oldest first."""

    id: list[str]
    captured_at_ms: list[float]
    score: list[float]
    threshold: list[float]
    versions: list[str]
    version: list[int]
    """Which of `versions`."""
    complete: bool
    """False where more frames lie in the time asked for than are kept or sent."""
    alert_k: int
    alert_n: int
    """An alert is raised when k of the last n frames are above the threshold."""


class Camera(BaseModel):
    camera: str
    state: State
    frames: int
    anomalies: int
    alerts: int
    frames_per_s: float | None
    """Of about the last 15 minutes, as is alert_share."""
    alert_share: float | None
    last_captured_at_ms: float | None
    last_scored_at_ms: float | None
    last_score: float | None
    last_alert_at_ms: float | None
    last_alert_frame_url: str | None
    last_alert_heat_url: str | None
    threshold: float | None
    """In use: the override where there is one that holds."""
    override: float | None
    override_by: str | None
    override_at_ms: float | None
    override_is_for: str
    """ "version V" or "model M" where it was chosen for another than scores now; for another model
    it does not hold. "" else."""
    model: str | None
    version: str | None


class CameraPage(BaseModel):
    cameras: list[Camera]
    """The worst first: alerting (the most first), silent, ok; at most 2,000."""
    known: int
    """How many there are."""


class Model(BaseModel):
    model: str
    current: str | None
    """Its version; None where none was promoted yet."""
    default: bool
    """Whether it scores the cameras that are bound to no other."""
    bound_cameras: int


class ModelList(BaseModel):
    models: list[Model]
    """Those in the store and those that cameras are bound to, the default first."""


class Version(BaseModel):
    version: str
    kind: str
    """train or refresh; "" where its maker did not say."""
    created_at: str
    parent: str | None
    dataset: str
    current: bool
    auroc: float | None
    """Of the test split, measured at training."""
    threshold: float | None
    false_alarm_rate: float | None
    new_normals: int | None
    decision: str
    """Of the gate: promoted, held, or "" where none is recorded."""
    why: str
    numbers: dict[str, float | int | str | None]


class Promotion(BaseModel):
    version: str
    at: str
    by: str
    why: str


class VersionPage(BaseModel):
    model: str
    current: str | None
    rollback_to: str | None
    """What was current before; None where there was none."""
    versions: list[Version]
    """The newest first."""
    known: int
    promotions: list[Promotion]
    """The newest first; the last 200."""


class Classes(BaseModel):
    classes: list[str]


class Problem(BaseModel):
    detail: str


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    by: Name
    """Who; a claim that is kept, not a proof."""


class AnswerOrder(_Order):
    kind: Kind
    defect: Name | None = None
    """Class of the defect: wanted with defect, forbidden otherwise."""
    expected: Annotated[float, Field(ge=0)] | None = None
    """`at_ms` of the answer that you saw, 0 where you saw none; without it any is replaced."""


class ThresholdOrder(_Order):
    threshold: (
        Annotated[float, Field(allow_inf_nan=False, ge=-MAX_THRESHOLD, le=MAX_THRESHOLD)] | None
    )
    """null: the model's own again."""


class PromoteOrder(_Order):
    expected: str | None
    """The version that was current when you looked."""
    why: Annotated[str, Field(min_length=1, max_length=200)] = "promoted in the console"
    back: bool = False
    """A rollback, to `rollback_to`: rolling back again goes further."""
