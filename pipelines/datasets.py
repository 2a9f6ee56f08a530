"""Folders of images into S3 as Parquet, and new normals beside them. Reading is sources.py's.

Layout in the data bucket:

    <dataset>/dataset.json                  what belongs to the data set: written last
    <dataset>/{train,calibration,test}/part-<n>-<sha256>.parquet
    <dataset>/incoming/part-<sha256>.parquet    new normals, found by listing

Objects are named by their content, so importing the same folder again writes the same objects, and
a changed import changes nothing that a reader of the old dataset.json is looking at until the new
one stands; only then do the old objects go. Images are stored as they came, byte for byte.

dealing.py says what goes into which split. Labels serve training and evaluation; what streams is
the image alone (`iter_images`).
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpdl_core import protocol
from dpdl_core.images import ImageRejected
from infra import answers
from infra.errors import DataError, PointerConflict
from infra.messages import check_camera
from infra.s3_client import conditional_put, ensure_buckets, get, make_minio, s3_errors
from infra.settings import Settings
from pipelines.dataset_index import (
    SCHEMA,
    SPLITS,
    DatasetIndex,
    Part,
    Progress,
    Split,
    check_name,
    check_snapshot,
    list_objects,
    load_index,
)
from pipelines.dealing import Look, Tally, all_samples, deal, look_at, whole, with_twins
from pipelines.sources import read_columns

LICENCES = {
    "elpv": "ELPV (Buerhop-Lutz et al. 2018; Deitsch et al. 2019): CC BY-NC-SA 4.0, "
    "not for commercial use"
}
PARQUET = "application/vnd.apache.parquet"
GROUP_ROWS = 128
GROUP_BYTES = 32 << 20
"""A row group closes at whichever bound comes first: what one reader holds at a time."""
PART_ROWS = 1024
PART_BYTES = 128 << 20
MIN_GROUPS = 8
"""Small sets are cut finer, so that their row groups still deal out evenly among workers."""

_Group = list[dict[str, Any]]
"""Rows of one row group."""


@dataclass(frozen=True)
class ImportReport:
    name: str
    licence: str
    counts: dict[str, dict[str, int]]
    skipped: list[dict[str, str]]
    """Left out, as {"source", "reason"}: no image, or a duplicate of another file."""
    objects: int
    written: int
    """Objects that were not there already."""
    removed: int


@dataclass(frozen=True)
class NewImage:
    """A normal image from a camera, for `incoming/`."""

    image: bytes
    camera: str = ""
    captured_at_ns: int | None = None
    source: str = ""


@dataclass(frozen=True)
class IncomingReport:
    keys: list[str]
    """Objects that hold the images; none when no image was usable."""
    images: int
    skipped: list[dict[str, str]]


def import_dataset(
    settings: Settings,
    src: str | Path,
    name: str,
    *,
    setting: protocol.Setting = "general",
    shots: int = 10,
    seed: int = 0,
    seen_class: str | None = None,
    calibration_share: float = 0.2,
    leave_out: Collection[str] = (),
    camera: str = "",
    progress: Progress | None = None,
) -> ImportReport:
    """Import "elpv" or a folder under `name`; the same input gives the same objects.

    shots: known defects for training, all of them where none is to be left for the test; 0 where
    there is none yet. calibration_share: of the training normals, held out for thresholds.
    leave_out: sources of training normals that are not imported, such as those that are to arrive
    later. camera: which took all of them. Every file is read twice: to look at it, and to store it.
    Raises DataError for a name or a folder that will not do, and where one image is both normal and
    a defect, and where another import of that name has ended meanwhile; ValueError for a camera id
    that will not do.
    """
    check_name(name)
    if camera:
        check_camera(camera)
    ensure_buckets(settings)  # an S3 that is away is told before the images are looked at
    try:
        found = protocol.load_dataset(src)
        tally = Tally(2 * len(all_samples(found)), progress)
        for image in found.left_out:
            tally.skip(image.source, image.reason)
        usable, looks = look_at(found, tally)
        split = protocol.split(
            usable,
            setting=setting,
            shots=shots,
            seed=seed,
            seen_class=seen_class,
            defects_in_test=False,
        )
    except protocol.DatasetError as error:
        raise DataError(str(error)) from None
    if progress is not None:
        progress("near-duplicates", 0.5, {})
    dealt = with_twins(
        deal(split, calibration_share, leave_out),
        looks,
        fixed_test=usable.test_normals is not None,
    )
    stood = {o.key: o.etag for o in list_objects(settings, f"{name}/dataset.json")}
    before = {o.key for part in SPLITS for o in list_objects(settings, f"{name}/{part}/")}
    tally.total = tally.done + sum(map(len, dealt.values()))
    parts: dict[str, list[Part]] = {}
    for part, samples in dealt.items():
        parts[part] = []
        for label in (0, 1):
            chosen = [sample for sample in samples if sample.label == label]
            rows = _rows(chosen, looks, tally, camera)
            parts[part] += _write_parts(settings, f"{name}/{part}", label, rows, len(chosen))
    index = DatasetIndex(
        name=name,
        origin=str(src) if src == "elpv" else Path(src).name,
        licence=LICENCES.get(str(src), ""),
        setting=setting,
        shots=shots,
        seed=seed,
        seen_class=seen_class,
        split_sha256=split.sha256,
        calibration_share=calibration_share,
        parts=parts,
        skipped=tally.skipped,
    )
    _put_index(settings, index, stood.get(f"{name}/dataset.json"))
    kept = {part.key for some in parts.values() for part in some}
    client = make_minio(settings)
    with s3_errors(settings.s3):
        for key in before - kept:
            client.remove_object(settings.s3.data_bucket, key)
    # Parts are named by content: another import may have taken one that this has just written.
    check_snapshot(settings, index)
    return ImportReport(
        name=name,
        licence=index.licence,
        counts=index.counts(),
        skipped=tally.skipped,
        objects=len(kept),
        written=len(kept - before),
        removed=len(before - kept),
    )


def put_incoming(
    settings: Settings,
    name: str,
    images: Iterable[NewImage | bytes],
    *,
    camera: str = "",
    vouched_by: str = "",
) -> IncomingReport:
    """Put normal images where the next refresh finds them; memory holds one part.

    The same images again are the same objects, so sending twice is harmless. Images that do not
    decode are left out and listed. vouched_by: who answers for it that all are normal, as a person
    does for a false alarm (infra/answers.py). DataError where there is no such data set.
    """
    load_index(settings, name)
    tally = Tally(0, None)
    said = {"answered_by": vouched_by, "answered_at": time.time_ns()} if vouched_by else {}
    schema = answers.SCHEMA if vouched_by else SCHEMA

    def rows() -> Iterator[dict[str, Any]]:
        for position, item in enumerate(images):
            new = item if isinstance(item, NewImage) else NewImage(item, camera)
            source = new.source or f"incoming-{position}"
            if tally.decoded(source, new.image) is not None:
                row = _row(new.image, 0, "", new.camera or camera, new.captured_at_ns, source)
                yield row | said

    keys, num_images = [], 0
    for groups in _in_parts(rows(), GROUP_ROWS):
        data = _parquet(groups, schema)
        key = f"{name}/{answers.INCOMING}/part-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        if vouched_by:
            key = _answer_key(name, groups)
        # The same answer again changes nothing, not even who and when.
        if not vouched_by or not list_objects(settings, key):
            _put(settings, key, data)
        keys.append(key)
        num_images += sum(map(len, groups))
    return IncomingReport(keys, num_images, tally.skipped)


def iter_images(settings: Settings, name: str, split: Split) -> Iterator[tuple[str, bytes]]:
    """(source, encoded image) of a split, streamed: what a camera would send, without labels."""
    for rows in read_columns(settings, load_index(settings, name).keys(split), ["source", "image"]):
        yield from zip(rows["source"], rows["image"], strict=True)


def labels(settings: Settings, name: str, split: Split) -> dict[str, tuple[int, str]]:
    """source -> (label, defect): for evaluation after the fact, apart from what is streamed."""
    columns = ["source", "label", "defect"]
    return {
        source: (label, defect)
        for rows in read_columns(settings, load_index(settings, name).keys(split), columns)
        for source, label, defect in zip(*(rows[c] for c in columns), strict=True)
    }


def _rows(
    samples: Iterable[protocol.Sample], looks: Mapping[str, Look], tally: Tally, camera: str
) -> Iterator[dict[str, Any]]:
    """Rows of the samples, one at a time. DataError for one that is not what was looked at."""
    for sample in samples:
        tally.advance()
        try:
            row = _row(whole(sample), sample.label, sample.defect, camera, None, sample.source)
        except (OSError, ImageRejected):
            row = {"digest": None}
        if row["digest"] != looks[sample.source].digest:
            raise DataError(f"{sample.source} has changed during the import: import again")
        yield row


def _row(
    image: bytes, label: int, defect: str, camera: str, captured_at_ns: int | None, source: str
) -> dict[str, Any]:
    digest = hashlib.sha256(image).hexdigest()
    values = (image, label, defect, camera, captured_at_ns, source, digest)
    return dict(zip(SCHEMA.names, values, strict=True))


def _answer_key(name: str, groups: Iterable[_Group]) -> str:
    """As the console names an answer to a frame, by the images in place of the frame's id."""
    digests = " ".join(row["digest"] for group in groups for row in group)
    answer = answers.Answer(
        frame_id=digests,
        captured_at_ns=0,
        kind="false-alarm",
        defect="",
        by="",
        at_ns=0,
        dataset=name,
    )
    assert answer.key is not None
    return answer.key


