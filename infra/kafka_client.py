"""Kafka clients with our deadlines, sizes and credentials; topics as the product wants them.

Apache Kafka 4.x through kafka-python >= 3.0.12. Offsets that matter live in Redis (ResultStore):
a consumer never commits by itself, and has no reset policy, so it never skips frames in silence.

Sizes: a frame is at most 32 MiB (messages.MAX_FRAME_BYTES). The topic takes records up to twice
that, so that an oversized image reaches us and ends among the dead letters with a reason instead
of being refused where nobody sees it. Kafka's own request limit is 100 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as ke
from kafka.admin import ConfigResource
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.producer.transaction_manager import TransactionManager
from kafka.protocol.consumer import OffsetSpec
from kafka.protocol.metadata import MetadataRequest
from kafka.record.default_records import DefaultRecordBatch

from infra.errors import (
    AuthFailed,
    DataError,
    DpdlError,
    NotFound,
    ServiceUnavailable,
    SettingsError,
)
from infra.messages import MAX_FRAME_BYTES
from infra.settings import KafkaSettings, Settings

log = logging.getLogger("dpdl.kafka")

MAX_RECORD_BYTES = 2 * MAX_FRAME_BYTES
_MAX_DEAD_BYTES = MAX_RECORD_BYTES + 2**20
"""A dead letter is a record with a few more headers."""
_BY_ARRIVAL = ("message.timestamp.type", "LogAppendTime")
BOOTSTRAP_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 15.0
DELIVERY_TIMEOUT_S = 60.0

_AUTH_ERRORS = (
    ke.SaslAuthenticationFailedError,
    ke.UnsupportedSaslMechanismError,
    ke.AuthorizationError,
)
SIZE_ERRORS = (
    ke.MessageSizeTooLargeError,
    ke.RecordListTooLargeError,
)
_REFUSALS = (
    *SIZE_ERRORS,
    ke.InvalidRecordError,
    ke.InvalidTimestampError,
    ke.PolicyViolationError,
    ke.TopicAuthorizationFailedError,
)
"""A broker that answers so has written nothing of the batch."""


def make_producer(settings: Settings, *, idempotent: bool = True) -> KafkaProducer:
    """A producer whose acknowledged records survive: all in-sync replicas.

    idempotent: no duplicates on retry. But one that has given up a record in flight, since Kafka
    was away for so long, may never send again (kafka-python 3.0.12): close it, make another.
    A record that the broker refuses, as too large for instance, fails alone. kafka-python bounds
    no buffer memory: a sender of live frames must itself bound what is in flight. A record that is
    not acknowledged in DELIVERY_TIMEOUT_S fails its future. End it with close_producer().
    Errors: AuthFailed, ServiceUnavailable, SettingsError.
    """
    return _build(
        KafkaProducer,
        settings,
        acks="all",
        enable_idempotence=idempotent,
        max_request_size=_MAX_DEAD_BYTES,
        max_block_ms=int(BOOTSTRAP_TIMEOUT_S * 1000),
        delivery_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
        linger_ms=2,  # lets small frames of one poll share a request; JPEG gains no compression
        batch_size=2**20,  # kafka-python's 16 KiB would make every frame a request of its own
    )


def close_producer(producer: KafkaProducer, timeout_s: float) -> None:
    """End it with its I/O thread, whether or not what is in it could be sent in time."""
    try:
        producer.close(timeout=timeout_s)
    except ke.KafkaError:  # kafka-python 3.0.12 gives up closing then
        producer._sender.force_close()
        with suppress(ke.KafkaError):
            producer.close(timeout=timeout_s)


def make_consumer(settings: Settings, *, group: str | None = None) -> KafkaConsumer:
    """A consumer for subscribe() with a group, or for assign() without one.

    The caller seeks every partition on assignment (to the offset stored in Redis). There is no
    reset policy: a position that retention has removed raises kafka's OffsetOutOfRangeError from
    poll(), and a forgotten seek raises NoOffsetForPartitionError.
    Errors: AuthFailed, ServiceUnavailable, SettingsError.
    """
    return _build(
        KafkaConsumer,
        settings,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        # Kafka's smallest useful values for a quick take-over after a SIGKILL (its floor is 6 s).
        session_timeout_ms=10_000,
        heartbeat_interval_ms=2_000,
        # A record larger than this still arrives, alone: Kafka never withholds the first one.
        max_partition_fetch_bytes=8 * 2**20,
        fetch_max_bytes=32 * 2**20,
    )


def make_admin(settings: Settings) -> KafkaAdminClient:
    """Errors: AuthFailed, ServiceUnavailable, SettingsError."""
    return _build(KafkaAdminClient, settings)


def ensure_topics(settings: Settings) -> None:
    """Create the frame topic and the dead-letter topic where they do not exist.

    Existing topics are left as they are: their partitions and retention belong to whoever made
    them. One whose records are kept by their senders' clocks is warned of.
    Errors: AuthFailed, ServiceUnavailable, SettingsError.
    """
    kafka = settings.kafka
    wanted = {
        kafka.topic: _topic(kafka, kafka.partitions, MAX_RECORD_BYTES, kafka.retention_hours),
        kafka.dead_topic: _topic(kafka, 1, _MAX_DEAD_BYTES, kafka.dead_retention_hours),
    }
    admin = make_admin(settings)
    try:
        with kafka_errors(kafka):
            existing = {
                topic["name"]
                for topic in admin.describe_topics(list(wanted))
                if topic["error_code"] == 0
            }
            for name in wanted.keys() - existing:
                with suppress(ke.TopicAlreadyExistsError):  # someone else was quicker
                    admin.create_topics({name: wanted[name]})
            admin.wait_for_topics(list(wanted), timeout_ms=int(REQUEST_TIMEOUT_S * 1000))
            for name in existing:
                _warn_of_senders_clocks(admin, name)
    finally:
        admin.close()


def _warn_of_senders_clocks(admin: KafkaAdminClient, topic: str) -> None:
    try:
        asked = ConfigResource("topic", topic, {_BY_ARRIVAL[0]: None})
        found = admin.describe_configs([asked], config_filter="all")["topic"][topic]
    except ke.KafkaError as error:  # a user who may only send and read, for instance
        log.debug("the settings of topic %s: %r", topic, error)
        return
    if found[_BY_ARRIVAL[0]]["value"] != _BY_ARRIVAL[1]:
        log.warning(
            "topic %s keeps records by their senders' clocks: of one that is slow they are deleted "
            "too early. Set %s=%s for it (docs/faults.md)",
            topic, *_BY_ARRIVAL,
        )  # fmt: skip


def _topic(
    kafka: KafkaSettings, partitions: int, max_record_bytes: int, retention_hours: float
) -> dict[str, Any]:
    retention_bytes = kafka.retention_mb * 2**20
    return {
        "num_partitions": partitions,
        "replication_factor": kafka.replication,
        "configs": {
            "retention.ms": str(int(retention_hours * 3_600_000)),
            "retention.bytes": str(retention_bytes),
            # Kafka deletes whole segments: a bound in bytes is only as fine as its segments.
            "segment.bytes": str(min(max(retention_bytes // 8, 2 * max_record_bytes), 2**30)),
            "max.message.bytes": str(max_record_bytes),
            # Whatever a sender compresses with, the broker unpacks: kafka-python lacks some
            # codecs, and would stand still before such a record for ever.
            "compression.type": "uncompressed",
            # Else a camera's clock decides how long its frames are kept, or that they are refused.
            _BY_ARRIVAL[0]: _BY_ARRIVAL[1],
            "min.insync.replicas": "2" if kafka.replication > 2 else "1",
        },
    }


def partitions_of(client: KafkaConsumer, topic: str) -> list[TopicPartition]:
    """All partitions of a topic. NotFound where it does not exist."""
    found = client.partitions_for_topic(topic)
    if not found:
        raise NotFound(f"Kafka has no topic {topic}: create it with `dpdl up` or `dpdl serve`")
    return [TopicPartition(topic, partition) for partition in sorted(found)]


def bounds_of(
    client: KafkaConsumer, places: Collection[TopicPartition]
) -> dict[int, tuple[int, int]]:
    """Partition -> (the oldest offset that retention has kept, that of the next record).

    One without a leader is left out: no broker can say. KafkaTimeoutError where all are such.
    """
    begins, ends = (_led(client, places, end) for end in (OffsetSpec.EARLIEST, OffsetSpec.LATEST))
    return {p.partition: (begins[p], ends[p]) for p in places if p in begins and p in ends}


def _led(
    client: KafkaConsumer, places: Collection[TopicPartition], end: OffsetSpec
) -> dict[TopicPartition, int]:
    # kafka-python 3.0.12: client.end_offsets() ends in KeyError where one of many has no leader.
    asked = dict.fromkeys(places, end)
    found = client._fetcher.offsets_by_times(asked, int(REQUEST_TIMEOUT_S * 1000))
    return {place: each.offset for place, each in found.items() if each is not None}


def position_of(client: KafkaConsumer, place: TopicPartition) -> int | None:
    """The offset that is read next: past control records too, which are counted and never given.

    None before the first seek. Asks no broker, where kafka-python's own would wait for one.
    """
    state = client._subscription.assignment.get(place)
    return state.position.offset if state and state.position else None


def no_leader(topic: str, partitions: Iterable[int]) -> ServiceUnavailable:
    """For those that bounds_of() leaves out."""
    numbers = ", ".join(map(str, sorted(partitions)))
    return ServiceUnavailable(
        f"Kafka has no leader for partition {numbers} of {topic}, whose frames wait: start the "
        "broker that is down"
    )


def behind(begin: int, end: int, stored: int | None) -> int:
    """Frames of a partition that wait for their result; those that retention removed do not.

    stored: the next offset, None before the first result: then all that Kafka holds waits. So it
    does where `stored` lies beyond the end, and is of another topic.
    """
    if stored is None or stored > end:
        stored = begin
    return end - max(begin, stored)


def topic_id(client: KafkaConsumer, topic: str) -> str:
    """Which topic bears this name now: one that is made anew has another id.

    Asked of a broker: what the client knows may be older than the topic. "" where there is none
    such, or Kafka is too old to say (before 2.8).
    """
    (found,) = client._manager.run(_described, client._manager, topic).topics
    known = not found.error_code and found.topic_id and found.topic_id.int
    return str(found.topic_id) if known else ""


async def _described(manager: KafkaConnectionManager, topic: str) -> Any:
    asked = MetadataRequest.MetadataRequestTopic(name=topic)
    return await manager.send(MetadataRequest(topics=[asked], allow_auto_topic_creation=False))


def end_offsets(settings: Settings, topic: str) -> dict[int, int]:
    """Partition -> the offset that the next record will get."""
    consumer = make_consumer(settings)
    try:
        with kafka_errors(settings.kafka):
            places = partitions_of(consumer, topic)
            found = _led(consumer, places, OffsetSpec.LATEST)
        if leaderless := {place.partition for place in places if place not in found}:
            raise no_leader(topic, leaderless)
        return {place.partition: found[place] for place in places}
    finally:
        consumer.close()


@contextmanager
def kafka_errors(kafka: KafkaSettings) -> Iterator[None]:
    """Turn kafka-python's errors into ours, for any call on a client."""
    try:
        yield
    except ke.KafkaError as error:
        raise _translated(error, kafka) from error


