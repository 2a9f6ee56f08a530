"""Every layout on a small generated copy: counts, labels, classes, boxes; ELPV on the real one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdl_core.protocol import (
    Categories,
    Dataset,
    DatasetError,
    Sample,
    decode_samples,
    load_dataset,
    split,
)


def draw(path: Path, width=24, height=20, value=90, marks=()) -> None:
    """A grey picture with white boxes (left, top, right, bottom)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), value, np.uint8)
    for left, top, right, bottom in marks:
        pixels[top:bottom, left:right] = 255
    image = Image.fromarray(pixels)
    (image.convert("L") if "mask" in path.stem or "label" in path.stem else image).save(path)


def counts(data: Dataset) -> tuple[int, int | None, int, list[str]]:
    tests = None if data.test_normals is None else len(data.test_normals)
    return len(data.normals), tests, len(data.anomalies), data.defects


def all_decode(data: Dataset) -> None:
    samples = [*data.normals, *(data.test_normals or []), *data.anomalies]
    assert {s.label for s in samples} == {0, 1}
    assert all(bool(s.defect) == bool(s.label) for s in samples)
    assert decode_samples(samples, 32)[2] == []


def test_plain_folders(tmp_path):
    for i in range(5):
        draw(tmp_path / "normal" / f"{i}.PNG")
    draw(tmp_path / "anomaly" / "crack" / "0.jpg")
    draw(tmp_path / "anomaly" / "hole" / "0.jpg")
    draw(tmp_path / "anomaly" / "loose.bmp")
    (tmp_path / "normal" / "notes.txt").write_text("not an image")
    (tmp_path / "normal" / ".hidden.png").write_text("")
    data = load_dataset(tmp_path)
    assert counts(data) == (5, None, 3, ["anomaly", "crack", "hole"])
    all_decode(data)


@pytest.mark.parametrize(
    ("nested", "inner", "outer"),
    [
        ("normal/monday/b.png", "normal/monday/", "normal/"),
        ("normal/monday/cam1/b.png", "normal/monday/cam1/", "normal/"),
        ("anomaly/tile/crack/d.png", "anomaly/tile/crack/", "anomaly/tile/"),
    ],
)
def test_images_deeper_than_the_layout_are_named(tmp_path, nested, inner, outer):
    draw(tmp_path / "normal" / "a.png")
    draw(tmp_path / "anomaly" / "tile" / "c.png")
    (tmp_path / "normal" / "empty" / "notes").mkdir(parents=True)
    draw(tmp_path / "normal" / ".ipynb_checkpoints" / "a.png")
    draw(tmp_path / "anomaly" / ".ipynb_checkpoints" / "c.png")
    assert counts(load_dataset(tmp_path)) == (1, None, 1, ["tile"])
    draw(tmp_path / nested)
    with pytest.raises(DatasetError) as error:
        load_dataset(tmp_path)
    assert f"{inner} holds 1 images" in str(error.value)
    assert f"directly into {outer}," in str(error.value)


def grow(root: Path, names: str) -> None:
    for name in names.split():
        draw(root / name)


MVTEC = "train/good/a.png test/good/a.png test/cut/a.png"
KVASIR = "upper-gi-tract/anatomical-landmarks/pylorus/a.png"
KVASIR += " upper-gi-tract/pathological-findings/ulcer/a.png"


@pytest.mark.parametrize(
    ("layout", "astray", "message"),
    [
        (
            MVTEC,
            "test/b.png",
            r"test/ holds 1 images .* b\.png; put them into test/good/ or test/<",
        ),
        (
            MVTEC,
            "train/b.png",
            "train/ holds 1 images .* put them into train/good/, or into test/<",
        ),
        (MVTEC, "train/cut/b.png", "train/cut/ holds 1 images .* put them into train/good/, or"),
        ("no/a.png yes/a.png", "yes/glioma/b.png", "yes/glioma/ .* put them directly into yes/,"),
        (
            KVASIR,
            "upper-gi-tract/anatomical-landmarks/b.png",
            "landmarks/ holds 1 .* put them into anatomical-landmarks/<landmark>/",
        ),
        (
            KVASIR,
            "upper-gi-tract/anatomical-landmarks/pylorus/deep/b.png",
            "pylorus/deep/ holds 1 images .* put them directly into .*/pylorus/, or elsewhere",
        ),
    ],
)
def test_images_that_no_label_is_known_of_are_named(tmp_path, layout, astray, message):
    grow(tmp_path, layout)
    load_dataset(tmp_path)
    grow(tmp_path, astray)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["normal", "nok/crack"], "images in anomaly/<class>/, and passed over nok/:"),
        (
            ["train/good", "defects"],
            r"looked for images in test/<class>/, and passed over defects/",
        ),
    ],
)
def test_where_no_anomaly_is_found_folders_are_named(tmp_path, folders, message):
    """ "shots=10 asks for more: lower it" would lead nowhere."""
    for folder in folders:
        draw(tmp_path / folder / "a.png")
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path)


