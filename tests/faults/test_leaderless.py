"""A partition whose only broker is down, on three real brokers: the others are read on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import yaml
from kafka.errors import KafkaError

sys.path.insert(0, str(Path(__file__).parent))
from nodes import KafkaCluster

from infra.embedded.files import write_private
from infra.errors import DpdlError
from infra.kafka_client import (
    bounds_of,
    ensure_topics,
    make_admin,
    make_consumer,
    make_producer,
    partitions_of,
)
from infra.settings import Settings, load_settings
from serving.source import KafkaSource

pytestmark = pytest.mark.integration


class Offsets:
    """What Redis says to a group that begins."""

    def next_offset(self, group: str, topic: str, partition: int) -> None:
        return None

    def set_start(self, group: str, topic: str, partition: int, offset: int) -> int:
        return offset

    def set_topic_id(self, group: str, topic: str, topic_id: str) -> str:
        return topic_id

    def take_back(self, *asked: object) -> None:
        raise AssertionError("nothing is stored that Kafka could have lost")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(tmp_path_factory.mktemp("brokers")) as running:
        yield running


@pytest.fixture
def settings(cluster: KafkaCluster, tmp_path: Path) -> Settings:
    """A topic whose partitions have one broker each."""
    kafka = cluster.settings() | {"replication": 1, "partitions": 6}
    write_private(tmp_path / "dpdl.yaml", yaml.safe_dump({"kafka": kafka}))
    found = load_settings(
        {"DPDL_CONFIG": str(tmp_path / "dpdl.yaml"), "DPDL_STATE_DIR": str(tmp_path)}
    )
    ensure_topics(found)
    return found


def led_by(settings: Settings, node: int) -> set[int]:
    with closing(make_admin(settings)) as admin:
        (topic,) = admin.describe_topics([settings.kafka.topic])
    return {p["partition_index"] for p in topic["partitions"] if p["leader_id"] == node}


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(KafkaError, DpdlError):  # an admin client may ask the broker that is down
            if done():
                return
    pytest.fail("not within a minute")


def test_one_partition_without_a_leader_keeps_no_other_from_being_read(
    cluster: KafkaCluster, settings: Settings
) -> None:
    numbers = set(range(settings.kafka.partitions))
    with closing(make_producer(settings)) as producer:
        for number in numbers:
            producer.send(settings.kafka.topic, b"x", key=b"cam", partition=number).get(30)
    victim = next(n for n in cluster.nodes if led_by(settings, n))
    lost = led_by(settings, victim)
    cluster.nodes[victim].kill()
    until(lambda: not led_by(settings, victim))  # the controller has noticed
    with closing(make_consumer(settings)) as consumer:
        places = partitions_of(consumer, settings.kafka.topic)
        assert bounds_of(consumer, places) == dict.fromkeys(numbers - lost, (0, 1))

    source = KafkaSource(make_consumer(settings, group="dpdl"), Offsets(), settings)
    try:
        read: set[int] = set()

        def poll() -> set[int]:
            polled = source.poll(lambda: False)
            if polled:
                read.update(record.partition for record in polled.records)
            return read

        until(lambda: poll() == numbers - lost)
        assert f"no leader for partition {', '.join(map(str, sorted(lost)))} " in source.trouble
        began_s = time.monotonic()
        source.poll(lambda: False)
        assert time.monotonic() - began_s < 5  # it waits for none
        cluster.nodes[victim].start()
        until(lambda: poll() == numbers)
        source.poll(lambda: False)
        assert source.trouble == ""
    finally:
        source.close(2)
