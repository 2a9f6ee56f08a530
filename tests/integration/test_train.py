"""Training on a real Ray: as one, as two, killed, resumed, elastic, abandoned; what it records.

Sixty-four pixel plates and a trunk of random weights, so that an epoch takes a second: what is
tested is the machinery. test_tune.py has the same without Ray.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dpdl_core import artifact
from dpdl_core.config import override, recipe
from dpdl_core.fit import fit
from dpdl_core.images import decode_image
from infra.answers import Answers
from infra.errors import DataError, DpdlError
from infra.messages import FrameResult
from infra.model_store import ModelStore
from pipelines.dataset_index import load_index, snapshot
from pipelines.datasets import NewImage, import_dataset, put_incoming
from pipelines.held_out import images
from pipelines.promotion import load
from pipelines.refresh import RefreshOptions, refresh_once
from pipelines.run_record import list_runs
from pipelines.scoring import calibrate, observe
from pipelines.sources import stack
from pipelines.train import TrainOptions, resume, train

pytestmark = pytest.mark.integration

FROZEN = {
    "trunk": "test_efficientnet",
    "weights": "random",
    "image_size": "64",
    "pooled_spaces": "5q",
    "patch_spaces": "3-5",
    "patch_prototypes": "12",
    "patch_dims": "8",
    "patch_side": "4",
    "head_stages": "4-5",
    "head_iterations": "10",
    "pseudo_normals": "16",
    "folds": "2",
}
TUNED = FROZEN | {
    "tuned_stages": "2",
    "tune_epochs": "5",
    "tune_iterations": "4",
    "tune_prototypes": "6",
    "renew_every_epochs": "2",
}
CURVE = ("loss", "energy_of_normals", "transport", "margin", "dispersion", "residual_head")


def plate(seed, *, spot=False):
    """A 64 x 64 PNG of grey noise; with a bright square where it is a defect."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(110, 12, (64, 64))
    if spot:
        x, y = rng.integers(4, 40, 2)
        pixels[y : y + 20, x : x + 20] = 250
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


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


@pytest.fixture(scope="module")
def ray_here():
    import ray

    from infra.ray_runtime import connect

    connect()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def curves():
    """Curves of trainings on the same data, filled by the first test."""
    return {}


def options(overrides=TUNED, **changes):
    values = {"dataset": "plates", "workers": 2, "overrides": overrides, "false_alarm_rate": 0.1}
    return TrainOptions(**values | changes)


def curve(report):
    return np.array([[epoch[name] for name in CURVE] for epoch in report.curve])


def same_curve(report, want):
    """Losses and energies of every epoch, once each; rounding adds up over twenty steps."""
    assert [epoch["epoch"] for epoch in report.curve] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(curve(report), want, rtol=0.02, atol=2e-3)


def answer(settings, offset, kind, image):
    """What the console does for a person; kind "undo" takes the answer back."""
    frame = FrameResult(
        frame_id=f"frames/0/{offset}", camera="cam-1", captured_at_ns=offset, scored_at_ns=1,
        score=9.0, threshold=1.0, energy=0.0, is_anomaly=True, model="m", version="v",
        evidence_key="",
    )  # fmt: skip
    defect = "spot" if kind == "defect" else ""
    people = Answers(settings)
    if kind == "undo":
        return people.undo(frame)
    return people.give(frame, kind, defect=defect, by="ann", dataset="plates", image=image)


