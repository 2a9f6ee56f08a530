"""Dead letters: records that cannot be scored, kept in Kafka with the reason.

Key, value and headers are kept, and three headers added: `dead-reason`; `dead-frame`
(topic/partition/offset); `dead-size`, the bytes of the original value. A letter that the broker
refuses as too large is written without its value, so that no record can stop the stream:
`dead-size` tells it from an empty one, and retention keeps the bytes at `dead-frame` for a while.

At least once: after a crash or a lost answer a letter may come twice; `dead-frame` tells. So the
producer needs no idempotence, and must not have it: after a long absence of Kafka an idempotent one
may never send again, and the stream would stand still behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from infra.kafka_client import SIZE_ERRORS, close_producer, kafka_errors, make_producer
from infra.messages import KafkaRecord
from infra.settings import Settings

log = logging.getLogger("dpdl.stream")

ACK_TIMEOUT_S = 30.0
MAX_CUT_BYTES = 4096
"""Of the key, and of the sender's headers: in a letter without its value they go beyond that."""

Headers = list[tuple[str, bytes]]


class DeadLetters:
    """Writes to the dead-letter topic, by a producer of its own. One thread at a time.

    Errors: AuthFailed, ServiceUnavailable, SettingsError.
    """

    def __init__(self, settings: Settings) -> None:
        self._kafka = settings.kafka
        self._producer = make_producer(settings, idempotent=False)

    def put(self, letters: Sequence[tuple[KafkaRecord, str]]) -> None:
        """Keeps records, each with its reason. Returns when all are acknowledged.

        One round trip for however many; a second one for those that are too large.
        """
        with kafka_errors(self._kafka):
            sent = [(letter, self._send(*letter)) for letter in letters]
            refused = [letter for letter, future in sent if not _fits(future)]
            cut = [self._send(*letter, cut=True) for letter in refused]
            for future in cut:
                future.get(timeout=ACK_TIMEOUT_S)
        if refused:
            log.warning(
                "%s refused %d records as too large: they are kept without their bytes. "
                "Its max.message.bytes should be 1 MiB above that of %s",
                self._kafka.dead_topic, len(refused), self._kafka.topic,
            )  # fmt: skip

    def close(self, timeout_s: float) -> None:
        close_producer(self._producer, timeout_s)

    def _send(self, record: KafkaRecord, reason: str, *, cut: bool = False) -> Any:
        """kafka's future."""
        # kafka-python refuses a record with neither key nor value.
        key, value = record.key, record.value or b""
        headers = [(name, each or b"") for name, each in record.headers or ()]
        added = [
            ("dead-reason", reason.encode()),
            ("dead-frame", f"{record.topic}/{record.partition}/{record.offset}".encode()),
            ("dead-size", str(len(value)).encode()),
        ]
        if cut:
            key = key if len(key or b"") <= MAX_CUT_BYTES else None
            headers = headers if _size(headers) <= MAX_CUT_BYTES else []
            value = b""
        topic = self._kafka.dead_topic
        return self._producer.send(topic, value=value, key=key, headers=[*headers, *added])


def _size(headers: Headers) -> int:
    return sum(len(name.encode()) + len(value) for name, value in headers)


def _fits(sent: Any) -> bool:
    """Waits for a record's acknowledgement; False where it is refused as too large."""
    try:
        sent.get(timeout=ACK_TIMEOUT_S)
    except SIZE_ERRORS:
        return False
    return True