def _write_parts(
    settings: Settings, prefix: str, label: int, rows: Iterable[dict[str, Any]], expected: int
) -> Iterator[Part]:
    """Write rows of one label; memory holds one part. Yields what stands in S3 afterwards."""
    group_rows = min(GROUP_ROWS, max(1, math.ceil(expected / MIN_GROUPS)))
    for number, groups in enumerate(_in_parts(rows, group_rows)):
        data = _parquet(groups)
        digest = hashlib.sha256(data).hexdigest()
        key = f"{prefix}/part-{label}{number:04d}-{digest[:16]}.parquet"
        yield Part(key, _put(settings, key, data), sum(map(len, groups)), len(data), label)


def _in_parts(rows: Iterable[dict[str, Any]], group_rows: int) -> Iterator[list[_Group]]:
    """Rows in row groups, row groups in parts, as they come: one part at a time."""
    groups: list[_Group] = [[]]
    for row in rows:
        if len(groups[-1]) >= group_rows or _size(groups[-1]) >= GROUP_BYTES:
            groups.append([])
        groups[-1].append(row)
        if sum(map(len, groups)) >= PART_ROWS or sum(map(_size, groups)) >= PART_BYTES:
            yield groups
            groups = [[]]
    if groups[0]:
        yield groups


def _size(group: _Group) -> int:
    return sum(len(row["image"]) for row in group)


