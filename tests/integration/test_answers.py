"""What an answer leaves in S3 and Redis, and that undo leaves nothing."""

from __future__ import annotations

import hashlib
import io
import json

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from infra import answers
from infra.answers import Answers, is_answer
from infra.errors import DataError
from infra.messages import FrameResult
from infra.redis_connection import make_redis
from infra.s3_client import ensure_buckets, get, make_minio
from pipelines import datasets
from pipelines.dataset_index import (
    SCHEMA,
    check_snapshot,
    incoming,
    index_of_run,
    load_index,
    snapshot,
)
from pipelines.people import data_of_training
from pipelines.sources import read_here, row_groups

pytestmark = pytest.mark.integration


def result(offset=7, captured_at_ns=123):
    return FrameResult(
        frame_id=f"frames/0/{offset}", camera="cam/ä", captured_at_ns=captured_at_ns,
        scored_at_ns=1, score=2.0, threshold=1.0, energy=0.0, is_anomaly=True, model="m",
        version="v", evidence_key="",
    )  # fmt: skip


@pytest.fixture
def store(settings):
    ensure_buckets(settings)
    return Answers(settings)


@pytest.fixture
def stored(settings):
    """Object name -> ETag, of the data bucket."""
    client, bucket = make_minio(settings), settings.s3.data_bucket

    def look():
        return {o.object_name: o.etag for o in client.list_objects(bucket, recursive=True)}

    return look


def give(store, kind, *, defect="", by="ann", of=None, dataset="valves"):
    of = of or result()
    return store.give(of, kind, defect=defect, by=by, dataset=dataset, image=b"bytes")


def test_a_false_alarm_is_a_new_normal_with_who_and_when(settings, store, stored):
    given = give(store, "false-alarm")
    assert list(stored()) == [given.key]
    assert given.key.startswith("valves/incoming/answer-")
    assert is_answer(given.key)
    data, _ = get(make_minio(settings), settings.s3.data_bucket, given.key)
    table = pq.read_table(io.BytesIO(data))
    assert table.schema == answers.SCHEMA
    (row,) = table.to_pylist()
    assert (row["image"], row["label"], row["defect"]) == (b"bytes", 0, "")
    assert (row["camera"], row["answered_by"]) == ("cam/ä", "ann")
    assert table["answered_at"].cast("int64").to_pylist() == [given.at_ns]
    assert table["captured_at"].cast("int64").to_pylist() == [123]


def test_the_same_answer_again_changes_nothing(store, stored):
    first = give(store, "false-alarm")
    before = stored()
    assert give(store, "false-alarm", by="bob") == first
    assert stored() == before


def test_another_answer_takes_the_place_of_the_first(store, stored):
    give(store, "false-alarm")
    given = give(store, "defect", defect="crack")
    assert list(stored()) == [given.key]
    assert given.key.startswith("valves/anomalies/answer-")
    renamed = give(store, "defect", defect="scratch")
    assert list(stored()) == [given.key]
    assert store.of([result()]) == {"frames/0/7": renamed}
    assert store.classes() == ["scratch", "crack"]
    give(store, "unsure", dataset="")
    assert stored() == {}
    assert store.of([result()])["frames/0/7"].kind == "unsure"


@pytest.mark.parametrize("kind", ["false-alarm", "defect", "unsure"])
def test_undo_leaves_nothing(settings, store, stored, kind):
    given = give(store, kind, defect="crack" if kind == "defect" else "")
    assert store.undo(result()) == given
    assert stored() == {}
    assert store.of([result()]) == {}
    assert store.undo(result()) is None


def test_after_a_crash_between_s3_and_redis_the_answer_is_given_again(settings, store, stored):
    give(store, "false-alarm")
    make_redis(settings).delete(f"{settings.redis.prefix}:answer:frames/0/7")
    assert store.of([result()]) == {}
    given = give(store, "false-alarm", by="bob")
    assert list(stored()) == [given.key]
    assert store.undo(result()) == given
    assert stored() == {}


def test_an_answer_is_of_one_frame_also_when_a_topic_is_made_anew(store, stored):
    """Offsets begin at 0 again then."""
    give(store, "false-alarm", of=result(captured_at_ns=1))
    again = result(captured_at_ns=2)
    assert store.of([again]) == {}
    give(store, "false-alarm", of=again)
    assert len(stored()) == 2


def test_answers_are_looked_up_for_a_page_and_expire_with_the_evidence(settings, store):
    give(store, "unsure", of=result(1))
    give(store, "unsure", of=result(3))
    assert set(store.of([result(i) for i in range(5)])) == {"frames/0/1", "frames/0/3"}
    assert store.of([]) == {}
    left = make_redis(settings).ttl(f"{settings.redis.prefix}:answer:frames/0/1")
    assert left == pytest.approx(settings.stream.evidence_days * 86_400, abs=60)