def _translated(error: Exception, kafka: KafkaSettings, detail: str = "") -> DpdlError:
    where = f"Kafka at {kafka.bootstrap}"
    if isinstance(error, _AUTH_ERRORS):
        user = kafka.sasl_username or "anonymous"
        return AuthFailed(
            f"{where} refused user {user} ({detail or error}): check kafka.sasl_username, "
            "kafka.sasl_password and the user's ACLs"
        )
    if isinstance(error, SIZE_ERRORS):
        return DataError(f"{where} refused a record as too large: {error}")
    if isinstance(error, ke.InvalidTimestampError):
        return DataError(
            f"{where} refused a record for its time: set this machine's clock, or give the topic "
            f"{'='.join(_BY_ARRIVAL)}"
        )
    if isinstance(error, ke.BrokerResponseError):
        return ServiceUnavailable(f"{where} refused ({detail or error}): its log says more")
    return ServiceUnavailable(
        f"{where} did not answer ({detail or error}): check that it runs (`dpdl status`), "
        "kafka.bootstrap and kafka.security_protocol"
    )


class _AnyNames(bytearray):
    """A batch whose headers' names may be any bytes; what is not UTF-8 becomes U+FFFD."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _AnyNames(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "replace")


def _read_any(batch: Any) -> Any:
    """kafka-python 3.0.12 cannot pass a record with such a name: one would end the stream."""
    try:
        return _read_strictly(batch)
    except UnicodeDecodeError:
        batch._buffer = _AnyNames(batch._buffer)  # its position has not moved
        return _read_strictly(batch)


_read_strictly = DefaultRecordBatch._read_msg
DefaultRecordBatch._read_msg = _read_any


def _classify(
    manager: TransactionManager, error: Any, batch: Any, log_start_offset: int = -1
) -> str:
    """kafka-python 3.0.12 makes an idempotent producer fatal after one refused batch.

    Only because the batch's sequence numbers are lost with it. They are free again, and an
    idempotent producer sends no other batch of the partition meanwhile: the next one takes them.
    """
    if type(error) in _REFUSALS and manager.producer_id_and_epoch.match(batch):
        manager.set_sequence_number(batch.topic_partition, batch.base_sequence)
        return str(manager.ERROR_CLASS_RETRIABLE)  # to the sender: fail this batch and go on
    return str(_classify_strictly(manager, error, batch, log_start_offset))


_classify_strictly = TransactionManager.classify_batch_error
TransactionManager.classify_batch_error = _classify


class _Hidden(str):
    """A password as kafka-python wants it; it logs its whole configuration at debug level."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def _security(kafka: KafkaSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"security_protocol": kafka.security_protocol}
    if kafka.sasl_password and kafka.security_protocol.startswith("SASL"):
        config |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": _Hidden(kafka.sasl_password.get_secret_value()),
        }
    if kafka.security_protocol.endswith("SSL"):
        for field in ("tls_ca", "tls_cert", "tls_key"):
            path = getattr(kafka, field)
            if path and not path.is_file():
                raise SettingsError(f"kafka.{field}={path}: no such file")
        config |= {
            "ssl_check_hostname": kafka.tls_check_hostname,
            "ssl_cafile": str(kafka.tls_ca) if kafka.tls_ca else None,
            "ssl_certfile": str(kafka.tls_cert) if kafka.tls_cert else None,
            "ssl_keyfile": str(kafka.tls_key) if kafka.tls_key else None,
        }
    return config


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    """Remembers why the first connection failed, and hears a broker's last words.

    kafka-python 3.0.12 only logs the first, and reports a wrong password as a timeout. It also
    drops what arrives together with the end of a connection, and a refused login is just that.
    """

    failure: Exception | None = None

    async def _build_transport(self, node: Any, **options: Any) -> Any:
        transport = await super()._build_transport(node, **options)
        receive = transport._sock_recv

        def receive_all() -> tuple[bytes, Exception | None]:
            data, error = receive()
            return data, None if data else error  # the end is still there at the next read

        transport._sock_recv = receive_all
        return transport

    def get_connection(self, node_id: Any, **options: Any) -> Any:
        # Before the first metadata only: later, a broker that restarts may be not ready to
        # authenticate for a moment, and the client goes on by itself.
        if isinstance(self.failure, _AUTH_ERRORS) and not self.cluster.brokers():
            raise self.failure
        connection = super().get_connection(node_id, **options)
        connection.init_future.add_errback(self._remember)
        return connection

    def _remember(self, error: Exception) -> None:
        self.failure = error