@pytest.mark.parametrize("empty", [(), ("anomaly",), ("anomaly/crack", "notes")])
def test_a_line_may_begin_without_a_defect(tmp_path, empty):
    draw(tmp_path / "normal" / "a.png")
    for folder in empty:
        (tmp_path / folder).mkdir(parents=True)
    assert counts(load_dataset(tmp_path)) == (1, None, 0, [])


def test_files_of_no_kind_that_is_read_are_named(tmp_path):
    draw(tmp_path / "normal" / "a.png")
    (tmp_path / "anomaly" / "crack").mkdir(parents=True)
    (tmp_path / "anomaly" / "crack" / "b.heic").write_bytes(b"ftypheic")
    message = r"anomaly/crack/ holds 1 files of no kind that is read, the first is b\.heic"
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path)


def test_all_that_is_decoded_is_found(tmp_path):
    kinds = {"png": "PNG", "jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "gif": "GIF"}
    kinds |= {"webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "pnm": "PPM"}
    draw(tmp_path / "anomaly" / "a.png")
    (tmp_path / "normal").mkdir()
    for ending, kind in kinds.items():
        Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "normal" / f"a.{ending}", format=kind)
    Image.new("1", (9, 9)).save(tmp_path / "normal" / "a.pbm", format="PPM")
    data = load_dataset(tmp_path)
    assert len(data.normals) == len(kinds) + 1
    all_decode(data)


def test_a_folder_goes_by_its_name_from_wherever_it_is_called(tmp_path, monkeypatch):
    tiles = tmp_path / "tiles"
    for i in range(4):
        draw(tiles / "normal" / f"{i}.png")
        draw(tiles / "anomaly" / f"{i}.png")
    monkeypatch.chdir(tiles / "normal")
    (tmp_path / "link").symlink_to(tiles)
    splits = []
    for path, name in ((tiles, "tiles"), (Path(".."), "tiles"), (tmp_path / "link", "link")):
        data = load_dataset(path)
        assert data.name == name
        splits.append(split(data, setting="general", shots=1, seed=0).sha256)
    assert len(set(splits)) == 1


def test_mvtec_category(tmp_path):
    for i in range(4):
        draw(tmp_path / "carpet" / "train" / "good" / f"{i:03}.png")
    for i in range(2):
        draw(tmp_path / "carpet" / "test" / "good" / f"{i:03}.png")
    for defect in ("cut", "hole"):
        draw(tmp_path / "carpet" / "test" / defect / "000.png")
        draw(tmp_path / "carpet" / "ground_truth" / defect / "000_mask.png")
    data = load_dataset(tmp_path / "carpet")
    assert counts(data) == (4, 2, 2, ["cut", "hole"])
    all_decode(data)
    assert counts(load_dataset(tmp_path)) == counts(data)
    draw(tmp_path / "tile" / "train" / "good" / "000.png")
    with pytest.raises(Categories, match=r"2 MVTec AD categories; name one: .*carpet"):
        load_dataset(tmp_path)


def test_dagm_pools_its_classes(tmp_path):
    for c in ("Class1", "Class2"):
        for part in ("Train", "Test"):
            for i in range(3):
                draw(tmp_path / c / part / f"{i:04}.PNG")
            draw(tmp_path / c / part / "Label" / "0001_label.PNG")
    data = load_dataset(tmp_path)
    assert counts(data) == (8, None, 4, ["defect"])
    assert data.anomalies[0].source == "Class1/Test/0001.PNG"
    all_decode(data)


def test_dagm_without_its_labels_is_not_all_normal(tmp_path):
    draw(tmp_path / "Class1" / "Train" / "0001.PNG")
    draw(tmp_path / "Class1" / "Train" / "Label" / "0001_label.PNG")
    draw(tmp_path / "Class1" / "Test" / "0001.PNG")
    with pytest.raises(DatasetError, match="Class1/Test/Label/ holds no images"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("above", ["set", "set/set"])
def test_a_folder_in_a_folder_is_looked_into(tmp_path, above):
    for name in ("normal/0.png", "normal/1.png", "anomaly/dent/0.png"):
        draw(tmp_path / above / name)
    (tmp_path / "README.txt").write_text("where it comes from")
    assert counts(load_dataset(tmp_path)) == (2, None, 1, ["dent"])
    draw(tmp_path / "other" / "0.png")
    with pytest.raises(DatasetError, match=r"found README\.txt, other, set; wanted"):
        load_dataset(tmp_path)


def test_categories_in_a_folder_of_their_own(tmp_path):
    draw(tmp_path / "mvtec" / "bottle" / "train" / "good" / "0.png")
    draw(tmp_path / "mvtec" / "cable" / "train" / "good" / "0.png")
    with pytest.raises(Categories) as found:
        load_dataset(tmp_path / "mvtec")
    assert found.value.names == ["bottle", "cable"]
    with pytest.raises(DatasetError, match=r"categories are in .*/mvtec: name that"):
        load_dataset(tmp_path)


def test_a_class_that_cannot_be_read_does_not_vanish(tmp_path):
    for name in ("normal/0.png", "anomaly/dent/0.png"):
        draw(tmp_path / name)
    (tmp_path / "anomaly" / "none").mkdir()
    (tmp_path / "anomaly" / "none" / "Thumbs.db").write_bytes(b"")
    assert counts(load_dataset(tmp_path)) == (1, None, 1, ["dent"])
    (tmp_path / "anomaly" / "scratch").mkdir()
    (tmp_path / "anomaly" / "scratch" / "a.heic").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"anomaly/scratch/ holds 1 files .* a\.heic; wanted"):
        load_dataset(tmp_path)


def test_kolektor_is_cut_in_three(tmp_path):
    # 500 x 1250 in small: 50 x 125; the defect lies in the second third, 42..83
    draw(tmp_path / "kos01" / "Part0.jpg", 50, 125)
    draw(tmp_path / "kos01" / "Part0_label.bmp", 50, 125, 0, [(10, 50, 20, 60)])
    draw(tmp_path / "kos02" / "Part0.jpg", 50, 125)
    draw(tmp_path / "kos02" / "Part0_label.bmp", 50, 125, 0)
    data = load_dataset(tmp_path)
    assert counts(data) == (5, None, 1, ["defect"])
    assert data.anomalies[0].crop == (0, 42, 50, 83)
    assert data.anomalies[0].source == "kos01/Part0.jpg#0,42,50,83"
    boxes = sorted(s.crop for s in data.normals if s.source.startswith("kos02"))
    assert boxes == [(0, 0, 50, 42), (0, 42, 50, 83), (0, 83, 50, 125)]
    all_decode(data)


def test_kolektor_without_a_mask_says_which(tmp_path):
    draw(tmp_path / "kos01" / "Part0.jpg", 50, 125)
    with pytest.raises(DatasetError, match=r"Part0_label\.bmp"):
        load_dataset(tmp_path)


def test_aitex_is_cut_in_patches(tmp_path):
    draw(tmp_path / "NODefect_images" / "2306881-210020u" / "0001_000_00.png", 4096, 256)
    draw(tmp_path / "Defect_images" / "0002_019_00.png", 4096, 256)
    draw(tmp_path / "Mask_images" / "0002_019_00_mask.png", 4096, 256, 0, [(500, 9, 600, 20)])
    draw(tmp_path / "Defect_images" / "0044_030_04.png", 4096, 256)
    draw(tmp_path / "Mask_images" / "0044_030_04_mask1.png", 4096, 256, 0, [(0, 0, 5, 5)])
    draw(tmp_path / "Mask_images" / "0044_030_04_mask2.png", 4096, 256, 0, [(4090, 0, 4096, 5)])
    draw(tmp_path / "Defect_images" / "0100_025_08.png", 4096, 256)  # has no mask
    draw(tmp_path / "Defect_images" / "0101_025_08.png", 4096, 256)
    draw(tmp_path / "Mask_images" / "0101_025_08_mask.png", 4096, 256, 0)
    data = load_dataset(tmp_path)
    assert counts(data) == (16, None, 3 + 2 - 1, ["019", "030"])
    found = {(s.defect, s.crop) for s in data.anomalies}
    assert found == {
        ("019", (256, 0, 512, 256)),
        ("019", (512, 0, 768, 256)),
        ("030", (0, 0, 256, 256)),
        ("030", (3840, 0, 4096, 256)),
    }
    assert [(r.source, r.reason) for r in data.left_out] == [
        ("Defect_images/0100_025_08.png", "no mask in Mask_images/: where is the defect?"),
        ("Defect_images/0101_025_08.png", "its mask marks nothing: where is the defect?"),
    ]
    all_decode(data)


@pytest.mark.parametrize(
    ("width", "edges"),
    [(512, [(0, 256), (256, 512)]), (600, [(0, 256), (256, 512), (344, 600)]), (200, [(0, 200)])],
)
def test_the_last_patch_of_a_strip_ends_where_the_strip_does(tmp_path, width, edges):
    draw(tmp_path / "NODefect_images" / "0001_000_00.png", width, 256)
    draw(tmp_path / "Defect_images" / "0002_019_00.png", width, 256)
    end = (width - 9, 0, width, 9)
    draw(tmp_path / "Mask_images" / "0002_019_00_mask.png", width, 256, 0, [end])
    data = load_dataset(tmp_path)
    assert sorted(s.crop for s in data.normals) == [(a, 0, b, 256) for a, b in edges]
    assert [s.crop for s in data.anomalies] == [(edges[-1][0], 0, width, 256)]
    all_decode(data)


def test_a_broken_picture_among_crops_is_listed_not_lost(tmp_path):
    draw(tmp_path / "kos01" / "Part0.jpg", 50, 125)
    draw(tmp_path / "kos01" / "Part0_label.bmp", 50, 125, 0, [(10, 50, 20, 60)])
    draw(tmp_path / "kos02" / "Part0.jpg", 50, 125)
    draw(tmp_path / "kos02" / "Part0_label.bmp", 50, 125, 0)
    (tmp_path / "kos02" / "Part0.jpg").write_bytes(b"gone")
    data = load_dataset(tmp_path)
    _, kept, rejected = decode_samples([*data.normals, *data.anomalies], 16)
    assert [r.source for r in rejected] == ["kos02/Part0.jpg"]
    assert len(kept) == 3


def test_elpv_folder(tmp_path):
    lines = []
    for i, (probability, kind) in enumerate(
        [("0.0", "mono"), ("0.0", "poly"), ("0.33", "mono"), ("0.67", "poly"), ("1.0", "mono")]
    ):
        draw(tmp_path / "images" / f"cell{i:04}.png")
        lines.append(f"images/cell{i:04}.png  {probability}  {kind}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    data = load_dataset(tmp_path)
    assert counts(data) == (2, None, 1, ["mono"])
    all_decode(data)
    (tmp_path / "labels.csv").write_text("images/cell0000.png yes mono\n")
    with pytest.raises(DatasetError, match=r"labels\.csv:1: found"):
        load_dataset(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="pip: elpv-dataset")
def test_the_real_elpv_has_the_counts_of_table_4():
    data = load_dataset("elpv")
    found = split(data, setting="general", shots=10, seed=0)
    normals = sum(1 for s in found.test if s.label == 0)
    assert (len(found.train_normals), normals, len(data.anomalies)) == (1131, 377, 715)
    by_class = {d: sum(s.defect == d for s in data.anomalies) for d in data.defects}
    assert by_class == {"mono": 313, "poly": 402}


def test_mastcam_arrays_take_the_colour_bands(tmp_path):
    def save(path: Path, bands: list[float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.tile(np.array(bands, np.float32), (16, 16, 1)))

    save(tmp_path / "train_typical" / "a.npy", [10, 20, 30, 99, 99, 99])
    save(tmp_path / "test_typical" / "b.npy", [10, 20, 30, 99, 99, 99])
    save(tmp_path / "test_novel" / "vein" / "c.npy", [200.4, 300, -5, 99, 99, 99])
    save(tmp_path / "test_novel" / "all" / "c.npy", [0, 0, 0, 0, 0, 0])
    data = load_dataset(tmp_path)
    assert counts(data) == (1, 1, 1, ["vein"])
    images, _, rejected = decode_samples([*data.normals, *data.anomalies], 8)
    assert rejected == []
    assert images[:, 0, 0].tolist() == [[10, 20, 30], [200, 255, 0]]


def test_mastcam_arrays_that_are_none_are_listed(tmp_path):
    for part in ("train_typical", "test_typical", "test_novel/vein"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "train_typical" / "a.npy").write_bytes(b"\x93NUMPY broken")
    np.save(tmp_path / "train_typical" / "b.npy", np.zeros((4, 4)))
    np.save(tmp_path / "train_typical" / "c.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "d.npz", a=np.zeros((4, 4, 3)))
    (tmp_path / "d.npz").rename(tmp_path / "train_typical" / "d.npy")
    rejected = decode_samples(load_dataset(tmp_path).normals, 8)[2]
    assert [r.source for r in rejected] == [f"train_typical/{n}.npy" for n in "abcd"]


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (np.array([10, 20, 255], np.uint8), [10, 20, 255]),
        (np.array([0, 25700, 65535], np.uint16), [0, 100, 255]),
        (np.array([0, 25700, 65535], ">u2"), [0, 100, 255]),
        (np.array([0, 100, 255], np.int64), [0, 100, 255]),
        (np.array([0, 0.4, 1.0], np.float32), "from 0 to 1, wanted 0 to 255"),
        (np.array([0, 100, 4095], np.float64), "from 0 to 4095, wanted 0 to 255"),
        (np.array([0, 100, 40000], np.int32), "from 0 to 4e+04, wanted"),
        (np.array([0, 100, -99.0]), "from -99 to 100, wanted"),
        (np.array([1, 0, 1], bool), "bool"),
    ],
)
def test_arrays_are_read_by_their_type(tmp_path, array, want):
    """Values of 0..1 would be black, and of 16 bit white."""
    np.save(tmp_path / "A.npy", np.tile(array, (4, 4, 1)))
    (tmp_path / "A.npy").rename(tmp_path / "A.NPY")
    images, _, rejected = decode_samples([Sample(0, "", "a", path=tmp_path / "A.NPY")], 4)
    if isinstance(want, str):
        assert want in rejected[0].reason
    else:
        assert images[0, 0, 0].tolist() == want


def test_hyper_kvasir_upper_tract(tmp_path):
    tract = tmp_path / "labeled-images" / "upper-gi-tract"
    for landmark in ("pylorus", "z-line", "retroflex-stomach"):
        draw(tract / "anatomical-landmarks" / landmark / f"{landmark}.jpg")
    for finding in ("barretts", "esophagitis-a"):
        draw(tract / "pathological-findings" / finding / f"{finding}.jpg")
    draw(tmp_path / "labeled-images" / "lower-gi-tract" / "x" / "polyps" / "p.jpg")
    data = load_dataset(tmp_path)
    assert counts(data) == (3, None, 2, ["barretts", "esophagitis-a"])
    all_decode(data)


def test_brain_mri(tmp_path):
    draw(tmp_path / "no" / "1 no.jpeg")
    draw(tmp_path / "no" / "No13.JPG".replace("JPG", "jpg"))
    draw(tmp_path / "yes" / "Y1.jpg")
    data = load_dataset(tmp_path)
    assert counts(data) == (2, None, 1, ["tumor"])
    all_decode(data)


@pytest.mark.parametrize("nested", ["head_ct", "head_ct/head_ct"])
def test_head_ct(tmp_path, nested):
    for i in range(4):
        draw(tmp_path / nested / f"{i:03}.png")
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n0,1\n1,0\n2,0\n3,1\n4,0\n")
    data = load_dataset(tmp_path)
    assert counts(data) == (3, None, 2, ["hemorrhage"])
    _, kept, rejected = decode_samples([*data.normals, *data.anomalies], 8)
    assert len(kept) == 4
    assert [r.source for r in rejected] == ["head_ct/004.png"]  # named in the list, not on disk


def test_labels_that_excel_has_saved_are_read(tmp_path):
    """A spreadsheet writes the byte order mark EF BB BF in front."""
    head, elpv = tmp_path / "head", tmp_path / "elpv"
    for i in range(2):
        draw(head / "head_ct" / f"{i:03}.png")
        draw(elpv / "images" / f"{i}.png")
    (head / "labels.csv").write_bytes(b"\xef\xbb\xbfid,hemorrhage\r\n0,1\r\n1,0\r\n")
    (elpv / "labels.csv").write_bytes(
        b"\xef\xbb\xbfimages/0.png 0.0 mono\r\nimages/1.png 1.0 poly\r\n"
    )
    for root in (head, elpv):
        data = load_dataset(root)
        assert (len(data.normals), len(data.anomalies)) == (1, 1)
        all_decode(data)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DatasetError, match="found pictures; wanted normal/"):
        load_dataset(tmp_path)
    (tmp_path / "normal").mkdir()
    with pytest.raises(DatasetError, match="none of them normal"):
        load_dataset(tmp_path)
