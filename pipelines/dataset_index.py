"""What a data set in S3 consists of: `<dataset>/dataset.json`, its Parquet objects, `incoming/`.

Written by datasets.py, read by everyone who needs to know which objects to open. What people say of
frames adds to it (infra/answers.py): false alarms to `incoming/`, and to `anomalies/` the defects
that they confirm, which belong to the training split from then on, until they are taken back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from infra.answers import ANOMALIES, INCOMING, is_answer
from infra.errors import DataError, NotFound
from infra.s3_client import get, make_minio, s3_errors
from infra.settings import Settings

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("defect", pa.string(), nullable=False),
        pa.field("camera", pa.string(), nullable=False),
        pa.field("captured_at", pa.timestamp("ns", tz="UTC")),
        pa.field("source", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
    ]
)

Progress = Callable[[str, float, dict[str, Any]], None]
"""progress(stage, fraction 0..1, figures)"""
Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


@dataclass(frozen=True)
class Part:
    """One Parquet object. Holds rows of one label only, so that readers can choose."""

    key: str
    etag: str
    rows: int
    bytes: int
    label: int


@dataclass(frozen=True)
class DatasetIndex:
    """dataset.json: the objects of a data set and how they came about."""

    name: str
    origin: str
    licence: str
    setting: str
    shots: int
    seed: int
    seen_class: str | None
    split_sha256: str
    calibration_share: float
    parts: dict[str, list[Part]]
    skipped: list[dict[str, str]]
    """Images left out: {"source", "reason"}."""

    def keys(self, split: Split, label: int | None = None) -> list[str]:
        return [part.key for part in self.parts[split] if label in (None, part.label)]

    def rows(self, split: Split, label: int | None = None) -> int:
        return sum(part.rows for part in self.parts[split] if label in (None, part.label))

    def counts(self) -> dict[str, dict[str, int]]:
        return {
            split: {"normal": self.rows(split, 0), "anomaly": self.rows(split, 1)}
            for split in SPLITS
        }

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> DatasetIndex:
        values = json.loads(data)
        values["parts"] = {
            split: [Part(**part) for part in parts] for split, parts in values["parts"].items()
        }
        return cls(**values)


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing names it."""

    key: str
    etag: str
    modified: datetime


def load_index(settings: Settings, name: str) -> DatasetIndex:
    """The import and the defects that people have confirmed since.

    Raises DataError that says how to import when there is no such data set.
    """
    check_name(name)
    s3 = settings.s3
    try:
        with s3_errors(s3):
            data, _ = get(make_minio(settings), s3.data_bucket, f"{name}/dataset.json")
    except NotFound:
        raise DataError(
            f"no data set {name!r} in s3://{s3.data_bucket}: "
            f"import it with `dpdl data import SRC --name {name}`"
        ) from None
    try:
        index = DatasetIndex.from_json(data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"s3://{s3.data_bucket}/{name}/dataset.json cannot be read ({error}): "
            "import the data set again"
        ) from None
    found = list_objects(settings, f"{name}/{ANOMALIES}/")
    return _confirmed(index, {o.key: o.etag for o in found})


def index_of_run(settings: Settings, data: Mapping[str, Any]) -> DatasetIndex:
    """The index that a run began with, by its "data": whatever people have confirmed or taken back
    since. DataError where the data set was imported anew."""
    name = data["dataset"]
    index = load_index(settings, name)
    index.parts["train"] = [part for part in index.parts["train"] if not is_answer(part.key)]
    check_snapshot(settings, index)
    _confirmed(index, data["objects"])
    if snapshot(index)["objects"] != data["objects"]:
        raise DataError(
            f"data set {name!r} was imported anew since the run started: train again, "
            f"`dpdl train --dataset {name}`"
        )
    return index


def _confirmed(index: DatasetIndex, objects: Mapping[str, str]) -> DatasetIndex:
    """The index with the answers of some objects (key -> ETag) as known defects."""
    answers = sorted((key, etag) for key, etag in objects.items() if is_answer(key))
    # Nobody asks for the bytes of one image.
    index.parts["train"] += [Part(key, etag, rows=1, bytes=0, label=1) for key, etag in answers]
    return index


def incoming(settings: Settings, name: str) -> list[StoredObject]:
    """Objects of new normals, oldest first."""
    found = list_objects(settings, f"{name}/{INCOMING}/")
    return sorted(
        (o for o in found if o.key.endswith(".parquet")), key=lambda o: (o.modified, o.key)
    )


def list_objects(settings: Settings, prefix: str) -> list[StoredObject]:
    client = make_minio(settings)
    with s3_errors(settings.s3):
        return [
            StoredObject(str(o.object_name), str(o.etag).strip('"'), o.last_modified or _EPOCH)
            for o in client.list_objects(settings.s3.data_bucket, prefix=prefix, recursive=True)
        ]


def check_name(name: str) -> None:
    """Names become S3 prefixes. DataError for one that would not stay inside its own."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise DataError(f"name {name!r}: wanted lower-case letters, digits, dots and dashes")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def snapshot(index: DatasetIndex) -> dict[str, Any]:
    """What a version saw, to the object: keys and ETags."""
    return {
        "dataset": index.name,
        "split_sha256": index.split_sha256,
        "objects": {
            part.key: part.etag for split in ("train", "calibration") for part in index.parts[split]
        },
        "incoming": {},
        "set_aside": [],
    }


def check_snapshot(settings: Settings, index: DatasetIndex) -> None:
    """DataError when an object of the data set is gone or no longer what was imported."""
    stored = {o.key: o.etag for o in list_objects(settings, f"{index.name}/")}
    for split, parts in index.parts.items():
        for part in parts:
            if stored.get(part.key) != part.etag:
                raise DataError(
                    f"{part.key} of {split} is {'altered' if part.key in stored else 'gone'}: "
                    f"import {index.name!r} again"
                )
