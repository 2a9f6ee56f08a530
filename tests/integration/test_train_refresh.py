"""Refreshes that die, race and are poisoned, on a real S3. Training is in test_train.py.

The images are 64 px noise plates, defects carry a bright square, so that the right verdict is
known. Refresh needs no Ray: its tests start from a version that was fitted once, in this process.
"""

import hashlib
import io
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from dpdl_core import artifact
from dpdl_core.config import override, recipe
from dpdl_core.fit import fit
from infra import decisions
from infra.answers import Answers
from infra.errors import DataError, PointerConflict
from infra.messages import FrameResult
from infra.model_store import ModelStore
from infra.s3_client import make_minio
from pipelines import candidate, promotion, refresh_loop
from pipelines.dataset_index import SCHEMA, incoming, load_index, snapshot
from pipelines.datasets import NewImage, import_dataset, put_incoming
from pipelines.held_out import MOMENT_S, HeldOut, images, is_held_out, usable
from pipelines.promotion import RACES, consider, consider_training, load, who
from pipelines.refresh import RefreshOptions, refresh_once
from pipelines.refresh_loop import refresh_every
from pipelines.registry import Registry
from pipelines.scoring import calibrate, observe
from pipelines.sources import RowRef, described, stack
from pipelines.train_keeper import WorkerKeeper

pytestmark = pytest.mark.integration

SMALL = {
    "image_size": "64",
    "pooled_spaces": "7",
    "patch_spaces": "5+7",
    "patch_prototypes": "16",
    "patch_side": "4",
    "pseudo_normals": "16",
    "folds": "2",
}
RATE = 0.1
OPTIONS = RefreshOptions(model_name="plates", min_new=8)


