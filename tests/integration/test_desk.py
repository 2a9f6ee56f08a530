"""Which picture of a frame the console shows and teaches, on real Kafka and S3."""

import pytest

from infra.errors import NotFound
from infra.kafka_client import ensure_topics, make_producer
from infra.messages import evidence_key
from infra.s3_client import ensure_buckets
from serving.archive import FRAME, EvidenceBucket
from serving.console.desk import Desk

pytestmark = pytest.mark.integration


def test_evidence_of_a_topic_that_was_made_anew_is_not_taken_for_a_frame_of_the_new_one(settings):
    ensure_topics(settings)
    ensure_buckets(settings)
    topic, frame = settings.kafka.topic, f"{settings.kafka.topic}/0/0"
    before = f"{topic}/00000/00000000000000000000"  # as keys were before they had a time
    for key in (before, evidence_key(frame, 1)):
        EvidenceBucket(settings).put(f"{key}/{FRAME}", b"of the old topic", "image/png")
    producer = make_producer(settings)
    producer.send(topic, key=b"cam", value=b"of the new one", partition=0).get(timeout=30)
    producer.close()
    desk = Desk(settings, "default")
    assert desk.image(frame) == b"of the new one"
    for key in (before, evidence_key(frame, 1)):
        assert desk.image(frame, key) == b"of the old topic"  # an alert's own
    # An alert whose evidence is still owed.
    other = f"{topic}/1/0"
    with pytest.raises(NotFound):
        desk.image(other, evidence_key(other, 1))
