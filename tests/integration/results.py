"""Results to publish, for the tests of the result store."""

from __future__ import annotations

from typing import Any

from infra.messages import FrameResult, evidence_key, frame_id
from infra.redis_client import ResultStore
from infra.settings import Settings

GROUP, TOPIC = "g", "frames"


def changed(settings: Settings, group: str, **fields: Any) -> Settings:
    new = getattr(settings, group).model_copy(update=fields)
    return settings.model_copy(update={group: new})


def result(
    offset: int, camera: str = "cam-1", *, anomaly: bool = False, partition: int = 0
) -> FrameResult:
    frame = frame_id(TOPIC, partition, offset)
    captured_at_ns = 1_700_000_000_000_000_000 + offset
    return FrameResult(
        frame_id=frame,
        camera=camera,
        captured_at_ns=captured_at_ns,
        scored_at_ns=1_700_000_001_000_000_000 + offset,
        score=0.1 * offset + (10 if anomaly else 0),
        threshold=9.0,
        energy=-offset / 3,
        is_anomaly=anomaly,
        model="default",
        version="v-1",
        evidence_key=evidence_key(frame, captured_at_ns) if anomaly else "",
    )


def put(store: ResultStore, first: int, results: list[FrameResult], **options: Any) -> int:
    return store.publish(GROUP, TOPIC, 0, first, first + len(results), results, **options)


def snapshot(store: ResultStore, cameras: list[str]) -> Any:
    return (
        [alert.result for alert in store.alerts(count=10_000)],
        {camera: [s.result for s in store.scores(camera, 10_000)] for camera in cameras},
        store.cameras(),
        store.dead_letters(),
        store.progress(GROUP, TOPIC),
    )