def _parquet(groups: Sequence[_Group], schema: pa.Schema = SCHEMA) -> bytes:
    """The same rows give the same bytes: no time, no name in the file."""
    out = io.BytesIO()
    # Images are compressed already, and no two are alike.
    with pq.ParquetWriter(out, schema, compression="none", use_dictionary=["defect"]) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=len(group))
    return out.getvalue()


def _put_index(settings: Settings, index: DatasetIndex, stood: str | None) -> None:
    """stood: the ETag of the index that this import found, None for none.

    Objects are deleted by what an import finds when it begins to write: of two at once, the second
    to end might name some that the first has deleted. So the second is refused.
    """
    key, data = f"{index.name}/dataset.json", index.to_json()
    client = make_minio(settings)
    try:
        with s3_errors(settings.s3):
            conditional_put(client, settings.s3.data_bucket, key, data, if_match=stood)
    except PointerConflict:
        with s3_errors(settings.s3):
            now = get(client, settings.s3.data_bucket, key)[0]
        if now != data:  # else ours, of which the answer was lost, or one that says the same
            raise DataError(
                f"{index.name}: another import of that name has ended while this one ran, and "
                "stands: import again if yours is to replace it, one at a time"
            ) from None


def _put(settings: Settings, key: str, data: bytes) -> str:
    """Write an object of the data bucket in one request; its ETag."""
    with s3_errors(settings.s3):
        written = make_minio(settings).put_object(
            settings.s3.data_bucket,
            key,
            io.BytesIO(data),
            len(data),
            content_type=PARQUET,
            part_size=2 * PART_BYTES,
        )
    return str(written.etag).strip('"')
