"""Dealing, Parquet and names, without a store."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpdl_core import protocol
from dpdl_core.protocol import Dataset, Sample, Split
from infra.errors import DataError, ServiceUnavailable
from infra.settings import Settings
from pipelines import datasets
from pipelines.dataset_index import DatasetIndex, Part, check_name
from pipelines.datasets import SCHEMA, _parquet, _row, _rows
from pipelines.dealing import Tally, deal, look_at, with_twins


def samples(count, label):
    kind = "spot" if label else ""
    return [Sample(label, kind, f"{kind or 'normal'}/{i}", data=b"x") for i in range(count)]


def paper_split(normals=40):
    return Split(
        "plates", "general", 3, 7, None, samples(normals, 0), samples(3, 1), samples(5, 1)[3:]
    )


def test_a_share_of_the_training_normals_is_held_out_and_no_defect():
    dealt = deal(paper_split(), 0.2, ())
    assert len(dealt["calibration"]) == 8
    names = {part: {s.source for s in some} for part, some in dealt.items()}
    assert not names["train"] & names["calibration"]
    assert {s.label for s in dealt["calibration"]} == {0}
    assert sum(s.label for s in dealt["train"]) == 3
    again = deal(paper_split(), 0.2, ())
    assert again == dealt  # by the split's seed, not by chance


def test_normals_that_are_to_arrive_later_are_left_out():
    later = {"normal/3", "normal/4"}
    dealt = deal(paper_split(), 0.25, later)
    found = {s.source for s in dealt["train"] + dealt["calibration"]}
    assert not found & later
    assert len(found) == 38 + 3


def test_too_few_normals_to_hold_any_out_are_refused():
    with pytest.raises(DataError, match="more images"):
        deal(paper_split(normals=2), 0.2, ())


@pytest.mark.parametrize(
    ("camera", "error", "words"),
    [("", ServiceUnavailable, "S3"), (" line 1", ValueError, "blanks at its ends")],
)
def test_what_stands_in_the_way_of_an_import_is_told_before_images_are_read(
    tmp_path, monkeypatch, camera, error, words
):
    def looked(*_):
        raise AssertionError("the images were looked at")

    monkeypatch.setattr(datasets, "look_at", looked)
    for kind in ("normal", "anomaly/spot"):
        (tmp_path / kind).mkdir(parents=True)
        (tmp_path / kind / "a.png").write_bytes(png(1))
    settings = Settings(s3={"endpoint": "127.0.0.1:9", "access_key": "a", "secret_key": "b"})
    with pytest.raises(error, match=words):
        datasets.import_dataset(settings, tmp_path, "plates", camera=camera)


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def found(normals, anomalies, tests=None):
    """A data set of names and bytes."""
    normal = [Sample(0, "", name, data=data) for name, data in normals.items()]
    anomaly = [Sample(1, "spot", name, data=data) for name, data in anomalies.items()]
    test = None if tests is None else [Sample(0, "", n, data=d) for n, d in tests.items()]
    return Dataset("plates", normal, test, anomaly)


def test_each_image_is_imported_once_and_its_copies_are_named():
    dataset = found(
        {"a": png(1), "b": png(2), "c": png(1), "d": b"none"},
        {"x": png(3), "y": png(3)},
        tests={"s": png(2), "t": png(4)},
    )
    tally = Tally(16, None)
    usable, looks = look_at(dataset, tally)
    assert [s.source for s in usable.normals] == ["a", "b"]
    assert [s.source for s in usable.test_normals] == ["t"]  # b is learnt: s would pass for unseen
    assert [s.source for s in usable.anomalies] == ["x"]
    assert set(looks) == {"a", "b", "t", "x"}
    assert tally.skipped == [
        {"source": "c", "reason": "duplicate of a"},
        {"source": "d", "reason": "not-an-image"},
        {"source": "s", "reason": "duplicate of b"},
        {"source": "y", "reason": "duplicate of x"},
    ]


def test_an_image_that_is_a_normal_and_a_defect_is_for_a_person():
    dataset = found({"normal/a": png(1), "normal/b": png(2)}, {"anomaly/x": png(2)})
    with pytest.raises(DataError, match="normal/b and anomaly/x: remove the wrong one"):
        look_at(dataset, Tally(3, None))


def plate(scene, taken):
    """A smooth picture of one scene; each time taken with other noise."""
    coarse = np.random.default_rng(scene).integers(60, 190, (4, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))
    noisy = smooth + np.random.default_rng([scene, taken]).normal(0, 3, smooth.shape)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("tests", [None, {f"t{i}": plate(900 + i, 0) for i in range(9)}])
def test_pictures_of_one_scene_are_dealt_to_one_part_and_the_parts_keep_their_sizes(tests):
    """Names say nothing of scenes. Defects too: their twins in the test are no unseen ones."""
    pictures = [plate(scene, taken) for scene in range(40) for taken in range(3)]
    order = np.random.default_rng(0).permutation(len(pictures))
    scene_of = {f"n{at}": n // 3 for at, n in enumerate(order)}
    defects = {f"d{at}": plate(100 + at // 2, at) for at in range(20)}
    scene_of |= {name: 100 + at // 2 for at, name in enumerate(defects)}
    named = {f"n{at}": pictures[n] for at, n in enumerate(order)}
    usable, looks = look_at(found(named, defects, tests), Tally(300, None))
    split = protocol.split(usable, setting="general", shots=10, seed=0)
    one_by_one = deal(split, 0.2, ())
    dealt = with_twins(one_by_one, looks, fixed_test=tests is not None)

    def divided(parts):
        places = {}
        for part, samples in parts.items():
            for sample in samples:
                places.setdefault(scene_of.get(sample.source), set()).add(part)
        return sum(len(each) > 1 for scene, each in places.items() if scene is not None)

    assert divided(one_by_one) > 20
    assert divided(dealt) <= 2
    for part in dealt:
        labels = [sorted(s.label for s in parts[part]) for parts in (one_by_one, dealt)]
        assert labels[0] == labels[1]
    if tests:
        assert {s.source for s in dealt["test"] if s.label == 0} == set(tests)


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_no_twin_of_a_learnt_defect_is_tested_however_few_are_learnt(shots):
    """Half of the defects are pictured twice."""
    defects = {f"d{at}": plate(100 + at // 2, at) for at in range(12)}
    defects |= {f"e{at}": plate(200 + at, 0) for at in range(12)}
    normal = {f"n{at}": plate(at, 0) for at in range(30)}
    usable, looks = look_at(found(normal, defects), Tally(60, None))
    for seed in range(6):
        split = protocol.split(usable, setting="general", shots=shots, seed=seed)
        dealt = with_twins(deal(split, 0.2, ()), looks, fixed_test=False)
        learnt, tested = (
            {s.source for s in dealt[part] if s.label == 1} for part in ("train", "test")
        )
        assert (len(learnt), len(tested)) == (shots, 24 - shots)
        for at in range(0, 12, 2):
            assert len({f"d{at}", f"d{at + 1}"} & learnt) != 1


def test_one_picture_many_times_still_fills_every_part():
    named = {f"n{taken}": plate(0, taken) for taken in range(40)}
    usable, looks = look_at(found(named, {"d": plate(1, 0), "e": plate(2, 0)}), Tally(90, None))
    dealt = with_twins(
        deal(protocol.split(usable, setting="general", shots=1, seed=0), 0.2, ()),
        looks,
        fixed_test=False,
    )
    assert {part: len(samples) for part, samples in dealt.items()} == {
        "train": 24 + 1,
        "calibration": 6,
        "test": 10 + 1,
    }


def test_a_file_that_changes_under_an_import_ends_it():
    dataset = found({"a": png(1), "b": png(2)}, {})
    _, looks = look_at(dataset, Tally(4, None))
    assert len(list(_rows(dataset.normals, looks, Tally(2, None), ""))) == 2
    changed = found({"a": png(1), "b": png(9)}, {})
    with pytest.raises(DataError, match="b has changed"):
        list(_rows(changed.normals, looks, Tally(2, None), ""))


def test_the_same_rows_are_the_same_bytes_in_the_groups_given():
    rows = [_row(bytes([i]) * 100, 0, "", "cam-1", 10**18 + i, f"{i}") for i in range(10)]
    groups = [rows[:4], rows[4:8], rows[8:]]
    data = _parquet(groups)
    assert data == _parquet(groups)
    file = pq.ParquetFile(io.BytesIO(data))
    found = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert found == [4, 4, 2]
    assert file.schema_arrow.equals(SCHEMA)
    table = file.read().to_pylist()
    assert [row["image"] for row in table] == [row["image"] for row in rows]
    assert table[3]["captured_at"].value == 10**18 + 3


def test_an_index_reads_back_as_it_was_written():
    part = Part("plates/train/part-0.parquet", "etag", 4, 100, 0)
    index = DatasetIndex(
        name="plates",
        origin="plates",
        licence="",
        setting="general",
        shots=3,
        seed=7,
        seen_class=None,
        split_sha256="ab",
        calibration_share=0.2,
        parts={"train": [part], "calibration": [], "test": []},
        skipped=[{"source": "a", "reason": "empty"}],
    )
    assert DatasetIndex.from_json(index.to_json()) == index
    assert index.counts()["train"] == {"normal": 4, "anomaly": 0}
    assert index.keys("train", 1) == []


@pytest.mark.parametrize("name", ["", "Plates", "a/b", "../up", ".hidden", "a" * 64])
def test_names_that_would_leave_their_prefix_are_refused(name):
    with pytest.raises(DataError, match="lower-case"):
        check_name(name)
