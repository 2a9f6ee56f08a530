"""Which picture of a frame the console shows and teaches, and whom, on real Kafka and S3."""

from dataclasses import replace

import pytest
from results import result

from infra.errors import DataError, NotFound
from infra.kafka_client import ensure_topics, make_producer
from infra.messages import evidence_key, frame_headers
from infra.model_store import ModelStore
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
    headers = frame_headers(2, "image/png")
    for image in (b"of the new one", b""):
        sent = producer.send(topic, key=b"cam", value=image, headers=headers, partition=0)
        sent.get(timeout=30)
    producer.close()
    desk = Desk(settings, "default")
    assert desk.image(frame) == desk.image(frame, 2) == b"of the new one"
    with pytest.raises(NotFound, match="no longer in Kafka"):
        desk.image(frame, 1)  # the old one's result, which was no anomaly
    with pytest.raises(NotFound, match="no longer in Kafka"):
        desk.image(f"{topic}/0/1")  # no frame
    for key in (before, evidence_key(frame, 1)):
        assert desk.image(frame, 1, key) == b"of the old topic"  # an alert's own
    # An alert whose evidence is still owed.
    other = f"{topic}/1/0"
    with pytest.raises(NotFound):
        desk.image(other, 1, evidence_key(other, 1))


@pytest.mark.parametrize(
    ("scored_by", "bound", "taught"),
    [
        ("plates", None, "plates-data"),
        ("welds", "welds", "welds-data"),
        ("plates", "plates", "plates-data"),
        ("plates", "welds", None),  # welds was in trouble, or bound later
        ("welds", None, None),  # bound no more
    ],
)
def test_an_answer_teaches_the_model_that_is_to_score_the_camera_or_nobody(
    settings, scored_by, bound, taught
):
    ensure_buckets(settings)
    store = ModelStore(settings)
    for model in ("plates", "welds"):
        manifest = {"kind": "train", "data": {"dataset": f"{model}-data"}}
        store.put_version(model, "v-1", {"config.json": b"{}"}, manifest)
    frame = replace(result(3, anomaly=True), model=scored_by)
    EvidenceBucket(settings).put(f"{frame.evidence_key}/{FRAME}", b"as it came", "image/png")
    desk = Desk(settings, "plates")
    words = {"defect": "", "by": "Ann", "bound": bound}
    if taught is None:
        with pytest.raises(DataError, match=f"model {bound or 'plates'} is to score camera cam-1"):
            desk.answer(frame, "false-alarm", **words)
        assert desk.answers_of([frame]) == {}
        assert desk.answer(frame, "unsure", **words).dataset == ""
    else:
        assert desk.answer(frame, "false-alarm", **words).dataset == taught
