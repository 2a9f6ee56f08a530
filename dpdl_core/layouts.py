"""Folder layouts of the paper's nine data sets (Table 4), and a plain one, as lists of samples.

Each data set is read as its authors hand it out, so nobody has to convert one first. Names only:
no image is decoded here but the masks that say which part of a picture is defective. Used by
protocol.load_dataset alone.

Where the counts differ from Table 4: KolektorSDD. Cut in three, its 399 pictures give 54 defective
and 1143 clean parts; the table counts 54 and 880 and does not say which were left out. All are
kept here.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dpdl_core.images import SUFFIXES, Box
from dpdl_core.samples import Dataset, DatasetError, Rejected, Sample

_IMAGES = SUFFIXES | {".npy"}
"""Endings of what images.py decodes, and of arrays."""
AITEX_PATCH = 256
KOLEKTOR_PARTS = 3

LAYOUTS_READ = (
    "normal/ with anomaly/<class>/, or the folders of MVTec AD (one category), DAGM, KolektorSDD, "
    "AITEX, ELPV, Mastcam, Hyper-Kvasir, BrainMRI or HeadCT as their authors publish them "
    "(docs/layouts.md)"
)


class Categories(DatasetError):
    """A folder of several data sets, the categories of MVTec AD."""

    def __init__(self, root: Path, names: list[str]) -> None:
        super().__init__(
            f"{root} holds {len(names)} MVTec AD categories; name one: {root / names[0]}"
        )
        self.names = names


def read_folder(root: Path) -> Dataset:
    """The data set under root, by the first layout whose mark is there.

    Raises DatasetError that names the layouts when none fits.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    root = Path(os.path.abspath(root))  # "." has no name; resolve() would change that of a link
    inside = root
    while True:
        for reader in _READERS:
            dataset = reader(inside)
            if dataset is not None:
                return dataset
        below = _folders(inside)
        # Unpacked, many archives are a folder in a folder.
        if len(below) != 1 or _files(inside):
            break
        inside = below[0]
    categories = [d.name for d in _folders(inside) if (d / "train" / "good").is_dir()]
    if categories and inside == root:
        raise Categories(root, categories)
    if categories:
        raise DatasetError(f"{root}: the MVTec AD categories are in {inside}: name that")
    found = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
    raise DatasetError(f"{root}: found {found}; wanted {LAYOUTS_READ}")


