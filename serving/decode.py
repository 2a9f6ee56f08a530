"""Kafka records > frames with their pixels, or the reason why not.

The pixels come from dpdl_core.images.decode_image, as in training and evaluation: online scores
equal offline ones. Decoding runs in threads; the codecs let go of Python's lock.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from dpdl_core.images import ImageRejected, decode_image
from infra.errors import BadFrame
from infra.messages import FrameRecord, KafkaRecord
from serving.batch import BadRecord, Batch, Polled


class Decoder:
    """Decodes a polled batch at the size that the model in use reads.

    Args:
        threads: decoding threads; the rest of the replica waits for sockets most of the time.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(self, polled: Polled, size: int) -> Batch:
        """Keeps the order of records. Never raises for what is in them."""
        outcomes = list(self._pool.map(lambda record: _decode(record, size), polled.records))
        good = [each for each in outcomes if not isinstance(each, BadRecord)]
        images = np.empty((len(good), size, size, 3), dtype=np.uint8)
        for row, (_, _, image) in enumerate(good):
            images[row] = image
        return Batch(
            polled=polled,
            records=[record for record, _, _ in good],
            frames=[frame for _, frame, _ in good],
            images=images,
            bad=[each for each in outcomes if isinstance(each, BadRecord)],
        )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _decode(
    record: KafkaRecord, size: int
) -> tuple[KafkaRecord, FrameRecord, NDArray[np.uint8]] | BadRecord:
    try:
        frame = FrameRecord.from_kafka(record)
        return record, frame, decode_image(frame.image, size)
    except (BadFrame, ImageRejected) as why:
        return BadRecord(record, why.reason, str(why))
    except Exception as why:  # a codec that trips over hostile bytes must not stop the stream
        return BadRecord(record, "undecodable", f"{type(why).__name__}: {why}")