def train_workers():
    """Of the Ray that this process started: nobody else's are counted, or killed."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # Ray's processes come and go
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


def test_one_worker_and_two_have_the_same_curve_even_at_the_same_time(
    settings, dataset, ray_here, curves
):
    """On two cores: neither starves the other of its decode tasks."""
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(
            lambda workers: train(settings, options(workers=workers, model_name=f"w{workers}")),
            (1, 2),
        )
    assert (one.workers, two.workers, one.starts, two.starts) == (1, 2, 1, 1)
    assert (one.epochs, one.steps) == (5, 20)
    curves["plates"] = curve(one)
    same_curve(two, curves["plates"])
    assert [renewal["epoch"] for renewal in two.renewals] == [2, 4]
    for mine, theirs in zip(one.renewals, two.renewals, strict=True):
        same = ("kept", "replaced", "revived")
        assert [mine[name] for name in same] == [theirs[name] for name in same]
    assert 0 <= two.data_wait_share <= 1
    assert two.auroc > 0.9
    assert (two.decision, two.why) == ("promoted", "the first version")


def cut_off(ray_here):
    """`dpdl train` in a process of its own, killed after its second epoch."""
    code = "import sys; from cluster.cli import main; sys.argv[0] = 'dpdl'; main()"
    sets = [f"--set={key}={value}" for key, value in TUNED.items()]
    command = [sys.executable, "-c", code, "train", "--dataset=plates", "--workers=2", *sets]
    address = ray_here.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [*command, "--false-alarm-rate=0.1"],
        env=os.environ | {"RAY_ADDRESS": address},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("tuning" in line and "epoch 2" in line for line in driver.stderr)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
def test_after_kill_9_of_the_driver_and_of_a_worker_the_run_ends_as_an_unharmed_one(
    settings, dataset, ray_here, curves
):
    """Each time it goes on from the last checkpoint; every epoch is there once."""
    if not curves:
        curves["plates"] = curve(train(settings, options(workers=1, model_name="unharmed")))
    cut_off(ray_here)
    deadline = time.monotonic() + 30
    while train_workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not train_workers()  # they end with their driver
    (run,) = list_runs(settings, "default")
    assert ModelStore(settings).list_versions("default") == []
    killed, read = [], []

    def progress(stage, fraction, figures):
        if stage == "read" and "epochs_done" in figures:
            read.append(figures["epochs_done"])
        if stage == "tuning" and not killed:
            killed.append(train_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    report = resume(settings, "default", run, progress)
    assert killed
    # Ray's controller takes note of a checkpoint a moment after it is made.
    assert 1 <= read[0] <= read[1]
    assert (report.version, report.starts, report.resumed) == (run, 2, True)
    same_curve(report, curves["plates"])
    again = resume(settings, "default", run)
    assert (again.version, again.why, again.starts) == (run, report.why, 0)
    assert ModelStore(settings).list_versions("default") == [run]
    with pytest.raises(DataError, match=run):
        resume(settings, "default", "train-of-nobody")


def test_new_normals_join_an_elastic_run_and_all_is_recorded(settings, dataset, ray_here):
    new = [NewImage(plate(5000 + i), "cam-1") for i in range(30)]
    (key,) = put_incoming(settings, "plates", new).keys
    overrides = TUNED | {"renew_every_epochs": "0", "renew_min_new": "20"}
    answers = {}

    def progress(stage, fraction, figures):
        if stage == "start":  # the data of the run stand; what comes now joins it later
            for i in range(8):
                spot = plate(9000 + i, spot=True)
                answers[hashlib.sha256(spot).hexdigest()] = answer(settings, i, "false-alarm", spot)

    report = train(settings, options(overrides, workers=(1, 2)), progress)
    assert report.workers in (1, 2)
    (renewal,) = report.renewals
    assert renewal["epoch"] == 1
    assert 15 <= renewal["new_normals"] < 38  # one in five is held out for the gates to come
    store = ModelStore(settings)
    manifest = store.manifest("default", report.version)
    assert manifest["data"]["objects"] == snapshot(dataset)["objects"]
    assert len(manifest["machines"]) == report.workers
    alarms = {given.key for given in answers.values()}
    assert set(manifest["data"]["incoming"]) == {key, *alarms}
    assert manifest["data"]["answered_by"] == dict.fromkeys(alarms, "ann")
    assert len(manifest["data"]["set_aside"]) == renewal["set_aside"]
    assert not set(manifest["data"]["set_aside"]) & set(answers)  # a person vouches for them
    assert report.answers == {"defects": 0, "normals": 8}
    files = store.fetch("default", report.version)
    lines = [json.loads(line) for line in files["epochs.jsonl"].splitlines()]
    assert lines == report.curve
    assert files["curves.png"].startswith(b"\x89PNG")
    record = json.loads(files["run.json"])
    assert record["config"]["renew_min_new"] == 20
    assert record["code"]["dpdl"]
    assert record["data"]["objects"] == snapshot(dataset)["objects"]
    assert load(store, "default", report.version).thresholds == report.thresholds


class Abandoned(Exception):
    pass


def test_a_training_that_is_left_ends_its_workers(settings, dataset, ray_here):
    def progress(stage, fraction, figures):
        if stage == "tuning":
            raise Abandoned

    with pytest.raises(Abandoned):
        train(settings, options(), progress)
    deadline = time.monotonic() + 20
    while train_workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not train_workers()
    total = ray_here.cluster_resources()["CPU"]
    while ray_here.available_resources().get("CPU") != total and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray_here.available_resources()["CPU"] == total


def first_version(settings, dataset):
    """A current version, fitted without Ray on what the training will see."""
    normals = images(settings, dataset.keys("train", 0), 64)
    defects = stack(images(settings, dataset.keys("train", 1), 64))
    model = fit(override(recipe("edge"), FROZEN), normals, defects, seed=1)
    held_out = images(settings, dataset.keys("calibration"), 64)
    thresholds, _ = calibrate(observe(model, held_out).score, [""] * held_out.num_images, 0.1)
    manifest = {"kind": "train", "parent": None, "line": [], "data": snapshot(dataset)}
    store = ModelStore(settings)
    files = artifact.pack(model, thresholds=thresholds, metrics={})
    store.put_version("default", "train-0", files, manifest)
    store.move_pointer("default", "train-0", None, by="test", why="the first version")


def test_without_tuning_a_training_begins_anew_when_a_worker_dies_and_learns_what_people_said(
    settings, dataset, ray_here, folder
):
    first_version(settings, dataset)
    spots = [plate(9000 + i, spot=True) for i in range(20)]
    given = [answer(settings, i, "false-alarm", spot) for i, spot in enumerate(spots[:12])]
    given.append(answer(settings, 90, "defect", plate(9100, spot=True)))
    known = (folder / "normal" / "000.png").read_bytes()
    given.append(answer(settings, 91, "false-alarm", known))
    put_incoming(settings, "plates", [NewImage(spot) for spot in spots[12:]])
    killed = []

    def progress(stage, fraction, figures):
        if stage == "read" and not killed:
            for offset in (0, 1, 90):  # the run goes on with what it began with
                answer(settings, offset, "undo", b"")
            answer(settings, 2, "defect", spots[2])
            killed.append(train_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    report = train(settings, options(FROZEN), progress)
    assert (report.epochs, report.steps, report.curve) == (0, 0, [])
    assert report.starts == 2
    assert "AUROC on known defects" in report.why  # it went through the gate
    store = ModelStore(settings)
    data = store.manifest("default", report.version)["data"]
    assert data["answered_by"] == dict.fromkeys([each.key for each in given], "ann")
    assert set(data["incoming"]) == {each.key for each in given if each.kind == "false-alarm"}
    assert data["repeated"] == {given[-1].key: [0]}
    assert report.answers == {"defects": 1, "normals": 13}
    # What people answered is learnt, and sets no threshold.
    assert report.thresholds["calibration_normals"] == dataset.rows("calibration")
    shown = torch.stack([torch.from_numpy(decode_image(spot, 64)) for spot in spots[12:]])
    before, after = (
        load(store, "default", v).model.score(shown).energy for v in ("train-0", report.version)
    )
    assert after.mean() < 0.8 * before.mean()  # others of the kind, which nobody spoke for
    files = ModelStore(settings).fetch("default", report.version)
    assert files["curves.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("overrides", [FROZEN, TUNED])
def test_a_line_that_has_seen_no_defect_is_trained(settings, folder, tmp_path, ray_here, overrides):
    """Of tuning there is none, as it needs defects; what cannot be measured is None."""
    shutil.copytree(folder / "normal", tmp_path / "fresh" / "normal")
    import_dataset(settings, tmp_path / "fresh", "plates", shots=0, calibration_share=0.4)
    report = train(settings, options(overrides, workers=1))
    assert (report.decision, report.auroc, report.ap, report.epochs) == ("promoted", None, None, 0)
    put_incoming(settings, "plates", [NewImage(plate(5000 + i)) for i in range(20)])
    refreshed = refresh_once(settings, RefreshOptions(model_name="default", min_new=8))
    assert "AUROC not compared" in refreshed.why


def test_what_cannot_be_trained_is_told_in_one_line(settings, dataset, ray_here):
    with pytest.raises(DataError, match="no such setting"):
        train(settings, options({"nonsense": "1"}))
    with pytest.raises(DataError, match="dpdl data import"):
        train(settings, options(dataset="nothing"))
    with pytest.raises(DataError, match="lower --workers"):
        train(settings, options(workers=64))
    read = []
    with pytest.raises(DpdlError, match="training failed: space '9'"):
        train(
            settings,
            options(FROZEN | {"pooled_spaces": "9"}),
            lambda stage, fraction, figures: read.append((stage, "workers" in figures)),
        )
    begun = [stage for stage, workers in read if workers and stage != "workers"]
    assert len(begun) == 1  # it would fail again: nobody tries
    assert not train_workers()