class _Client(KafkaNetClient):  # type: ignore[misc]
    def __init__(self, **config: Any) -> None:
        net = NetworkSelector(**config)
        super().__init__(net=net, manager=_Manager(net, **config))

    def abandon(self) -> Exception | None:
        """Close after a failed bootstrap: kafka-python leaves its I/O thread running."""
        self.close()
        self._net.stop(timeout_ms=2000)
        failure: Exception | None = self._manager.failure
        return failure


def _build(make: Callable[..., Any], settings: Settings, **config: Any) -> Any:
    kafka = settings.kafka
    if not kafka.bootstrap:
        raise settings.unknown("Kafka", "DPDL_KAFKA_BOOTSTRAP=HOST:PORT")
    clients: list[_Client] = []

    def client(**options: Any) -> _Client:
        clients.append(_Client(**options))
        return clients[-1]

    try:
        return make(
            bootstrap_servers=[address.strip() for address in kafka.bootstrap.split(",")],
            kafka_client=client,
            bootstrap_timeout_ms=int(BOOTSTRAP_TIMEOUT_S * 1000),
            request_timeout_ms=int(REQUEST_TIMEOUT_S * 1000),
            reconnect_backoff_max_ms=1000,  # the default of 30 s outlasts a broker's restart
            **_security(kafka),
            **config,
        )
    except (ke.KafkaError, OSError, ValueError) as error:
        failures = [client.abandon() for client in clients]
        cause = next((failure for failure in failures if failure is not None), None)
        if isinstance(error, (OSError, ValueError)) and cause is None:
            raise SettingsError(f"Kafka client for {kafka.bootstrap}: {error}") from error
        seen = cause or error
        raise _translated(seen, kafka, detail=str(seen) or type(seen).__name__) from error
