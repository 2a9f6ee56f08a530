"""The harness end to end on a tiny generated set: figures, resumption, files, refusals."""

import errno
import gc
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pipelines.evaluate
from cluster.commands import research
from dpdl_core import features, protocol
from dpdl_core.metrics import auroc, average_precision
from dpdl_core.model import part_groups
from dpdl_core.parts import evidence
from dpdl_core.protocol import DatasetError, Split, decode_samples, load_dataset
from pipelines import evaluate_methods, evaluate_run
from pipelines.evaluate import EvaluateOptions, evaluate
from pipelines.evaluate_categories import evaluate_each
from pipelines.evaluate_report import GROUPS, PER_GROUP, RunPictures, overlay

SMALL = {"weights": "random", "trunk": "test_resnet", "image_size": "64"}
TINY = SMALL | {
    "pooled_spaces": "4",
    "patch_spaces": "3",
    "patch_prototypes": "8",
    "head_stages": "4",
    "head_iterations": "1",
    "pseudo_normals": "4",
    "folds": "2",
}
"""Of DPDL."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 normals, two classes of 6 anomalies."""
    root = tmp_path_factory.mktemp("data") / "tiles"
    rng = np.random.default_rng(0)
    for part, count in (("normal", 16), ("anomaly/blot", 6), ("anomaly/dot", 6)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(120 + rng.normal(0, 8, (64, 64, 3)), 0, 255).astype(np.uint8)
            if part != "normal":
                side = 24 if part.endswith("blot") else 10
                top, left = rng.integers(0, 64 - side, 2)
                pixels[top : top + side, left : left + side] = [240, 30, 30]
            Image.fromarray(pixels).save(root / part / f"{i}.png")
    return root


def options(data: Path, **changes) -> EvaluateOptions:
    chosen = {"method": "mahalanobis-all", "shots": 2, "seeds": (0, 1), "overrides": SMALL}
    return EvaluateOptions(data=str(data), **{**chosen, **changes})


def test_report_says_what_the_runs_found(data, tmp_path):
    path = tmp_path / "out" / "report.json"
    report = evaluate(options(data, report=path))
    assert json.loads(path.read_text()) == report
    assert (report["normals"], report["anomalies"], report["rejected"]) == (16, 12, [])
    runs = [
        json.loads(p.read_text())
        for p in sorted(path.with_suffix(".runs").glob("*.json"))
        if not p.name.endswith(".split.json")
    ]
    runs.sort(key=lambda run: run["seed"])
    for key, metric in (("auroc", auroc), ("ap", average_precision)):
        want = [metric([int(bool(d)) for d in r["defects"]], r["scores"]) for r in runs]
        assert report[key]["per_seed"] == pytest.approx(want)
        assert report[key]["mean"] == pytest.approx(np.mean(want))
        assert report[key]["sd"] == pytest.approx(np.std(want, ddof=1))
    assert report["auroc"]["mean"] > 0.7
    assert set(report["by_defect"]) == {"blot", "dot"}
    assert report["train_seconds"] > 0
    assert report["score_images_per_second"] > 0
    assert report["splits_sha256"] == [run["split_sha256"] for run in runs]
    assert Image.open(path.with_suffix(".png")).size[0] > 800


def test_copies_of_training_images_are_counted_and_left_out_of_a_second_figure(data, tmp_path):
    """Every normal twice, under another name and encoding."""
    twice = shutil.copytree(data, tmp_path / "tiles")
    for path in sorted((data / "normal").glob("*.png")):
        Image.open(path).save(twice / "normal" / f"copy{path.stem}.bmp")
    path = tmp_path / "report.json"
    report = evaluate(options(twice, report=path))
    want = []
    for number, split_file in enumerate(sorted(path.with_suffix(".runs").glob("*.split.json"))):
        split = json.loads(split_file.read_text())
        run = json.loads(Path(str(split_file).replace(".split.json", ".json")).read_text())
        stems = {Path(n).stem.removeprefix("copy") for n, label, _ in split["train_normals"]}
        kept = [
            (bool(defect), score)
            for source, defect, score in zip(
                run["sources"], run["defects"], run["scores"], strict=True
            )
            if defect or Path(source).stem.removeprefix("copy") not in stems
        ]
        copies = len(run["sources"]) - len(kept)
        assert 0 < copies < 8
        assert copies in report["copies_in_test"], number
        want.append(auroc(*zip(*kept, strict=True)))
    assert sorted(report["auroc_without_copies"]["per_seed"]) == pytest.approx(sorted(want))
    assert evaluate(options(data))["auroc_without_copies"] is None


def test_splits_are_on_disk_and_fit_the_data(data, tmp_path):
    path = tmp_path / "report.json"
    report = evaluate(options(data, report=path, seeds=(4,)))
    (saved,) = path.with_suffix(".runs").glob("*.split.json")
    split = Split.load(saved, load_dataset(data))
    assert split.sha256 == report["splits_sha256"][0]
    assert split.seed == 4


def test_hard_setting_runs_each_class_and_means(data):
    report = evaluate(options(data, protocol="hard"))
    by_class = report["by_seen_class"]
    assert set(by_class) == {"blot", "dot"}
    for seed in (0, 1):
        mean = np.mean([by_class[c]["per_seed"][seed] for c in by_class])
        assert report["auroc"]["per_seed"][seed] == pytest.approx(mean)
    assert len(report["splits_sha256"]) == 4
    assert [len(of["per_seed"]) for of in report["by_defect"].values()] == [2, 2]


def test_in_the_hard_setting_a_classs_figure_is_its_seeds_mean(data, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    shutil.copytree(copy / "anomaly" / "blot", copy / "anomaly" / "smear")
    path = tmp_path / "report.json"
    report = evaluate(options(copy, protocol="hard", seeds=(3,), report=path))
    found = []
    for split_file in path.with_suffix(".runs").glob("*.split.json"):
        run = json.loads(split_file.with_name(split_file.name.replace(".split", "")).read_text())
        rows = [i for i, d in enumerate(run["defects"]) if d in ("", "dot")]
        labels = [int(bool(run["defects"][i])) for i in rows]
        if any(labels):
            found.append(auroc(labels, [run["scores"][i] for i in rows]))
    assert len(found) == 2  # tested where blot or smear is seen
    assert report["by_defect"]["dot"]["per_seed"] == pytest.approx([np.mean(found)])
    assert report["by_defect"]["dot"]["sd"] is None  # one seed has no deviation


def test_a_class_that_a_seed_does_not_test_has_no_figure_there(data, tmp_path):
    """Its place is kept: figures of one seed stand at one place in all lists."""
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    for i in range(1, 6):
        (copy / "anomaly" / "dot" / f"{i}.png").unlink()
    seeds = (0, 1, 2, 3)
    report = evaluate(options(copy, shots=4, seeds=seeds))
    found = load_dataset(copy)
    tested = [
        any(
            s.defect == "dot"
            for s in protocol.split(found, setting="general", shots=4, seed=n).test
        )
        for n in seeds
    ]
    assert set(tested) == {True, False}
    figures = report["by_defect"]["dot"]
    assert [each is not None for each in figures["per_seed"]] == tested
    assert figures["mean"] == pytest.approx(np.mean([v for v in figures["per_seed"] if v]))


@pytest.mark.parametrize("package", ["torch", "scikit-learn", "opencv-python-headless"])
def test_what_another_package_found_is_not_gone_on_from(data, tmp_path, monkeypatch, package):
    path, real = tmp_path / "report.json", evaluate_run.version
    evaluate(options(data, report=path, seeds=(0,)))
    monkeypatch.setattr(evaluate_run, "version", lambda n: "99" if n == package else real(n))
    evaluate(options(data, report=path, seeds=(0,)))
    assert len(list(path.with_suffix(".runs").glob("*.npz"))) == 2


def test_what_calls_the_methods_is_a_part_of_the_code(tmp_path, monkeypatch):
    before = evaluate_run.code_sha256()
    changed = tmp_path / "evaluate_methods.py"
    changed.write_bytes(Path(evaluate_methods.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(evaluate_methods, "__file__", str(changed))
    assert evaluate_run.code_sha256() != before


def test_one_seed_is_said_without_a_deviation(data, capsys):
    sets = [f"{key}={value}" for key, value in SMALL.items()]
    for seeds, several in (("0", False), ("0,1", True)):
        research.evaluate(str(data), shots=2, seeds=seeds, method="mahalanobis", sets=sets)
        said = capsys.readouterr().out
        assert said.startswith("auroc  ")
        assert ("+-" in said) == several


@pytest.mark.parametrize(("method", "normals"), [("dpdl", 13), ("knn", 3)])
def test_too_few_normals_are_told_before_images_are_read(
    data, tmp_path, monkeypatch, method, normals
):
    """Three in four of 14 are the 10 that a fit asks for."""
    copy = shutil.copytree(data, tmp_path / "tiles")
    for i in range(normals, 16):
        (copy / "normal" / f"{i}.png").unlink()
    read = protocol.decode_samples
    monkeypatch.setattr(protocol, "decode_samples", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DatasetError, match="normals"):
        evaluate(options(copy, method=method, overrides=TINY if method == "dpdl" else SMALL))
    monkeypatch.setattr(protocol, "decode_samples", read)
    if method == "dpdl":
        message = "tiles: 9 normals to train on, three in four of its 13, and dpdl needs 10: add"
        with pytest.raises(DatasetError, match=f"{message} .* fewer, such as knn"):
            evaluate(options(copy, method="dpdl", overrides=TINY))
        shutil.copy(data / "normal" / "13.png", copy / "normal")
        evaluate(options(copy, method="dpdl", seeds=(0,), overrides=TINY))


def test_runs_of_another_day_keep_their_date_and_machine(data, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    assert evaluate(options(data, report=path, seeds=(0,)))["resumed"] == []
    monkeypatch.setattr(os, "cpu_count", lambda: 99)
    report = evaluate(options(data, report=path, seeds=(0, 1)))
    assert report["machine"]["cores"] == 99
    (earlier,) = report["resumed"]
    assert (earlier["seed"], earlier["date"]) == (0, report["date"])
    assert earlier["machine"]["cores"] != 99


def test_a_stopped_evaluation_goes_on(data, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    fits = []
    real = pipelines.evaluate._run

    def stopping(split, *rest):
        if split.seed == 1 and len(fits) == 1:
            raise KeyboardInterrupt
        fits.append(split.seed)
        return real(split, *rest)

    monkeypatch.setattr(pipelines.evaluate, "_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(data, report=path))
    assert not path.exists()
    fits.append(None)  # lets seed 1 pass
    resumed = evaluate(options(data, report=path))
    assert fits == [0, None, 1]  # seed 0 was not run again
    assert resumed["auroc"] == evaluate(options(data))["auroc"]


def test_hard_setting_tests_the_classes_that_are_too_small_to_be_seen(data, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    for i in range(2, 6):
        (copy / "anomaly" / "dot" / f"{i}.png").unlink()
    report = evaluate(options(copy, protocol="hard", shots=3, seeds=(0,)))
    assert report["classes_not_seen"] == {"dot": 2}
    assert set(report["by_seen_class"]) == {"blot"}
    assert len(report["by_defect"]["dot"]["per_seed"]) == 1  # in the test of the run with blot
    assert evaluate(options(copy, shots=3, seeds=(0,)))["classes_not_seen"] == {}


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": {**SMALL, "image_size": "48"}},
        {"shots": 3},
        {"method": "knn"},
        {"device": "cpu:0"},  # another name, and here the same machine
        {"without": ("heads",)},
    ],
)
def test_another_question_is_not_answered_from_the_old_runs(data, tmp_path, monkeypatch, change):
    asked = {"report": tmp_path / "report.json", "seeds": (0,)}
    if "without" in change:
        asked |= {"method": "dpdl", "overrides": TINY}
    fits = []
    real = pipelines.evaluate._run
    monkeypatch.setattr(pipelines.evaluate, "_run", lambda s, *r: fits.append(0) or real(s, *r))
    evaluate(options(data, **asked))
    evaluate(options(data, **asked))
    assert len(fits) == 1
    evaluate(options(data, **asked | change))
    assert len(fits) == 2


def test_categories_are_evaluated_each_and_in_the_mean(data, tmp_path, capsys):
    root, path = tmp_path / "mvtec", tmp_path / "report.json"
    for name in ("carpet", "grid"):
        shutil.copytree(data / "normal", root / name / "train" / "good")
        shutil.copytree(data / "normal", root / name / "test" / "good")
        shutil.copytree(data / "anomaly", root / name / "test", dirs_exist_ok=True)
    (root / "grid" / "test" / "dot" / "0.png").write_bytes(b"scratched disk")
    sets = [f"{key}={value}" for key, value in SMALL.items()]
    research.evaluate(str(root), shots=2, seeds="0,1", method="mahalanobis", sets=sets, report=path)
    report = json.loads(path.read_text())
    each = [json.loads((tmp_path / f"report-{n}.json").read_text()) for n in ("carpet", "grid")]
    assert list(report["categories"].values()) == each
    assert report["auroc"]["per_seed"] == pytest.approx(
        np.mean([one["auroc"]["per_seed"] for one in each], axis=0)
    )
    said = capsys.readouterr()
    assert "grid: 1 images left out" in said.err
    first = [line.split()[0] for line in said.out.splitlines()]
    assert first == ["carpet:", "grid:", "auroc", "ap"]


def test_what_is_kept_of_a_categorys_images_goes_with_it(data, tmp_path, monkeypatch):
    for name in ("carpet", "grid", "tile"):
        shutil.copytree(data / "normal", tmp_path / name / "train" / "good")
        shutil.copytree(data / "normal", tmp_path / name / "test" / "good")
        shutil.copytree(data / "anomaly", tmp_path / name / "test", dirs_exist_ok=True)
    made, alive, real = [], [], evaluate_methods.FrozenTrunk

    def watched(*args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        trunk = real(*args, **kwargs)
        made.append(weakref.ref(trunk))
        return trunk

    evaluate_methods.forget_images()
    monkeypatch.setattr(evaluate_methods, "FrozenTrunk", watched)
    evaluate_each(options(tmp_path, seeds=(0,)))
    assert alive == [0, 0, 0]


def test_categories_of_one_class_are_left_out_of_the_hard_setting(data, tmp_path, capsys):
    """As MVTec AD's toothbrush is; only where nothing is left is that refused."""
    root, path = tmp_path / "mvtec", tmp_path / "report.json"
    for name in ("brush", "carpet"):
        shutil.copytree(data / "normal", root / name / "train" / "good")
        shutil.copytree(data / "normal", root / name / "test" / "good")
        shutil.copytree(data / "anomaly", root / name / "test", dirs_exist_ok=True)
    shutil.rmtree(root / "brush" / "test" / "dot")
    sets = [f"{key}={value}" for key, value in SMALL.items()]
    asked = {"shots": 2, "seeds": "0", "method": "mahalanobis", "sets": sets, "report": path}
    research.evaluate(str(root), protocol="hard", **asked)
    report = json.loads(path.read_text())
    assert (list(report["categories"]), report["categories_left_out"]) == (["carpet"], ["brush"])
    assert "brush: one class of defects" in capsys.readouterr().err
    assert evaluate_each(options(root, seeds=(0,)))["categories_left_out"] == []
    shutil.rmtree(root / "carpet" / "test" / "dot")
    with pytest.raises(DatasetError, match="brush has 1 class"):  # before anything is trained on
        evaluate_each(options(root, protocol="hard"), lambda *said: pytest.fail(str(said)))


def test_changed_pixels_under_the_same_names_are_seen(data, tmp_path, monkeypatch):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    path = tmp_path / "report.json"
    fits = []
    real = pipelines.evaluate._run
    monkeypatch.setattr(pipelines.evaluate, "_run", lambda s, *r: fits.append(0) or real(s, *r))
    evaluate(options(copy, report=path, seeds=(0,)))
    Image.new("RGB", (64, 64), (9, 9, 9)).save(copy / "normal" / "3.png")
    evaluate(options(copy, report=path, seeds=(0,)))
    assert len(fits) == 2


@pytest.mark.parametrize("method", ["mahalanobis-all", "dpdl"])
def test_changed_weights_under_the_same_path_are_seen(data, tmp_path, method):
    weights, path = tmp_path / "weights.pth", tmp_path / "report.json"
    small = TINY if method == "dpdl" else SMALL
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), weights)
        report = evaluate(
            options(
                data,
                report=path,
                seeds=(0,),
                method=method,
                overrides=small | {"weights": str(weights)},
            )
        )
        want = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert report["settings"]["weights_sha256"] == want
    runs = [p.with_suffix(".json") for p in path.with_suffix(".runs").glob("*.npz")]
    first, second = (json.loads(run.read_text())["scores"] for run in runs)
    assert first != second


def test_the_weights_of_the_package_have_a_hash_in_the_report():
    """Of what is loaded: the package may be another one tomorrow under the same name."""
    pytest.importorskip(features.PACKAGE_MODULE)
    network = features.load_network(features.PACKAGE_TRUNK, "package")
    want = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        want.update(name.encode() + tensor.numpy().tobytes())
    for method in ("dpdl", "mahalanobis"):
        made = evaluate_methods.make_method(method, "edge", {}, "cpu", shots=1)
        assert json.loads(made.settings)["weights_sha256"] == want.hexdigest()


def test_broken_files_are_left_out_and_listed(data, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    (copy / "normal" / "2.png").write_bytes(b"scratched disk")
    (copy / "anomaly" / "dot" / "0.png").write_bytes(b"")
    report = evaluate(options(copy, seeds=(0,)))
    assert (report["normals"], report["anomalies"]) == (15, 11)
    assert [r["source"] for r in report["rejected"]] == ["normal/2.png", "anomaly/dot/0.png"]


def test_strips_without_a_mask_are_listed_with_what_does_not_decode(data, tmp_path):
    picture = np.full((256, 512, 3), 90, np.uint8)
    for i, folder in enumerate(["NODefect_images"] * 4 + ["Defect_images"] * 3):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(picture + np.uint8(i)).save(tmp_path / folder / f"{i}_019.png")
    (tmp_path / "Mask_images").mkdir()
    for i in (4, 5):
        Image.fromarray(picture).save(tmp_path / "Mask_images" / f"{i}_019_mask.png")
    report = evaluate(options(tmp_path, seeds=(0,), method="knn"))
    assert (report["normals"], report["anomalies"]) == (8, 4)
    assert [r["source"] for r in report["rejected"]] == ["Defect_images/6_019.png"]


def test_what_was_left_out_is_said_by_the_command(data, tmp_path, capsys):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    for i in range(2):
        (copy / "normal" / f"{i}.png").write_bytes(b"scratched disk")
    sets = [f"{key}={value}" for key, value in SMALL.items()]
    research.evaluate(str(copy), shots=2, seeds="0", method="knn", sets=sets)
    said = capsys.readouterr()
    assert "2 images left out, the first: normal/0.png: not-an-image: starts with" in said.err
    assert "auroc" in said.out


def test_too_few_images_say_what_was_left_out(data, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    for path in (copy / "anomaly").rglob("*.png"):
        path.write_bytes(b"")
    message = "has no anomalies.*; 12 images left out, the first: anomaly/blot/0.png: empty"
    with pytest.raises(DatasetError, match=message):
        evaluate(options(copy))


def test_a_full_disk_is_told_before_it_is_written(data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"28 images of 64 px take 0\.000344 GB .* set TMPDIR"):
        evaluate(options(data))


def test_progress_rises_to_one_and_names_the_seed(data):
    calls = []
    evaluate(options(data), lambda stage, share, figures: calls.append((stage, share, figures)))
    shares = [share for _, share, _ in calls]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert any("seed 1" in stage for stage, _, _ in calls)
    assert "auroc" in calls[-1][2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "one of dpdl, mahalanobis"),
        ({"recipe": "soup"}, "edge"),
        ({"overrides": {"flavour": "sweet"}}, "flavour"),
        ({"method": "knn", "overrides": {"bank": "many"}}, "whole number"),
        ({"overrides": {"iterations": "7"}}, "iterations: no setting of mahalanobis-all; there"),
        ({"method": "devnet", "overrides": {"bank": "7"}}, "are .*image_size, iterations, max"),
        ({"method": "dpdl", "overrides": {"renew_min_new": "5"}}, "would do nothing: no normals"),
        (
            {"method": "dpdl", "shots": 0, "overrides": TINY | {"tuned_stages": "2"}},
            "shots=0: tuned_stages would do nothing",
        ),
        ({"without": ("heads",)}, "mahalanobis-all has no such parts"),
        (
            {"method": "dpdl", "without": ("head",)},
            "without=head: no such part; there are prototypes, .*, head anomaly, head normal",
        ),
        (
            {"method": "dpdl", "without": ("heads", "directions", "prototypes")},
            "no part of the score would be left",
        ),
        ({"method": "dpdl", "shots": 0, "without": ("prototypes",)}, "no part of the score"),
        (
            {"method": "dpdl", "shots": 0, "without": ("heads",)},
            "without head anomaly, head normal, head residual would do nothing",
        ),
        (
            {"method": "dpdl", "shots": 0, "recipe": "paper", "overrides": {"kappa": "3"}},
            "shots=0: kappa would do nothing",
        ),
        ({"method": "dpdl", "overrides": {"flavour": "sweet"}}, "flavour"),
        ({"shots": 12}, "12 anomalies and the test needs one: shots=12 can be 11 at most"),
        ({"protocol": "hard", "shots": 7}, "6 anomalies"),
        ({"data": "/nowhere"}, "no such folder"),
    ],
)
def test_refusals_come_in_one_line(data, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(options(**{"data": data, **changes}))
    assert "\n" not in str(error.value)


def test_too_few_classes_for_the_hard_setting(data, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "anomaly" / "dot")
    with pytest.raises(DatasetError, match="two or more"):
        evaluate(options(copy, protocol="hard"))


def test_the_report_states_the_settings_that_ran(data, tmp_path, capsys):
    path = tmp_path / "report.json"
    sets = [f"{key}={value}" for key, value in TINY.items()]
    research.evaluate(
        str(data), shots=0, seeds="0", recipe="paper", sets=[*sets, "folds=2"], report=path
    )
    settings = json.loads(path.read_text())["settings"]
    assert (settings["recipe"], settings["tuned_stages"], settings["rotate"]) == ("paper", 0, False)
    assert "without anomalies nothing is tuned" in capsys.readouterr().err
    settings = evaluate(options(data, seeds=(0,)))["settings"]
    assert set(settings) == {"method", *SMALL, "device", "weights_sha256"}


def test_parts_that_are_left_out_count_for_nothing(data, monkeypatch):
    """Oracle: the shares of the parts that are left, by the weights of the fit, added up."""
    models, weights = [], []
    real = evaluate_methods.fit

    def watched(*args, **kwargs):
        models.append(real(*args, **kwargs))
        weights.append(models[-1].weights.clone())
        return models[-1]

    monkeypatch.setattr(evaluate_methods, "fit", watched)
    asked = {"method": "dpdl", "seeds": (0,), "overrides": TINY}
    report = evaluate(options(data, **asked, without=("directions", "patch 3", "head normal")))
    (model,) = models
    gone = ["patch 3", "seen 4", "head normal"]
    assert report["settings"]["without"] == gone
    assert model.part_names == [n for g in part_groups(model.config).values() for n in g]
    left = [i for i, name in enumerate(model.part_names) if name not in gone]
    test = protocol.split(load_dataset(data), setting="general", shots=2, seed=0).test
    found = model.score(torch.from_numpy(decode_samples(test, 64)[0]))
    shares = evidence(torch.stack(list(found.parts.values()), 1), 2) * weights[0]
    assert (weights[0] > 0).all()
    torch.testing.assert_close(found.score, shares[:, left].sum(1))
    assert report["auroc"]["mean"] == auroc([s.label for s in test], found.score)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="seeds"):
        EvaluateOptions(data="elpv", seeds=())
    with pytest.raises(ValueError, match="seeds"):
        EvaluateOptions(data="elpv", seeds=(1, 1))
    with pytest.raises(ValueError, match="general or hard"):
        EvaluateOptions(data="elpv", protocol="soft")
    for method in ("devnet", "dra"):
        with pytest.raises(ValueError, match=f"{method} .* M=0: need at least 1"):
            EvaluateOptions(data="elpv", method=method, shots=0)
    EvaluateOptions(data="elpv", method="tails", shots=0)
    for seed in (-1, 2**31, 20261128123456):
        with pytest.raises(ValueError, match="from 0 to 2147483647"):
            EvaluateOptions(data="elpv", seeds=(0, seed))


def test_reports_that_could_not_be_written(tmp_path, monkeypatch):
    """Not after hours of training."""
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "x.PNG", r"name it .*x\.json"),
        (tmp_path / "x.runs", r"name it .*x\.json"),
        (tmp_path / "file" / "deep" / "x.json", r"nothing can be written in .*file"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateOptions(data="elpv", report=path)
    EvaluateOptions(data="elpv", report=tmp_path / "new" / "x.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs this, root too
    with pytest.raises(ValueError, match="nothing can be written in"):
        EvaluateOptions(data="elpv", report=tmp_path / "x.json")


def test_pictures_are_of_the_best_and_the_worst():
    images = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    labels = [0] * 5 + [1] * 7
    scores = np.array([5, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 0.5])
    shown = RunPictures.choose(images, list(range(12)), labels, scores, None)
    groups = {name: shown.scores[shown.groups == g].tolist() for g, name in enumerate(GROUPS)}
    assert groups["anomalies found best"] == [15, 14, 13, 12]
    assert groups["anomalies missed worst"] == [0.5, 10, 11]
    assert groups["normals nearest to an alarm"] == [5, 4, 3, 2]
    assert groups["normals most normal"] == [1]
    assert shown.images[0, 0, 0, 0] == 10  # the image that scored 15
    assert len(shown.scores) <= len(GROUPS) * PER_GROUP


def test_pictures_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (9, 4, 4, 3), dtype=np.uint8)
    maps = rng.random((9, 2, 2), dtype=np.float32)
    shown = RunPictures.choose(images, list(range(9)), [0] * 4 + [1] * 5, np.arange(9.0), maps)
    shown.save(tmp_path / "a.npz")
    back = RunPictures.load(tmp_path / "a.npz")
    assert np.array_equal(back.images, shown.images)
    assert back.maps is not None
    assert np.array_equal(back.maps, shown.maps)


def test_overlay_leaves_cold_places_alone():
    image = np.full((8, 8, 3), 100, np.uint8)
    heat = np.zeros((2, 2), np.float32)
    assert np.array_equal(overlay(image, heat, 1.0), image)
    heat[0, 0] = 1
    changed = overlay(image, heat, 1.0)
    assert not np.array_equal(changed[0, 0], image[0, 0])
    assert np.array_equal(changed[-1, -1], image[-1, -1])