def test_of_a_newer_versions_answers_what_we_know_is_read_and_none_hides_another(
    settings, store, stored
):
    """The application was rolled back, and finds what the newer one wrote meanwhile."""
    given = [give(store, "false-alarm", of=result(i)) for i in range(3)]
    redis, key = make_redis(settings), f"{settings.redis.prefix}:answer:frames/0/"
    redis.set(f"{key}0", json.dumps(json.loads(redis.get(f"{key}0")) | {"reviewed_by": "bo"}))
    redis.set(f"{key}1", '{"verdict": "defect"}')
    assert store.of([result(i) for i in range(3)]) == {a.frame_id: a for a in given[::2]}
    give(store, "defect", of=result(1), defect="dent")  # which mends it
    assert len(store.of([result(i) for i in range(3)])) == 3


@pytest.fixture
def valves(settings, store, tmp_path):
    """A small data set's index, as imported from tmp_path."""
    for name, label in (("normal", 0), ("anomaly/dent", 1)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.full((32, 32, 3), 100 * label + 10 * i, np.uint8)
            cv2.imwrite(str(folder / f"{i}.png"), pixels)
    datasets.import_dataset(settings, tmp_path, "valves", shots=2)
    return load_index(settings, "valves")


@pytest.fixture
def image():
    return cv2.imencode(".png", np.full((32, 32, 3), 200, np.uint8))[1].tobytes()


@pytest.fixture
def give_image(store, image):
    def give_it(offset, kind, defect=""):
        return store.give(
            result(offset), kind, defect=defect, by="ann", dataset="valves", image=image
        )

    return give_it


def test_the_next_training_and_refresh_see_answers_and_their_undoing(
    settings, store, valves, image, give_image, tmp_path
):
    """A confirmed defect is one of the training split, a false alarm one of the new normals."""
    given = give_image(1, "defect", "crack")
    index = load_index(settings, "valves")
    assert index.keys("train", 1) == [*valves.keys("train", 1), given.key]
    assert index.keys("train", 0) == valves.keys("train", 0)
    assert snapshot(index)["objects"][given.key]
    check_snapshot(settings, index)
    (group,) = row_groups(settings, [given.key])
    (read,) = read_here(settings, [group], 32)()
    assert (read.rows[0].defect, read.rows[0].label) == ("crack", 1)
    assert read.rows[0].digest == hashlib.sha256(image).hexdigest()
    assert (read.images == 200).all()

    alarm = give_image(2, "false-alarm")
    assert [o.key for o in incoming(settings, "valves")] == [alarm.key]
    datasets.import_dataset(settings, tmp_path, "valves", shots=2)  # again: answers stay
    assert load_index(settings, "valves") == index
    store.undo(result(1))
    store.undo(result(2))
    assert load_index(settings, "valves") == valves
    assert incoming(settings, "valves") == []


def test_a_run_keeps_the_answers_that_it_began_with(
    settings, store, valves, image, give_image, tmp_path
):
    """Whatever people say later: one is taken back, one becomes another, one is given anew."""
    cracks = [give_image(i, "defect", "crack") for i in range(3)]
    alarms = [give_image(i, "false-alarm") for i in (10, 11)]
    began = data_of_training(settings, load_index(settings, "valves"))
    for offset in (0, 2, 10):
        store.undo(result(offset))
    give_image(1, "false-alarm")
    give_image(2, "defect", "scratch")
    give_image(11, "defect", "dent")
    give_image(20, "defect", "dent")

    index = index_of_run(settings, began)
    keys = sorted(each.key for each in cracks)
    assert index.keys("train", 1) == [*valves.keys("train", 1), *keys]
    assert snapshot(index)["objects"] == began["objects"]
    groups = row_groups(settings, [*keys, *began["incoming"]])
    rows = [row for piece in read_here(settings, groups, 32)() for row in piece.rows]
    assert [row.label for row in rows] == [1, 1, 1, 0, 0]
    assert {row.digest for row in rows} == {hashlib.sha256(image).hexdigest()}
    assert set(began["incoming"]) == {each.key for each in alarms}

    cv2.imwrite(str(tmp_path / "normal" / "9.png"), np.full((32, 32, 3), 250, np.uint8))
    datasets.import_dataset(settings, tmp_path, "valves", shots=2)
    with pytest.raises(DataError, match="imported anew"):
        index_of_run(settings, began)


def test_an_answer_has_the_columns_of_a_data_set():
    """serving/ writes what pipelines/ reads; neither imports the other."""
    assert set(SCHEMA) <= set(answers.SCHEMA)