def plate(seed, *, spot=False, light=0):
    """A 64 x 64 PNG of grey noise; with a bright square where it is a defect."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(110 + light, 12, (64, 64))
    if spot:
        x, y = rng.integers(4, 40, 2)
        pixels[y : y + 20, x : x + 20] = 250
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def new_plates(count, first=5000, **kinds):
    return [NewImage(plate(first + i, **kinds), "cam-1") for i in range(count)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "plates"
    for kind, count, spot in (("normal", 80, False), ("anomaly/spot", 16, True)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            (root / kind / f"{i:03}.png").write_bytes(plate(i + 1000 * spot, spot=spot))
    return root


@pytest.fixture
def dataset(settings, folder):
    import_dataset(settings, folder, "plates", shots=6, calibration_share=0.4)
    return load_index(settings, "plates")


@pytest.fixture(scope="session")
def fitted():
    """Files of a version, filled by the first test that needs it: the data is the same in each."""
    return {}


@pytest.fixture
def deployed(settings, dataset, fitted):
    """A current version of model "plates", fitted on the data set without Ray."""
    if not fitted:
        config = override(recipe("edge"), SMALL)
        normals = images(settings, dataset.keys("train", 0), 64)
        defects = stack(images(settings, dataset.keys("train", 1), 64))
        model = fit(config, normals, defects, seed=0)
        held_out = images(settings, dataset.keys("calibration"), 64)
        thresholds, _ = calibrate(observe(model, held_out).score, [""] * held_out.num_images, RATE)
        fitted.update(artifact.pack(model, thresholds=thresholds, metrics={}))
    manifest = {
        "kind": "train",
        "created_at": "2026-01-01T00:00:00+00:00",
        "parent": None,
        "line": [],
        "data": snapshot(dataset),
        "false_alarm_rate": RATE,
        "auroc": None,
    }
    store = ModelStore(settings)
    store.put_version("plates", "train-0", fitted, manifest)
    store.move_pointer("plates", "train-0", None, by="test", why="the first version")
    return store


def refreshes(store):
    return [v for v in store.list_versions("plates") if v.startswith("refresh-")]


def shown(monkeypatch, *version):
    """What `dpdl models show` and `list` print."""
    monkeypatch.setenv("COLUMNS", "200")
    runner, commands = CliRunner(), (["show", *version], ["list"])
    found = [runner.invoke(app, ["models", *a, "--model", "plates"]) for a in commands]
    assert [done.exit_code for done in found] == [0, 0]
    return found[0].output + found[1].output


@pytest.mark.storage
def test_a_refresh_renews_calibrates_by_camera_and_moves_the_pointer(
    settings, deployed, monkeypatch
):
    put_incoming(settings, "plates", new_plates(100))
    report = refresh_once(settings, OPTIONS)
    assert (report.decision, report.from_version) == ("promoted", "train-0"), report.why
    pointer = deployed.current("plates")
    assert (pointer.version, pointer.previous) == (report.to_version, "train-0")
    assert pointer.why == report.why
    assert report.new_normals == 100
    assert report.reasons
    found = report.prototypes
    assert found["kept"] + found["replaced"] == found["total"] == 16
    assert not report.relearnt  # more of the same is no shift
    loaded = load(deployed, "plates", report.to_version)
    assert loaded.thresholds == report.thresholds_after
    assert loaded.thresholds["false_alarm_rate"] == RATE
    assert set(loaded.thresholds["cameras"]) == {"cam-1"}
    told = shown(monkeypatch)
    for words in ("promoted", "AUROC on known defects", "false_alarms_new_candidate", "cam-1"):
        assert words in told
    assert f"by {who()}" in told
    held_out = loaded.thresholds["calibration_normals"]
    assert sum(loaded.metrics["drift"]["default"]["energy"]) == held_out > 40
    assert refresh_once(settings, OPTIONS).decision == "none"


def test_few_new_images_wait_for_company(settings, deployed):
    put_incoming(settings, "plates", new_plates(5))
    assert refresh_once(settings, OPTIONS).why == "5 new images, 8 are awaited"
    put_incoming(settings, "plates", new_plates(5, first=6000))
    assert refresh_once(settings, OPTIONS).new_normals == 10


def answer(settings, offset, kind, image):
    """What the console does for a person."""
    frame = FrameResult(
        frame_id=f"frames/0/{offset}", camera="cam-1", scored_at_ns=1,
        captured_at_ns=(1 + offset) * MOMENT_S * 10**9,
        score=9.0, threshold=1.0, energy=0.0, is_anomaly=True, model="plates", version="train-0",
        evidence_key="",
    )  # fmt: skip
    people = Answers(settings)
    if kind == "undo":
        return people.undo(frame)
    defect = "spot" if kind == "defect" else ""
    return people.give(frame, kind, defect=defect, by="ann", dataset="plates", image=image)


def test_answers_are_learnt_past_the_sieve_and_forgotten_when_taken_back(settings, deployed):
    """Spots on a plate look like defects to the model; of half of them a person says otherwise."""
    spots = [plate(9000 + i, spot=True) for i in range(12)]
    put_incoming(settings, "plates", [*new_plates(40), *(NewImage(s, "cam-1") for s in spots)])
    first = refresh_once(settings, OPTIONS)
    data = deployed.manifest("plates", first.to_version)["data"]
    digests = [hashlib.sha256(spot).hexdigest() for spot in spots]
    assert first.set_aside == 12
    assert set(digests) <= set(data["set_aside"])

    alarms = [answer(settings, i, "false-alarm", spot) for i, spot in enumerate(spots[:8])]
    options = replace(OPTIONS, min_new=1)
    second = candidate_of(settings, deployed, refresh_once(settings, options))
    assert set(second["data"]["new"]) == {alarm.key for alarm in alarms}
    assert (second["new_normals"], second["new_set_aside"]) == (8, 0)

    answer(settings, 0, "undo", b"")
    answer(settings, 20, "defect", spots[8])
    third = candidate_of(settings, deployed, refresh_once(settings, options))
    (defect,) = third["data"]["new_defects"]
    assert "/anomalies/" in defect
    assert third["data"]["confirmed"] == [digests[8]]
    assert alarms[0].key not in third["data"]["incoming"]
    assert not usable(third["data"])(RowRef("k", 0, digests[8], 0, "", "", ""))
    assert refresh_once(settings, options).decision == "none"


@pytest.mark.parametrize("held_out", [True, False])
def test_all_new_normals_may_be_of_one_moment(settings, deployed, held_out):
    moments = (minute * MOMENT_S * 10**9 for minute in itertools.count(1))
    at = next(
        m for m in moments if is_held_out(RowRef("", 0, "", 0, "", "cam-1", "", m)) == held_out
    )
    new = [replace(each, captured_at_ns=at + i) for i, each in enumerate(new_plates(20))]
    put_incoming(settings, "plates", new)
    report = refresh_once(settings, OPTIONS)
    manifest = deployed.manifest("plates", report.to_version)
    assert manifest["renewal"]["new_normals"] == (0 if held_out else 20)
    assert manifest["new_normals"] == 20


def candidate_of(settings, store, report):
    """Its manifest; promoted whatever the gate said of so small a model."""
    if report.decision == "held":
        Registry(settings, "plates").promote(report.to_version, "for the test")
    return store.manifest("plates", report.to_version)


class Killed(BaseException):
    """What a test raises where a process would be killed; nothing catches it."""


STEPS = {
    "before the version": ("store", "put_version", "before"),
    "half way through the version": ("store", "_put_file", "after"),
    "after the version": ("store", "put_version", "after"),
    "before the pointer": ("store", "move_pointer", "before"),
    "after the pointer": ("store", "move_pointer", "after"),
    "after the record": ("decisions", "record", "after"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_refresh_killed_at_any_step_and_run_again_is_one_version_and_one_decision(
    settings, deployed, monkeypatch, step
):
    put_incoming(settings, "plates", new_plates(20))
    where, name, when = STEPS[step]
    owner = ModelStore if where == "store" else decisions
    real = getattr(owner, name)

    def killed(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Killed(step)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            refresh_once(settings, OPTIONS)
    refresh_once(settings, OPTIONS)
    assert refresh_once(settings, OPTIONS).decision == "none"
    (version,) = refreshes(deployed)
    assert deployed.current("plates").version == version
    assert [m.version for m in deployed.current("plates").moves] == ["train-0", version]
    assert [d.candidate for d in decisions.recorded(settings, "plates")] == [version]
    load(deployed, "plates", version)


def test_what_was_promoted_and_taken_back_before_its_record_is_not_called_promoted(
    settings, deployed, monkeypatch
):
    put_incoming(settings, "plates", new_plates(20))

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "record", killed)
        with pytest.raises(Killed):
            refresh_once(settings, OPTIONS)
    Registry(settings, "plates").rollback("looks wrong")
    report = refresh_once(settings, OPTIONS)
    (version,) = refreshes(deployed)
    assert report.decision == "none"
    assert report.why == f"{version} was promoted, and train-0 is current since"
    assert refresh_once(settings, OPTIONS).why == "0 new images, 8 are awaited"


@pytest.mark.storage
def test_two_refreshes_of_the_same_inputs_at_once_are_one(settings, deployed):
    put_incoming(settings, "plates", new_plates(20))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: refresh_once(settings, OPTIONS), range(2)))
    assert {report.decision for report in reports} <= {"promoted", "none"}
    assert len(refreshes(deployed)) == 1
    assert len(deployed.current("plates").moves) == 2


@pytest.mark.storage
def test_of_two_refreshes_with_different_inputs_one_wins_and_the_other_looks_again(
    settings, deployed, monkeypatch
):
    put_incoming(settings, "plates", new_plates(20))
    real = ModelStore.move_pointer

    def another_is_quicker(self, *args, **kwargs):
        monkeypatch.setattr(ModelStore, "move_pointer", real)
        put_incoming(settings, "plates", new_plates(20, first=7000))
        assert refresh_once(settings, OPTIONS).decision == "promoted"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ModelStore, "move_pointer", another_is_quicker)
    with pytest.raises(PointerConflict):
        refresh_once(settings, OPTIONS)
    moves = deployed.current("plates").moves
    assert len(moves) == 2
    used = deployed.manifest("plates", moves[-1].version)["data"]["incoming"]
    assert len(used) == 2  # the winner had seen both
    assert refresh_once(settings, OPTIONS).decision == "none"


def test_a_bad_candidate_is_held_and_what_was_in_it_comes_again_with_others(
    settings, deployed, monkeypatch
):
    """The renewal is made to forget: all its energies in reverse."""
    put_incoming(settings, "plates", new_plates(20))
    real = candidate.renew

    def spoiled(*args, **kwargs):
        model, report = real(*args, **kwargs)
        model.weights.neg_()
        return model, report

    with monkeypatch.context() as patch:
        patch.setattr(candidate, "renew", spoiled)
        report = refresh_once(settings, OPTIONS)
    assert report.decision == "held"
    assert "AUROC falls" in report.why
    assert report.reasons[0] == "AUROC falls by more than 0.01"
    assert deployed.current("plates").version == "train-0"
    assert refresh_once(settings, OPTIONS).why == "0 new images, 8 are awaited"
    assert Registry(settings, "plates").show(report.to_version)["decision"]["decision"] == "held"
    put_incoming(settings, "plates", new_plates(20, first=8000))
    second = refresh_once(settings, OPTIONS)
    assert second.decision == "promoted"
    assert "20 of the images were held before" in second.notes
    assert len(deployed.manifest("plates", second.to_version)["data"]["incoming"]) == 2
    assert refresh_once(settings, OPTIONS).decision == "none"


def put_training(store, version, files, data, *, spoiled=False):
    """A version as a training leaves it, before the gate; spoiled: its scores are reversed."""
    model = artifact.unpack(files)
    if spoiled:
        model.model.weights.neg_()
    packed = artifact.pack(model.model, thresholds=model.thresholds, metrics={})
    manifest = store.manifest("plates", "train-0")
    keep = {key: manifest[key] for key in ("kind", "parent", "line", "false_alarm_rate", "auroc")}
    made = {"created_at": "2026-01-02T00:00:00+00:00", "data": data}
    store.put_version("plates", version, packed, keep | made)


def test_a_training_is_decided_once_and_the_decision_is_kept(
    settings, deployed, dataset, fitted, monkeypatch
):
    put_training(deployed, "train-1", fitted, snapshot(dataset), spoiled=True)
    assert not consider(settings, deployed, "plates", "train-1").promote
    told = shown(monkeypatch, "train-1")
    for words in ("held", "AUROC falls by more than 0.01", "false_alarms_old_candidate"):
        assert words in told
    put_training(deployed, "train-2", fitted, snapshot(dataset))
    first = consider(settings, deployed, "plates", "train-2")
    assert (first.promote, deployed.current("plates").version) == (True, "train-2")
    Registry(settings, "plates").rollback("looks wrong")
    again = consider(settings, deployed, "plates", "train-2")  # `dpdl train --resume train-2`
    assert (again.promote, again.why, again.numbers) == (True, first.why, first.numbers)
    assert deployed.current("plates").version == "train-0"


def test_a_training_of_another_product_replaces_nothing(settings, deployed, dataset, fitted):
    put_training(deployed, "train-1", fitted, snapshot(dataset) | {"dataset": "screws"})
    verdict = consider(settings, deployed, "plates", "train-1")
    assert not verdict.promote
    assert "learnt data set screws, train-0, which is current, plates" in verdict.why
    assert deployed.current("plates").version == "train-0"


@pytest.mark.parametrize("races", [1, 5])
def test_a_training_that_loses_the_race_for_the_pointer_is_judged_against_who_won(
    settings, deployed, dataset, fitted, monkeypatch, races
):
    put_training(deployed, "train-1", fitted, snapshot(dataset))
    real, winners = ModelStore.move_pointer, []

    def another_is_quicker(self, name, version, seen, **kwargs):
        if version == "train-1" and len(winners) < races:
            winners.append(f"train-{len(winners) + 2}")
            put_training(self, winners[-1], fitted, snapshot(dataset))
            real(self, name, winners[-1], seen, **kwargs)
        return real(self, name, version, seen, **kwargs)

    monkeypatch.setattr(ModelStore, "move_pointer", another_is_quicker)
    if races == RACES:
        with pytest.raises(PointerConflict):
            consider_training(settings, deployed, "plates", "train-1")
        return
    told = []
    verdict = consider_training(
        settings, deployed, "plates", "train-1", lambda *at: told.append(at[2])
    )
    assert verdict.promote
    moves = [move.version for move in deployed.current("plates").moves]
    assert moves == ["train-0", "train-2", "train-1"]
    assert any("judged against the new one" in figures.get("because", "") for figures in told)


def test_what_a_person_rolled_back_does_not_come_again(settings, deployed):
    put_incoming(settings, "plates", new_plates(20))
    promoted = refresh_once(settings, OPTIONS)
    registry = Registry(settings, "plates")
    assert [v.version for v in registry.list() if v.current] == [promoted.to_version]
    assert registry.rollback("looks wrong").version == "train-0"
    assert refresh_once(settings, OPTIONS).decision == "none"
    with pytest.raises(DataError, match="no version before it"):
        registry.rollback("further")
    assert registry.promote(promoted.to_version, "was right").version == promoted.to_version
    registry.promote("train-0", "after all")
    assert registry.rollback("no").version == promoted.to_version
    assert registry.rollback("further").version == "train-0"


@pytest.mark.storage
def test_what_was_taken_back_in_two_steps_does_not_come_again(settings, dataset):
    """Refreshed from train-0 to refresh-1 to refresh-2, and rolled back twice."""

    def put(first):
        put_incoming(settings, "plates", new_plates(10, first=first))
        return {o.key: o.etag for o in incoming(settings, "plates")}

    one = put(5000)
    two = {key: etag for key, etag in put(6000).items() if key not in one}
    three = {key: etag for key, etag in put(7000).items() if key not in one | two}
    past = [
        decisions.Decision("refresh-2", "refresh-1", "promoted", "", {}, two),
        decisions.Decision("refresh-1", "train-0", "promoted", "", {}, one),
        # Of a line that has nothing to do with this one.
        decisions.Decision("refresh-3", "train-9", "promoted", "", {}, three),
    ]
    manifest = {"line": [], "data": snapshot(dataset)}
    found = candidate.find_inputs(settings, "train-0", manifest, dataset, past, 0)
    assert (found.inputs.new, found.images, found.waiting) == (three, 10, 10)


def test_what_was_held_comes_again_in_other_company_and_not_for_ever(settings, dataset):
    """An answer comes again whatever happens: a person stands behind it."""

    def put(first):
        (key,) = put_incoming(settings, "plates", new_plates(10, first=first)).keys
        return {key: {o.key: o.etag for o in incoming(settings, "plates")}[key]}

    def find():
        return candidate.find_inputs(settings, "train-0", manifest, dataset, past, 0)

    def hold(inputs):
        at = f"2026-01-0{len(past) + 1}"
        past.append(decisions.Decision(f"r-{at}", "train-0", "held", "", {}, inputs, at))

    past, manifest = [], {"line": [], "data": snapshot(dataset)}
    given = answer(settings, 1, "false-alarm", plate(9000, spot=True))
    answered = {o.key: o.etag for o in incoming(settings, "plates")}
    assert list(answered) == [given.key]
    one = put(5000)
    first = find()
    assert (first.inputs.new, first.waiting) == (one | answered, 11)
    hold(first.inputs.new)
    assert find().inputs.candidate == first.inputs.candidate
    assert find().waiting == 0  # the same once more would be held again

    two = put(6000)
    second = find()
    assert (second.inputs.new, second.images, second.waiting) == (one | two | answered, 21, 10)
    assert second.notes == ["11 of the images were held before"]
    hold(second.inputs.new)
    answer(settings, 1, "undo", b"")
    assert find().waiting == 20  # without the answer it may pass
    answer(settings, 1, "false-alarm", plate(9000, spot=True))
    hold(one | two | answered)
    assert find().inputs.new.keys() == two.keys() | answered.keys()  # one has been in three


def test_defects_among_the_new_normals_are_set_aside_and_listed(settings, deployed):
    clean, poison = new_plates(40), new_plates(10, first=9000, spot=True)
    put_incoming(settings, "plates", clean + poison)
    report = refresh_once(settings, OPTIONS)
    files = deployed.fetch("plates", report.to_version)
    listed = {row["source"] for row in json.loads(files["set_aside.json"])}
    spoiled = {f"incoming-{i}" for i in range(40, 50)}
    assert len(listed & spoiled) >= 9
    assert len(listed - spoiled) <= 6
    assert report.set_aside == len(listed)
    assert report.decision == "promoted", report.why
    assert report.numbers["auroc_candidate"] >= report.numbers["auroc_current"] - 0.01


@pytest.mark.parametrize("defects", [0, 1])
def test_a_line_begins_with_no_defect_or_one(settings, tmp_path, defects):
    """All are learnt and none is left to test with; what cannot be measured is said."""
    root = tmp_path / "few"
    (root / "normal").mkdir(parents=True)
    (root / "anomaly").mkdir()
    for i in range(60):
        (root / "normal" / f"{i}.png").write_bytes(plate(i))
    for i in range(defects):
        (root / "anomaly" / f"{i}.png").write_bytes(plate(i, spot=True))
    counts = import_dataset(settings, root, "plates", shots=defects, calibration_share=0.4).counts
    assert (counts["train"]["anomaly"], counts["test"]["anomaly"]) == (defects, 0)
    index = load_index(settings, "plates")
    learnt = [images(settings, index.keys("train", label), 64) for label in (0, 1)]
    model = fit(override(recipe("edge"), SMALL), learnt[0], stack(learnt[1]), seed=0)
    held_out = images(settings, index.keys("calibration"), 64)
    thresholds, _ = calibrate(observe(model, held_out).score, [""] * held_out.num_images, RATE)
    first = {
        "kind": "train",
        "created_at": "2026-01-01T00:00:00+00:00",
        "parent": None,
        "line": [],
        "data": snapshot(index),
        "false_alarm_rate": RATE,
        "auroc": None,
    }
    store = ModelStore(settings)
    files = artifact.pack(model, thresholds=thresholds, metrics={})
    store.put_version("plates", "train-0", files, first)
    store.move_pointer("plates", "train-0", None, by="test", why="the first version")
    put_incoming(settings, "plates", new_plates(30))
    report = refresh_once(settings, OPTIONS)
    assert report.decision == "promoted", report.why
    assert ("AUROC not compared" in report.why) == (defects == 0)


def test_images_that_are_known_are_not_learnt_twice(settings, deployed, folder):
    """From training and from an earlier refresh, byte for byte, under other names."""
    normals = [path.read_bytes() for path in sorted((folder / "normal").iterdir())]
    put_incoming(settings, "plates", normals[:40])
    report = refresh_once(settings, OPTIONS)
    assert (report.decision, report.why) == ("none", "all 40 new images are known already")
    assert refresh_once(settings, OPTIONS).why == "0 new images, 8 are awaited"
    assert refreshes(deployed) == []
    put_incoming(settings, "plates", new_plates(20))
    put_incoming(settings, "plates", [*normals[:10], *new_plates(4), *new_plates(16, first=6000)])
    report = refresh_once(settings, OPTIONS)
    assert report.new_normals == 36
    assert "14 new images were known already" in report.notes
    data = deployed.manifest("plates", report.to_version)["data"]
    held_out = HeldOut(settings, data, data).at(64)["new"][0].rows
    assert {row.source for row in held_out} <= {f"incoming-{i}" for i in range(30)}
    digests = [row.digest for row in held_out]
    assert len(digests) == len(set(digests))


def put_object(settings, name, data):
    bucket = settings.s3.data_bucket
    make_minio(settings).put_object(bucket, f"plates/incoming/{name}", io.BytesIO(data), len(data))


def parquet(table):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def put_what_is_no_data_of_ours(settings):
    put_object(settings, "bad.parquet", b"no Parquet")
    put_object(settings, "footer.parquet", b"PAR1" + 50 * b"x" + b"\x05\0\0\0PAR1")
    put_object(settings, "foreign.parquet", parquet(pa.table({"id": [1, 2], "name": ["a", "b"]})))
    other_types = SCHEMA.set(1, pa.field("label", pa.string(), nullable=False))
    row = [plate(1)], ["0"], [""], [""], [None], ["x"], ["00"]
    put_object(settings, "types.parquet", parquet(pa.table(list(row), schema=other_types)))


def stored(settings, key):
    with make_minio(settings).get_object(settings.s3.data_bucket, key) as found:
        return found.read()


def put_damaged(settings, column, name):
    """An object whose footer can be read, and no page of one column."""
    images = [plate(700 + i) for i in range(10)]
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    columns = [images, [0] * 10, [""] * 10, ["cam-1"] * 10, [None] * 10, ["x"] * 10, digests]
    data = bytearray(parquet(pa.table(columns, schema=SCHEMA)))
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    chunk = group.column(SCHEMA.get_field_index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    put_object(settings, name, bytes(data))


@pytest.mark.storage
def test_an_object_with_a_damaged_page_is_named_and_left(settings, deployed):
    put_incoming(settings, "plates", new_plates(20))
    put_damaged(settings, "image", "pages.parquet")
    put_damaged(settings, "digest", "digests.parquet")
    report = refresh_once(settings, OPTIONS)
    assert (report.decision, report.new_normals) == ("promoted", 20), report.why
    for name in ("pages.parquet", "digests.parquet"):
        assert any(f"{name} is damaged" in note for note in report.notes), report.notes
    assert len(deployed.manifest("plates", report.to_version)["data"]["new"]) == 1
    again = refresh_once(settings, OPTIONS)
    assert (again.decision, len(again.notes)) == ("none", 2)


def test_one_bad_object_and_one_labelled_defect_keep_no_refresh_from_the_rest(settings, deployed):
    put_incoming(settings, "plates", new_plates(20))
    put_what_is_no_data_of_ours(settings)
    spots = [plate(9000 + i, spot=True) for i in range(10)]
    digests = [hashlib.sha256(spot).hexdigest() for spot in spots]
    columns = [spots, [1] * 10, ["spot"] * 10, ["cam-1"] * 10, [None] * 10, ["x"] * 10, digests]
    put_object(settings, "defects.parquet", parquet(pa.table(columns, schema=SCHEMA)))
    report = refresh_once(settings, OPTIONS)
    assert report.decision == "promoted", report.why
    assert report.new_normals == 20  # learnt or held out: none of the labelled defects
    for words in (
        "bad.parquet is no Parquet file",
        "footer.parquet is no Parquet file",
        "foreign.parquet is none of our Parquet files: it has no column `image: binary",
        "types.parquet is none of our Parquet files: it has no column `label: int8",
    ):
        assert any(words in note for note in report.notes), words
    again = refresh_once(settings, OPTIONS)
    assert (again.decision, len(again.notes)) == ("none", 4)


@pytest.mark.storage
def test_what_is_no_data_of_ours_joins_no_running_training(settings, dataset):
    report = put_incoming(settings, "plates", new_plates(10))
    put_what_is_no_data_of_ours(settings)
    put_damaged(settings, "image", "pages.parquet")
    keeper = WorkerKeeper(settings, snapshot(dataset), None, {})
    assert list(keeper._new(at_least=10)["incoming"]) == report.keys


def test_the_gate_uses_only_what_both_or_neither_have_learnt(settings, dataset):
    """Confirmed defects and accepted normals that one side knows; held out by digest."""
    answer(settings, 1, "defect", plate(9000, spot=True))
    (key,) = put_incoming(settings, "plates", new_plates(40)).keys
    index = load_index(settings, "plates")
    current = snapshot(dataset) | {
        "incoming": {o.key: o.etag for o in incoming(settings, "plates")}
    }
    aside = next(row.digest for row in images(settings, [key], 64).rows if is_held_out(row))
    current["set_aside"] = [aside]
    trained = snapshot(index)
    assert len(trained["objects"]) == len(current["objects"]) + 1
    found = HeldOut(settings, trained, current).at(64)
    assert sum(part.num_images for part in found["defects"]) == 6
    assert sum(part.num_images for part in found["old"]) == dataset.rows("calibration")
    new = [row for part in found["new"] for row in part.rows]
    assert new
    assert {row.key for row in new} == {key}
    assert all(is_held_out(row) and row.digest != aside for row in new)


@pytest.mark.storage
def test_many_cameras_imported_one_after_the_other_are_all_judged(settings, dataset, monkeypatch):
    """Ten of them in two row groups of 128 and a rest, of which one would be enough."""
    monkeypatch.setattr("pipelines.held_out.AT_MOST", 40)
    cameras = [f"cam-{i // 30}" for i in range(300)]
    new = [NewImage(plate(5000 + i), camera) for i, camera in enumerate(cameras)]
    (key,) = put_incoming(settings, "plates", new).keys
    data = snapshot(dataset) | {"incoming": {o.key: o.etag for o in incoming(settings, "plates")}}

    def found(each):
        _, earlier = HeldOut(settings, data, data, each=each).at(64)["old"]
        assert earlier.num_images == len(earlier.rows)
        assert all(is_held_out(row) for row in earlier.rows)
        return Counter(row.camera for row in earlier.rows)

    there = Counter(row.camera for row in images(settings, [key], 64).rows if is_held_out(row))
    assert set(there) == set(cameras)
    some = found(each=0)
    share = max(some.values())
    assert share < max(there.values())
    assert some == {camera: min(n, share) for camera, n in there.items()}
    assert found(each=30) == there
    # An import of before digests were stored: the same rows are found by their images.
    table = pq.read_table(io.BytesIO(stored(settings, key)))
    put_object(settings, "old.parquet", parquet(table.drop_columns(["digest"])))
    rows, again = (
        [row for _, refs in described(settings, [k]) for row in refs]
        for k in (key, "plates/incoming/old.parquet")
    )
    assert again == [replace(row, key="plates/incoming/old.parquet") for row in rows]


def test_after_an_import_with_another_split_a_refresh_is_refused_and_a_training_not_compared_on_it(
    settings, deployed, dataset, folder
):
    put_incoming(settings, "plates", new_plates(20))
    import_dataset(settings, folder, "plates", shots=6, seed=1, calibration_share=0.4)
    with pytest.raises(DataError, match="imported anew since train-0"):
        refresh_once(settings, OPTIONS)
    again = snapshot(load_index(settings, "plates"))
    found = HeldOut(settings, again, snapshot(dataset)).at(64)
    assert [sum(part.num_images for part in found[k]) for k in ("defects", "old", "new")] == [0] * 3


def test_the_device_reaches_all_that_looks_at_images(settings, deployed, monkeypatch):
    """A GPU is asked for; there is none here, so the CPU is what they get."""
    asked = []

    def on_the_cpu(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            asked.append((name, kwargs.pop("device", None) or args[-1]))
            return real(*(args if name == "renew" else args[:1]), **kwargs)

        monkeypatch.setattr(owner, name, call)

    on_the_cpu(promotion, "unpack")
    on_the_cpu(candidate, "renew")
    put_incoming(settings, "plates", new_plates(20))
    refresh_once(settings, replace(OPTIONS, device="cuda"))
    # For the sieve and the renewal, then both for the gate.
    assert asked == [("unpack", "cuda"), ("renew", "cuda"), *[("unpack", "cuda")] * 2]


def test_a_shift_makes_the_heads_be_learnt_anew(settings, deployed):
    put_incoming(settings, "plates", new_plates(60, light=40))
    report = refresh_once(settings, OPTIONS)
    assert report.decision == "promoted", report.why
    assert report.relearnt
    assert report.input_shift > 0.5


@pytest.mark.storage
def test_the_command_watches_refreshes_reports_and_ends_at_sigterm(settings, deployed, tmp_path):
    report = tmp_path / "refresh.json"
    command = [sys.executable, "-m", "cluster.cli", "refresh", "--watch", "--model", "plates"]
    watch = subprocess.Popen(
        [*command, "--min-new", "8", "--report", report], stderr=subprocess.PIPE, text=True
    )
    try:
        assert "nothing to do: 0 new images" in first_line(watch, "nothing")
        put_incoming(settings, "plates", new_plates(20))
        deadline = time.monotonic() + 120
        while not report.exists() and watch.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        told = json.loads(report.read_text())
        assert told["decision"] == "promoted", told["why"]
        assert told["to_version"] == deployed.current("plates").version
        keys = {"reasons", "prototypes", "score_shift", "thresholds_before", "thresholds_after"}
        assert keys <= set(told)
        assert told["prototypes"]["kept"] > 0
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(15) == 0
    finally:
        watch.kill()
        watch.wait()
        watch.stderr.close()


def first_line(process, having):
    """The first line of a process's errors that has this word; the last one if it ends before."""
    line = ""
    for line in process.stderr:
        if having in line:
            break
    return line


def test_the_loop_goes_on_after_what_may_pass(settings, deployed, monkeypatch):
    put_incoming(settings, "plates", new_plates(20))
    real, failures = refresh_once, [PointerConflict("moved")]

    def flaky(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(refresh_loop, "refresh_once", flaky)
    seen, stop = [], threading.Event()

    def report(found):
        seen.append(found)
        if len(seen) == 2:
            stop.set()

    refresh_every(settings, OPTIONS, 0.01, report, stop)
    assert isinstance(seen[0], PointerConflict)
    assert seen[1].decision == "promoted"


def test_without_a_model_refresh_says_what_to_do(settings, dataset):
    with pytest.raises(DataError, match="dpdl train"):
        refresh_once(settings, OPTIONS)