def read_elpv_package() -> Dataset:
    """ELPV from the pip package elpv-dataset. Raises DatasetError when it is not installed."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise DatasetError("elpv: the package is not installed; run: pip install elpv-dataset")
    dataset = _read_elpv(Path(spec.origin).parent / "data")
    if dataset is None:
        raise DatasetError(f"elpv: {spec.origin}: the package holds no labels.csv and images/")
    return dataset


def _read_plain(root: Path) -> Dataset | None:
    normal, anomaly = root / "normal", root / "anomaly"
    if not normal.is_dir():
        return None
    normals, anomalies = _normals(root, normal), _by_class(root, anomaly, default="anomaly")
    # A line may begin without a defect; in a folder of another name there may be some.
    elsewhere = not anomaly.is_dir() and len(_folders(root)) > 1
    if normals and not anomalies and (elsewhere or _unread(anomaly)):
        raise _no_anomaly(root, anomaly, (normal, anomaly))
    return Dataset(root.name, normals, None, anomalies)


def _read_mvtec(root: Path) -> Dataset | None:
    train, test = root / "train", root / "test"
    if not (train / "good").is_dir():
        return None
    _none_in(root, test, "into test/good/ or test/<class>/")
    for folder in (train, *_folders(train)):
        if folder != train / "good":
            _none_in(root, folder, "into train/good/, or into test/<class>/ what is a defect")
    anomalies = _by_class(root, test, default="", skip=("good",))
    if not anomalies:
        raise _no_anomaly(root, test, (train, test))
    return Dataset(
        root.name, _normals(root, train / "good"), _normals(root, test / "good"), anomalies
    )


def _read_dagm(root: Path) -> Dataset | None:
    """All classes pooled into one set with one class of anomaly, as in Table 4 (14000 / 2100)."""
    parts = [
        part
        for folder in _folders(root)
        if folder.name.startswith("Class")
        for part in (folder / "Train", folder / "Test")
        if part.is_dir()
    ]
    normals: list[Sample] = []
    anomalies: list[Sample] = []
    for part in parts:
        labelled = {p.stem.removesuffix("_label") for p in _files(part / "Label")}
        if not labelled:
            raise DatasetError(
                f"{root}: {part.relative_to(root).as_posix()}/Label/ holds no images: they say "
                "which of its pictures have a defect; unpack them too"
            )
        for path in _files(part):
            if path.stem in labelled:
                anomalies.append(_sample(root, path, "defect"))
            else:
                normals.append(_sample(root, path))
    return Dataset(root.name, normals, None, anomalies) if parts else None


def _read_kolektor(root: Path) -> Dataset | None:
    """Each picture is cut into three parts, top to bottom; a part is defective by its mask."""
    folders = [f for f in _folders(root) if f.name.startswith("kos")]
    normals: list[Sample] = []
    anomalies: list[Sample] = []
    for path in (p for folder in folders for p in _flat(root, folder)):
        if path.stem.endswith("_label"):
            continue
        mask = _mask([path.with_name(f"{path.stem}_label.bmp")])
        for box in _boxes(path, _thirds):
            if box is not None and _touched(mask, box):
                anomalies.append(_sample(root, path, "defect", box))
            else:
                normals.append(_sample(root, path, box=box))
    return Dataset(root.name, normals, None, anomalies) if folders else None


def _read_aitex(root: Path) -> Dataset | None:
    """Patches 256 pixels wide. Clean patches of defective strips are no normals: Table 4 counts
    2256 = 141 clean strips x 16. The class is the second field of a strip's name."""
    clean, broken, masks = (root / f"{kind}_images" for kind in ("NODefect", "Defect", "Mask"))
    if not clean.is_dir() or not broken.is_dir():
        return None
    normals = [
        _sample(root, path, box=box)
        for path in sorted(clean.rglob("*"))
        if _is_image(path)
        for box in _boxes(path, _squares)
    ]
    anomalies: list[Sample] = []
    left_out: list[Rejected] = []
    for path in sorted(filter(_is_image, broken.rglob("*"))):
        found = sorted(masks.rglob(f"{path.stem}_mask*"))
        boxes: list[Box | None] = []
        if found:  # some strips of the published set have no mask
            mask = _mask(found)
            boxes = [b for b in _boxes(path, _squares) if b is None or _touched(mask, b)]
        if not boxes:
            what = "its mask marks nothing" if found else f"no mask in {masks.name}/"
            name = path.relative_to(root).as_posix()
            left_out.append(Rejected(name, f"{what}: where is the defect?"))
        fields = path.stem.split("_")
        anomalies += [_sample(root, path, fields[min(1, len(fields) - 1)], box) for box in boxes]
    if not anomalies:
        raise DatasetError(
            f"{root}: no anomalies; looked for strips in {broken.name}/ with masks in {masks.name}/"
        )
    return Dataset(root.name, normals, None, anomalies, left_out)


def _read_elpv(root: Path) -> Dataset | None:
    """Probability 0 is normal, 1 an anomaly of its cell's kind (mono, poly); 1/3 and 2/3 are
    left out, which gives the 1131 + 377 and 715 of Table 4."""
    labels = root / "labels.csv"
    if not labels.is_file() or not (root / "images").is_dir():
        return None
    normals: list[Sample] = []
    anomalies: list[Sample] = []
    for number, line in enumerate(labels.read_text(encoding="utf-8-sig").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            name, probability, kind = fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError):
            raise DatasetError(
                f"{labels}:{number}: found {line!r}, wanted: path probability type"
            ) from None
        if probability == 0:
            normals.append(_sample(root, root / name))
        elif probability == 1:
            anomalies.append(_sample(root, root / name, kind))
    return Dataset("elpv", normals, None, anomalies)


