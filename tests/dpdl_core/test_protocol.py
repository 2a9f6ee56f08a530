"""Splits: who is seen, who is tested, and that two machines agree about it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdl_core.protocol import (
    Dataset,
    DatasetError,
    Sample,
    Split,
    decode_samples,
    load_dataset,
    split,
)


def made(normals=40, anomalies=None, test_normals=None) -> Dataset:
    classes = anomalies or {"crack": 12, "hole": 9}
    return Dataset(
        "made",
        [Sample(0, "", f"n{i:03}", data=b"") for i in range(normals)],
        None
        if test_normals is None
        else [Sample(0, "", f"t{i:03}", data=b"") for i in range(test_normals)],
        [Sample(1, c, f"{c}/{i:03}", data=b"") for c, n in classes.items() for i in range(n)],
    )


def names(samples) -> set[str]:
    return {sample.source for sample in samples}


def test_general_setting_parts_everything_once():
    data = made()
    found = split(data, setting="general", shots=10, seed=0)
    parts = [found.train_normals, found.train_anomalies, found.test]
    assert [len(p) for p in parts] == [30, 10, 10 + 11]
    assert sum(map(len, parts)) == len(set().union(*map(names, parts))) == 40 + 21
    assert all(s.label == 1 for s in found.train_anomalies)


def test_normals_are_split_as_in_the_published_code():
    """Oracle: 3:1 by numpy's permutation under seed 42, which is what train_test_split draws."""
    found = split(made(), setting="general", shots=1, seed=7)
    order = np.random.RandomState(42).permutation(40)
    assert {f"n{i:03}" for i in order[:10]} == {s.source for s in found.test if s.label == 0}


def test_seed_moves_the_anomalies_and_never_the_normals():
    a, b = (split(made(), setting="general", shots=5, seed=s) for s in (0, 1))
    assert names(a.train_normals) == names(b.train_normals)
    assert names(a.train_anomalies) != names(b.train_anomalies)
    assert a == split(made(), setting="general", shots=5, seed=0)


def test_hard_setting_takes_the_seen_class_out_of_the_test():
    found = split(made(), setting="hard", shots=5, seed=0, seen_class="crack")
    assert {s.defect for s in found.train_anomalies} == {"crack"}
    assert {s.defect for s in found.test} == {"", "hole"}
    assert len(found.test) == 10 + 9


def test_a_data_set_with_its_own_split_keeps_it():
    found = split(made(test_normals=5), setting="general", shots=1, seed=0)
    assert len(found.train_normals) == 40
    assert {s.source for s in found.test if s.label == 0} == {f"t{i:03}" for i in range(5)}


@pytest.mark.parametrize("defects", [0, 1, 3])
def test_where_no_test_needs_one_all_defects_may_be_seen(defects):
    data = made(anomalies={"one": defects})
    found = split(data, setting="general", shots=defects, seed=0, defects_in_test=False)
    assert len(found.train_anomalies) == defects
    assert {sample.label for sample in found.test} == {0}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (made(anomalies={"one": 20}), {"setting": "hard", "seen_class": "one"}, "two or more"),
        (made(), {"setting": "hard", "seen_class": "dent"}, "one of crack, hole"),
        (made(), {"setting": "hard", "seen_class": None}, "one of crack, hole"),
        (made(), {"setting": "general", "seen_class": "hole"}, "hard setting"),
        (made(), {"setting": "general", "shots": 21}, "21 .* test needs one: .* be 20 at most"),
        (
            made(anomalies={"one": 0}),
            {"setting": "general", "shots": 0},
            "no anomalies, and the test",
        ),
        (
            made(anomalies={"one": 2}),
            {"setting": "general", "shots": 3, "defects_in_test": False},
            "2 anomalies: shots=3 can be 2 at most",
        ),
        (made(), {"setting": "hard", "seen_class": "hole"}, "9 anomalies in hole: .* be 9 at most"),
        (made(normals=3), {"setting": "general"}, "3 normals"),
        (made(normals=0, test_normals=5), {"setting": "general"}, "no normals to train on"),
        (made(test_normals=0), {"setting": "general"}, "none to test on.*test/good"),
    ],
)
def test_splits_that_cannot_be(data, options, message):
    with pytest.raises(DatasetError, match=message) as error:
        split(data, **{"shots": 10, "seed": 0, **options})
    assert "\n" not in str(error.value)


def test_saved_and_read_back(tmp_path: Path):
    found = split(made(), setting="hard", shots=5, seed=3, seen_class="hole")
    found.save(tmp_path / "a" / "split.json")
    assert Split.load(tmp_path / "a" / "split.json", made()) == found


def test_hash_changes_with_every_part(tmp_path: Path):
    base = {"setting": "general", "shots": 5, "seed": 0}
    others = [
        split(made(), **base),
        split(made(), **{**base, "seed": 1}),
        split(made(), **{**base, "shots": 6}),
        split(made(normals=41), **base),
        split(made(), setting="hard", shots=5, seed=0, seen_class="hole"),
    ]
    assert len({s.sha256 for s in others}) == len(others)


def test_a_split_of_other_images_is_refused(tmp_path: Path):
    path = tmp_path / "split.json"
    split(made(), setting="general", shots=5, seed=0).save(path)
    with pytest.raises(DatasetError, match="not in made, the first is"):
        Split.load(path, made(normals=20))
    document = json.loads(path.read_text())
    document["seed"] = 9
    path.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="differ"):
        Split.load(path, made())


def test_undecodable_files_are_listed_and_the_rest_goes_on(tmp_path: Path):
    root = tmp_path / "set"
    (root / "normal").mkdir(parents=True)
    for i in range(4):
        grey = np.full((20, 30, 3), 50 * i, np.uint8)
        Image.fromarray(grey).save(root / "normal" / f"{i}.png")
    (root / "anomaly").mkdir()
    (root / "anomaly" / "0.png").write_bytes(b"never read")
    (root / "normal" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "normal" / "2.png").write_bytes(b"")
    samples = load_dataset(root).normals
    calls = []
    images, kept, rejected = decode_samples(samples, 16, progress=lambda *c: calls.append(c))
    assert [s.source for s in kept] == ["normal/0.png", "normal/3.png"]
    assert images[:, 0, 0, 0].tolist() == [0, 150]
    assert [(r.source, r.reason.split(":")[0]) for r in rejected] == [
        ("normal/1.png", "truncated"),
        ("normal/2.png", "empty"),
    ]
    assert calls[-1] == (4, 4)


def test_samples_read_bytes_from_memory_or_disk(tmp_path: Path):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"abc")
    assert Sample(0, "", "x", path=path).read() == b"abc"
    assert Sample(0, "", "x", data=b"abc").read() == b"abc"
    with pytest.raises(ValueError, match="path or data"):
        Sample(0, "", "x").read()
