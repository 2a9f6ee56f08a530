"""Kafka records > frames with their pixels, or the reason why not.

The pixels come from dpdl_core.images.decode_image, as in training and evaluation: online scores
equal offline ones. Decoding runs in threads; the codecs let go of Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpdl_core.images import ImageRejected, decode_image
from infra.errors import BadFrame
from infra.messages import FrameRecord, KafkaRecord
from serving.batch import BadRecord, Batch, Decoded, Plan, Polled


class Decoder:
    """Decodes a polled batch, each frame at the size that its model reads.

    Args:
        threads: decoding threads; the rest of the replica waits for sockets most of the time.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, polled: Polled, plan: Plan, alive: Callable[[], None] = lambda: None
    ) -> Decoded:
        """Keeps the order of records within each model. Never raises for what is in them.

        alive: called after each record.
        """
        outcomes = self._pool.map(lambda record: _decode(record, plan), polled.records)
        bad: list[BadRecord] = []
        rows: dict[str, list[_Row]] = {}
        for each in outcomes:
            alive()
            if isinstance(each, BadRecord):
                bad.append(each)
            else:
                rows.setdefault(each.model, []).append(each)
        return Decoded(polled, [_batch(model, found) for model, found in rows.items()], bad)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Row(NamedTuple):
    model: str
    record: KafkaRecord
    frame: FrameRecord
    image: NDArray[np.uint8]


def _batch(model: str, rows: list[_Row]) -> Batch:
    images = np.empty((len(rows), *rows[0].image.shape), dtype=np.uint8)
    for at, row in enumerate(rows):
        images[at] = row.image
    return Batch(model, [row.record for row in rows], [row.frame for row in rows], images)


def _decode(record: KafkaRecord, plan: Plan) -> _Row | BadRecord:
    try:
        frame = FrameRecord.from_kafka(record)
        model, size = plan.of(frame.camera)
        return _Row(model, record, frame, decode_image(frame.image, size))
    except (BadFrame, ImageRejected) as why:
        return BadRecord(record, why.reason, str(why))
    except Exception as why:  # a codec that trips over hostile bytes must not stop the stream
        return BadRecord(record, "undecodable", f"{type(why).__name__}: {why}")