def _read_mastcam(root: Path) -> Dataset | None:
    """Its own split of the typical images; the folder "all" repeats the other classes."""
    if not (root / "train_typical").is_dir() or not (root / "test_novel").is_dir():
        return None
    anomalies = _by_class(root, root / "test_novel", default="novel", skip=("all",))
    return Dataset(
        root.name,
        _normals(root, root / "train_typical"),
        _normals(root, root / "test_typical"),
        anomalies,
    )


def _read_kvasir(root: Path) -> Dataset | None:
    """Upper tract: anatomical landmarks are normal, pathological findings are not (2695 / 757)."""
    for base in (root, root / "labeled-images"):
        tract = base / "upper-gi-tract"
        if tract.is_dir():
            landmarks = tract / "anatomical-landmarks"
            _none_in(root, landmarks, f"into {landmarks.name}/<landmark>/")
            normals = [s for folder in _folders(landmarks) for s in _normals(root, folder)]
            findings = _by_class(root, tract / "pathological-findings", default="finding")
            return Dataset(root.name, normals, None, findings)
    return None


def _read_brain_mri(root: Path) -> Dataset | None:
    if not (root / "no").is_dir() or not (root / "yes").is_dir():
        return None
    anomalies = [_sample(root, path, "tumor") for path in _flat(root, root / "yes")]
    return Dataset(root.name, _normals(root, root / "no"), None, anomalies)


def _read_head_ct(root: Path) -> Dataset | None:
    """labels.csv with columns id, hemorrhage; images head_ct/000.png (or head_ct/head_ct/)."""
    labels = root / "labels.csv"
    if not labels.is_file() or not (root / "head_ct").is_dir():
        return None
    files = {path.stem: path for path in (root / "head_ct").rglob("*") if _is_image(path)}
    normals: list[Sample] = []
    anomalies: list[Sample] = []
    for row in csv.DictReader(
        labels.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True
    ):
        cells = {(key or "").strip(): (value or "").strip() for key, value in row.items()}
        if "id" not in cells or cells.get("hemorrhage") not in ("0", "1"):
            raise DatasetError(f"{labels}: found {row}, wanted columns id and hemorrhage (0 or 1)")
        stem = cells["id"].zfill(3)
        path = files.get(stem, root / "head_ct" / f"{stem}.png")  # a missing file is listed later
        if cells["hemorrhage"] == "1":
            anomalies.append(_sample(root, path, "hemorrhage"))
        else:
            normals.append(_sample(root, path))
    return Dataset(root.name, normals, None, anomalies)


_READERS: tuple[Callable[[Path], Dataset | None], ...] = (
    _read_plain,
    _read_mvtec,
    _read_aitex,
    _read_mastcam,
    _read_kvasir,
    _read_brain_mri,
    _read_head_ct,
    _read_elpv,
    _read_dagm,
    _read_kolektor,
)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not path.name.startswith(".") and path.is_file()


