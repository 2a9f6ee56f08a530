"""From what Redis and S3 hold to what the API says. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from infra.answers import Answer
from infra.cameras import CameraState
from infra.decisions import Decision
from infra.model_store import Pointer
from infra.redis_client import StoredResult
from serving.archive import FRAME, HEAT
from serving.console import schema

ALERTING_SHARE = 0.05
"""As on Grafana's wall (infra/dashboards/wall.py)."""
_RANK: dict[schema.State, int] = {"alerting": 0, "silent": 1, "ok": 2}


def frame(stored: StoredResult, answers: Mapping[str, Answer]) -> schema.Frame:
    result = stored.result
    answer = answers.get(result.frame_id)
    frame_url, heat_url = _pictures(result.frame_id, result.captured_at_ns, result.evidence_key)
    return schema.Frame(
        id=stored.id,
        frame_id=result.frame_id,
        camera=result.camera,
        captured_at_ms=result.captured_at_ns / 1e6,
        scored_at_ms=result.scored_at_ns / 1e6,
        score=result.score,
        threshold=result.threshold,
        is_anomaly=result.is_anomaly,
        energy=result.energy,
        model=result.model,
        version=result.version,
        frame_url=frame_url,
        heat_url=heat_url,
        answer=answered(answer) if answer else None,
    )


def answered(answer: Answer) -> schema.Answered:
    return schema.Answered(
        kind=answer.kind, defect=answer.defect, by=answer.by, at_ms=answer.at_ns / 1e6
    )


def camera(state: CameraState, now_s: float | None = None) -> schema.Camera:
    override, alert_frame = state.override, state.last_alert_frame
    pictures: tuple[str | None, str | None] = (None, None)
    if alert_frame and state.last_alert_at_ns is not None:
        pictures = _pictures(alert_frame, state.last_alert_at_ns, state.last_alert_evidence)
    return schema.Camera(
        camera=state.camera,
        state=_state(state, time.time() if now_s is None else now_s),
        frames=state.frames,
        anomalies=state.anomalies,
        alerts=state.alerts,
        frames_per_s=state.frames_per_s,
        alert_share=state.alert_share,
        last_captured_at_ms=_ms(state.last_captured_at_ns),
        last_scored_at_ms=_ms(state.last_scored_at_ns),
        last_score=state.last_score,
        last_alert_at_ms=_ms(state.last_alert_at_ns),
        last_alert_frame_url=pictures[0],
        last_alert_heat_url=pictures[1],
        threshold=state.threshold,
        override=override.threshold if override else None,
        override_by=override.by if override else None,
        override_at_ms=_ms(override.at_ns) if override else None,
        override_is_for=state.override_is_for,
        model=state.model,
        version=state.version,
    )


def cameras(states: Sequence[CameraState], most: int | None = None) -> list[schema.Camera]:
    """The worst first, of more than `most` those alone."""
    now_s = time.time()
    worst = sorted(
        states, key=lambda s: (_RANK[_state(s, now_s)], -(s.alert_share or 0.0), s.camera)
    )
    return [camera(state, now_s) for state in worst[:most]]


def timeline(
    newest_first: Sequence[StoredResult], complete: bool, k: int, n: int
) -> schema.Timeline:
    rows = list(reversed(newest_first))
    versions = list(dict.fromkeys(row.result.version for row in rows))
    number = {version: i for i, version in enumerate(versions)}
    return schema.Timeline(
        id=[row.id for row in rows],
        captured_at_ms=[row.result.captured_at_ns / 1e6 for row in rows],
        score=[row.result.score for row in rows],
        threshold=[row.result.threshold for row in rows],
        versions=versions,
        version=[number[row.result.version] for row in rows],
        complete=complete,
        alert_k=k,
        alert_n=n,
    )


def version(
    name: str, manifest: Mapping[str, Any], pointer: Pointer | None, decision: Decision | None
) -> schema.Version:
    thresholds = manifest.get("thresholds") or {}
    moves = [m for m in pointer.moves if m.version == name] if pointer else []
    said = next((each.why for each in (decision, *moves) if each), "")
    return schema.Version(
        version=name,
        kind=manifest.get("kind", ""),
        created_at=manifest.get("created_at", manifest["stored_at"]),
        parent=manifest.get("parent"),
        dataset=manifest.get("data", {}).get("dataset", ""),
        current=pointer is not None and pointer.version == name,
        auroc=manifest.get("auroc"),
        threshold=thresholds.get("default"),
        false_alarm_rate=manifest.get("false_alarm_rate"),
        new_normals=manifest.get("new_normals"),
        decision=decision.decision if decision else "",
        why=manifest.get("broken", said),
        numbers=decision.numbers if decision else {},
    )


def replicas(said: Sequence[dict[str, Any] | BaseException]) -> dict[str, Any]:
    """What a deployment's replicas say of themselves, in one.

    Figures are those of one that answers; `trouble`, and of a scorer `refused`, those of all.
    """
    answers = [each for each in said if isinstance(each, dict)]
    found = dict(answers[0]) if answers else {}
    for name in {"trouble", "refused"} & found.keys():
        each = [answer[name] for answer in answers]
        if isinstance(found[name], dict):
            found[name] = {what: why for one in each for what, why in one.items()}
        else:
            found[name] = "; ".join(filter(None, dict.fromkeys(each)))
    if lost := [type(each).__name__ for each in said if isinstance(each, BaseException)]:
        silent = f"{len(lost)} of {len(said)} replicas: no answer ({lost[0]})"
        trouble = found.get("trouble", "")
        if isinstance(trouble, dict):  # a scorer's, by model
            found["trouble"] = trouble | {"replicas": silent}
        else:
            found["trouble"] = "; ".join(filter(None, (trouble, silent)))
    return found


def _pictures(frame_id: str, captured_at_ns: int, evidence: str | None) -> tuple[str, str | None]:
    if evidence:
        at = f"api/v1/evidence/{quote(evidence)}"
        return f"{at}/{FRAME}", f"{at}/{HEAT}"
    return f"api/v1/frames/{quote(frame_id)}-{captured_at_ns}", None


def _state(state: CameraState, now_s: float) -> schema.State:
    if state.is_silent(now_s):
        return "silent"
    return "alerting" if (state.alert_share or 0.0) > ALERTING_SHARE else "ok"


def _ms(at_ns: int | None) -> float | None:
    return None if at_ns is None else at_ns / 1e6
