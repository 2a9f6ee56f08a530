"""Which picture of a frame the console shows and teaches, and whom, on real Kafka and S3."""

import io
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from results import result

from infra.errors import DataError, NotFound
from infra.kafka_client import ensure_topics, make_producer
from infra.messages import evidence_key, frame_headers
from infra.model_store import ModelStore
from infra.s3_client import ensure_buckets, make_minio
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


@pytest.fixture
def desk(settings):
    """Of the model plates, whose v-1 names its data set."""
    ensure_buckets(settings)
    manifest = {"kind": "train", "data": {"dataset": "plates-data"}}
    ModelStore(settings).put_version("plates", "v-1", {"config.json": b"{}"}, manifest)
    return Desk(settings, "plates")


def seen(settings, version="v-1"):
    """An alert with its evidence."""
    frame = replace(result(3, anomaly=True), model="plates", version=version)
    EvidenceBucket(settings).put(f"{frame.evidence_key}/{FRAME}", b"as it came", "image/png")
    return frame


def test_what_somebody_else_has_answered_meanwhile_is_not_replaced_unseen(settings, desk):
    frame, words = seen(settings), {"defect": "", "bound": None}
    first = desk.answer(frame, "unsure", by="Ann", expected=0, **words)
    assert desk.answer(frame, "unsure", by="Ann", expected=0, **words) == first  # sent twice
    with pytest.raises(DataError, match="Ann says unsure: look again"):
        desk.answer(frame, "false-alarm", by="Ben", expected=0, **words)
    with pytest.raises(DataError, match="Ann says unsure: look again"):
        desk.undo(frame, expected=0)
    assert desk.answers_of([frame]) == {frame.frame_id: first}
    second = desk.answer(frame, "false-alarm", by="Ben", expected=first.at_ns / 1e6, **words)
    assert desk.answer(frame, "unsure", by="Ann", **words).by == "Ann"  # who does not say
    desk.undo(frame)
    with pytest.raises(DataError, match="there is none: look again"):
        desk.answer(frame, "unsure", by="Ben", expected=second.at_ns / 1e6, **words)


def test_an_alert_of_a_version_that_was_pruned_teaches_its_model(settings, desk):
    store, frame = ModelStore(settings), seen(settings, "v-0")
    words = {"defect": "", "by": "Ann", "bound": None}
    with pytest.raises(NotFound, match="no version 'v-0'"):
        desk.answer(frame, "false-alarm", **words)
    store.move_pointer("plates", "v-1", None, by="test", why="")
    assert desk.answer(frame, "false-alarm", **words).dataset == "plates-data"


def test_a_version_whose_manifest_is_broken_says_when_and_why(settings, desk):
    key = "plates/versions/v-2/manifest.json"
    make_minio(settings).put_object(settings.s3.models_bucket, key, io.BytesIO(b"{"), 1)
    found = {each.version: each for each in desk.versions("plates", 10, 0).versions}
    assert {name: each.kind for name, each in found.items()} == {"v-1": "train", "v-2": "broken"}
    assert datetime.fromisoformat(found["v-2"].created_at) <= datetime.now(UTC)
    assert "no JSON" in found["v-2"].why
