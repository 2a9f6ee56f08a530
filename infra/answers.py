"""What people say of a frame: false alarm, defect or unsure; and where that goes.

    false alarm   <dataset>/incoming/answer-<frame>.parquet    a new normal, whatever its score
    defect        <dataset>/anomalies/answer-<frame>.parquet   a known defect, with its class
    unsure        nowhere: it is shown

Each object is one image as the data sets of pipelines/ have it, and who said so and when. Its name
follows from the frame alone: giving an answer twice is the same as once, another answer takes the
first one's place, and undo takes the object out of the data set, so that the next refresh or
training goes without it. A run that began with it finds it at taken_back(key), for as long as
evidence is kept. Beside it the answer stands in Redis (`answer:<frame id>`, for as long), for those
who look. S3 is written before Redis: after a crash between the two the frame shows no answer, and
answering it again mends that.

One process answers at a time (the console has one replica); two at once would leave the last one's.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import DataError, NotFound
from infra.messages import FrameResult
from infra.redis_connection import make_redis, redis_errors
from infra.s3_client import get, make_minio, s3_errors
from infra.settings import Settings
from infra.stored import from_json

log = logging.getLogger("dpdl.answers")

Kind = Literal["false-alarm", "defect", "unsure"]
INCOMING, ANOMALIES = "incoming", "anomalies"
_FOLDER: dict[Kind, str] = {"false-alarm": INCOMING, "defect": ANOMALIES}
_NAME = "answer-"
ANSWERED = "answer:"
"""How the source of a frame that was answered begins: a vouched folder names its files."""

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("defect", pa.string(), nullable=False),
        pa.field("camera", pa.string(), nullable=False),
        pa.field("captured_at", pa.timestamp("ns", tz="UTC")),
        pa.field("source", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("answered_by", pa.string(), nullable=False),
        pa.field("answered_at", pa.timestamp("ns", tz="UTC"), nullable=False),
    ]
)
"""The columns of a data set (pipelines/dataset_index.py), then who and when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    frame_id: str
    captured_at_ns: int
    kind: Kind
    defect: str
    """Class of the defect; "" for the other kinds."""
    by: str
    at_ns: int
    dataset: str
    """Whose data it joined; "" for unsure."""

    @property
    def key(self) -> str | None:
        """Its object in the data bucket, None where the kind has none."""
        folder = _FOLDER.get(self.kind)
        # The time too: a topic that was made anew counts its offsets from 0 again.
        name = hashlib.sha256(f"{self.frame_id} {self.captured_at_ns}".encode()).hexdigest()[:32]
        return f"{self.dataset}/{folder}/{_NAME}{name}.parquet" if folder else None


def is_answer(key: str) -> bool:
    """Whether an object of a data set was put there by a person's answer."""
    return key.rsplit("/", 1)[-1].startswith(_NAME)


def taken_back(key: str) -> str:
    """Where an answer's object lies once it is taken back, in the evidence bucket: it expires."""
    return f"taken-back/{key}"


class Answers:
    """Every method can raise AuthFailed, ServiceUnavailable and DataError of Redis and S3."""

    def __init__(self, settings: Settings) -> None:
        self._where, self._s3 = settings.redis, settings.s3
        self._kept_s = settings.stream.evidence_days * 86_400
        self._redis = make_redis(settings)
        self._client = make_minio(settings)

    def give(
        self, result: FrameResult, kind: Kind, *, defect: str, by: str, dataset: str, image: bytes
    ) -> Answer:
        """Answer a frame; the same answer again changes nothing, not even who and when.

        image: as it came from the camera; unused for unsure.
        """
        answer = Answer(
            frame_id=result.frame_id,
            captured_at_ns=result.captured_at_ns,
            kind=kind,
            defect=defect,
            by=by,
            at_ns=time.time_ns(),
            dataset=dataset,
        )
        before = self.of([result]).get(result.frame_id)
        if before and replace(before, by=by, at_ns=answer.at_ns) == answer:
            return before
        if answer.key:
            self._put(answer.key, _parquet(answer, result, image))
        if before and before.key and before.key != answer.key:
            self._take_back(before.key)
        with redis_errors(self._where):
            self._redis.set(self._key(answer.frame_id), json.dumps(asdict(answer)), ex=self._kept_s)
            if defect:
                self._redis.zadd(self._classes, {defect: answer.at_ns / 1e9})
        return answer

    def undo(self, result: FrameResult) -> Answer | None:
        """Take an answer back with all it did; the answer that was, None where there was none."""
        answer = self.of([result]).get(result.frame_id)
        if answer is None:
            return None
        if answer.key:
            self._take_back(answer.key)
        with redis_errors(self._where):
            self._redis.delete(self._key(answer.frame_id))
        return answer

    def of(self, results: Iterable[FrameResult]) -> dict[str, Answer]:
        """Frame id -> answer, of those frames that have a readable one; one round trip."""
        asked = {result.frame_id: result.captured_at_ns for result in results}
        if not asked:
            return {}
        with redis_errors(self._where):
            rows = cast("list[str | None]", self._redis.mget([self._key(each) for each in asked]))
        found = {}
        for (frame, captured_at_ns), row in zip(asked.items(), rows, strict=True):
            answer = _answer(row, frame) if row is not None else None
            if answer and answer.captured_at_ns == captured_at_ns:
                found[frame] = answer
        return found

    def classes(self, count: int = 100) -> list[str]:
        """Classes of defects that people have named, the latest first."""
        with redis_errors(self._where):
            return cast("list[str]", self._redis.zrevrange(self._classes, 0, count - 1))

    def _put(self, key: str, data: bytes) -> None:
        with s3_errors(self._s3):
            self._client.put_object(self._s3.data_bucket, key, io.BytesIO(data), len(data))

    def _take_back(self, key: str) -> None:
        """Copied before it is removed: at any moment a reader finds it in one of the two places."""
        with suppress(NotFound), s3_errors(self._s3):  # somebody removed the object by hand
            data, _ = get(self._client, self._s3.data_bucket, key)
            kept = io.BytesIO(data)
            self._client.put_object(self._s3.evidence_bucket, taken_back(key), kept, len(data))
            self._client.remove_object(self._s3.data_bucket, key)

    def _key(self, frame_id: str) -> str:
        return f"{self._where.prefix}:answer:{frame_id}"

    @property
    def _classes(self) -> str:
        return f"{self._where.prefix}:defect-classes"


def _answer(row: str, frame: str) -> Answer | None:
    try:
        return from_json(Answer, row, f"the answer to {frame}")
    except DataError as error:  # it hides no other
        log.warning("%s", error)
        return None


def _parquet(answer: Answer, result: FrameResult, image: bytes) -> bytes:
    row = {
        "image": image,
        "label": int(answer.kind == "defect"),
        "defect": answer.defect,
        "camera": result.camera,
        "captured_at": result.captured_at_ns,
        "source": f"{ANSWERED}{answer.frame_id}",
        "digest": hashlib.sha256(image).hexdigest(),
        "answered_by": answer.by,
        "answered_at": answer.at_ns,
    }
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], SCHEMA), out, compression="none")
    return out.getvalue()