def _unread(folder: Path) -> list[Path]:
    """Files below it that are no images."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not _is_image(path)
        and not path.name.startswith(".")
        and path.name not in ("Thumbs.db", "desktop.ini")
    ]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _is_image(p)) if folder.is_dir() else []


def _sample(root: Path, path: Path, defect: str = "", box: Box | None = None) -> Sample:
    name = path.relative_to(root).as_posix()
    if box is not None:
        name += "#" + ",".join(map(str, box))
    return Sample(int(bool(defect)), defect, name, path=path, crop=box)


def _flat(root: Path, folder: Path) -> list[Path]:
    """Images of a folder that holds none further down.

    Raises DatasetError that names a deeper one: which label it would have is a guess, and left
    out it would vanish.
    """
    below = _folders(folder)
    while below:
        inner = below.pop()
        _none_in(root, inner, f"directly into {folder.relative_to(root).as_posix()}/, or elsewhere")
        below += _folders(inner)
    return _files(folder)


def _none_in(root: Path, folder: Path, where: str) -> None:
    """Raises DatasetError that says where images of a folder belong, if it holds any itself."""
    if found := _files(folder):
        raise DatasetError(
            f"{root}: {folder.relative_to(root).as_posix()}/ holds {len(found)} images where none "
            f"are looked for, the first is {found[0].name}; put them {where}"
        )


def _normals(root: Path, folder: Path) -> list[Sample]:
    return [_sample(root, path) for path in _flat(root, folder)]


def _by_class(
    root: Path, folder: Path, *, default: str, skip: tuple[str, ...] = ()
) -> list[Sample]:
    """Anomalies in folder/<class>/; images directly in folder are of class `default`, if named."""
    found = [_sample(root, path, default) for path in _files(folder)] if default else []
    for sub in _folders(folder):
        if sub.name in skip:
            continue
        images = _flat(root, sub)
        # A class may be empty; one whose images cannot be read would vanish.
        unread = [] if images else _unread(sub)
        if unread:
            raise DatasetError(
                f"{root}: {sub.relative_to(root).as_posix()}/ holds {len(unread)} files of no "
                f"kind that is read, the first is {unread[0].name}; wanted "
                f"{' '.join(sorted(_IMAGES))}"
            )
        found += [_sample(root, path, sub.name) for path in images]
    return found


def _no_anomaly(root: Path, wanted: Path, read: tuple[Path, ...]) -> DatasetError:
    others = ", ".join(f"{d.name}/" for d in _folders(root) if d not in read)
    unread = _unread(wanted)
    if unread:
        return DatasetError(
            f"{root}: no anomalies; {len(unread)} files in {wanted.name}/ are of no kind that is "
            f"read, the first is {unread[0].relative_to(root).as_posix()}; wanted "
            f"{' '.join(sorted(_IMAGES))}"
        )
    return DatasetError(
        f"{root}: no anomalies; looked for images in {wanted.name}/<class>/"
        f"{f', and passed over {others}' if others else ''}: put them there"
    )


def _boxes(path: Path, cut: Callable[[int, int], list[Box]]) -> Iterator[Box | None]:
    """Boxes of a picture by its header. One None for a broken header: the sample then stands for
    the whole file, fails to decode and is listed, instead of vanishing here."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError:
        yield None
        return
    yield from cut(width, height)


def _thirds(width: int, height: int) -> list[Box]:
    edges = [round(height * i / KOLEKTOR_PARTS) for i in range(KOLEKTOR_PARTS + 1)]
    return [(0, a, width, b) for a, b in itertools.pairwise(edges)]


def _squares(width: int, height: int) -> list[Box]:
    """The last one ends where the strip does, over the one before it if need be."""
    last = max(width - AITEX_PATCH, 0)
    lefts = [*range(0, last, AITEX_PATCH), last]
    return [(x, 0, min(x + AITEX_PATCH, width), height) for x in lefts]


def _mask(paths: list[Path]) -> npt.NDArray[np.bool_]:
    """Union of masks (H, W). Raises DatasetError that names a mask that is missing or broken."""
    union: npt.NDArray[np.bool_] | None = None
    for path in paths:
        pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.is_file() else None
        if pixels is None:
            raise DatasetError(f"{path}: no mask that can be read; it says where the defect is")
        union = pixels > 0 if union is None else union | (pixels > 0)
    assert union is not None
    return union


def _touched(mask: npt.NDArray[np.bool_], box: Box) -> bool:
    left, top, right, bottom = box
    return bool(mask[top:bottom, left:right].any())
