"""Images in S3's Parquet as the ImageSource that training and scoring read. Streams, always.

The unit of reading is a row group (bounded by datasets.py): whoever reads holds one row group of
encoded images and one batch of decoded ones, however large the data set. Two readers share one
decode: `read_here` in this process (refresh, gate), `read_with_ray` by tasks on the cluster's CPUs
that decode ahead of a training worker. Neither carries a secret: a task reads the settings itself.
Letters: B batch, S side of the decoded square.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from dpdl_core.images import ImageRejected, decode_image
from infra.answers import is_answer, taken_back
from infra.errors import DataError, DataMoved, NotFound, ServiceUnavailable
from infra.s3_client import make_filesystem, s3_errors
from infra.settings import Settings, load_settings
from pipelines.dataset_index import SCHEMA

DECODE_BATCH = 32
"""Images per decoded piece: 5 MB at 224 px, small beside Ray's object store."""
CACHE_BYTES = 2 << 30
"""A source whose decoded images fit in this keeps them (14,000 at 224 px); a larger one is read
and decoded again in each pass."""
DECODE_CPUS = 0.0
"""A decode task asks Ray for no CPU: its number is bounded instead (`tasks`). With a share each, a
worker could wait in a collective, holding its own, for one whose task found none: two trainings on
two cores stood still so."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RowGroup:
    """Rows of one Parquet object that are read together."""

    key: str
    index: int
    rows: int


@dataclass(frozen=True)
class RowRef:
    """What is known of an image beside its pixels."""

    key: str
    row: int
    """Position within the object."""
    digest: str
    """sha256 of the encoded bytes: the image's name wherever it turns up again."""
    label: int
    defect: str
    camera: str
    source: str
    captured_at_ns: int = 0
    """By the camera's clock; 0: nobody knows."""


@dataclass(frozen=True)
class Decoded:
    """Some images and their rows, in the order of the object."""

    images: Pixels
    rows: list[RowRef]


Read = Callable[[], Iterator[Decoded]]
Keep = Callable[[RowRef], bool]


def task_environment(settings: Settings) -> dict[str, str]:
    """What a task on another machine needs to find its settings; holds no secret."""
    return settings.worker_env()


def task_settings(environment: Mapping[str, str]) -> Settings:
    """Settings as a task sees them: its own machine's environment, our two paths over it."""
    return load_settings({**os.environ, **environment})


def row_groups(settings: Settings, keys: Iterable[str]) -> list[RowGroup]:
    """The row groups of some objects, in order. DataError for what is no Parquet of ours."""
    filesystem = make_filesystem(settings)
    found = []
    for key in keys:
        with _opened(filesystem, settings, key) as file:
            _check_columns(f"s3://{settings.s3.data_bucket}/{key}", file.schema_arrow)
            metadata = file.metadata
            found += [
                RowGroup(key, i, metadata.row_group(i).num_rows)
                for i in range(metadata.num_row_groups)
            ]
    return found


def described(settings: Settings, keys: Iterable[str]) -> Iterator[tuple[RowGroup, list[RowRef]]]:
    """The row groups of some objects and their rows, in order; images are read only where no column
    says a digest. DataError for what is no Parquet of ours."""
    filesystem = make_filesystem(settings)
    for key in keys:
        with _opened(filesystem, settings, key, pre_buffer=True) as file:
            _check_columns(f"s3://{settings.s3.data_bucket}/{key}", file.schema_arrow)
            names = [*_READ[1:], *({"digest"} & set(file.schema_arrow.names))]
            first = 0
            for i in range(file.metadata.num_row_groups):
                group = RowGroup(key, i, file.metadata.row_group(i).num_rows)
                table = file.read_row_group(i, columns=names)
                known = table.column("digest").to_pylist() if "digest" in names else [""]
                if all(_SHA256.fullmatch(digest) for digest in known):
                    yield group, _refs(key, first, table, known)
                else:
                    read = _encoded(filesystem, settings, group)
                    yield group, [row for _, refs in read for row in refs]
                first += group.rows


def read_columns(
    settings: Settings, keys: Iterable[str], columns: list[str]
) -> Iterator[dict[str, list[Any]]]:
    """Some columns of some objects, DECODE_BATCH rows at a time."""
    filesystem = make_filesystem(settings)
    for key in keys:
        with _opened(filesystem, settings, key) as file:
            for batch in file.iter_batches(DECODE_BATCH, columns=columns):
                yield batch.to_pydict()


def digests(settings: Settings, keys: Iterable[str]) -> dict[str, list[str]]:
    """sha256 of the images of some objects by row; images are read only where none says it."""
    filesystem = make_filesystem(settings)
    found = {}
    for key in keys:
        with _opened(filesystem, settings, key) as file:
            if "digest" in file.schema_arrow.names:
                found[key] = file.read(columns=["digest"]).column(0).to_pylist()
                continue
            batches = file.iter_batches(DECODE_BATCH, columns=["image"])
            images = (image for batch in batches for image in batch.column(0).to_pylist())
            found[key] = [hashlib.sha256(image).hexdigest() for image in images]
    return found


_VERDICTS: dict[tuple[str, str, str], str] = {}
"""damaged()'s of this process, by bucket, key and ETag; empty for a whole one. A loop that waits
for more would read them all at every look."""


def damaged(settings: Settings, objects: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with those of some objects, key -> ETag, whose rows cannot all be read: key ->
    one line.

    A footer says nothing of the pages. Memory holds one object: bytes that are here are damaged
    where they do not parse, and an S3 that is away is not.
    """
    filesystem, bucket = make_filesystem(settings), settings.s3.data_bucket
    found = {}
    for key, etag in objects.items():
        verdict = _VERDICTS.get((bucket, key, etag))
        if verdict is None:
            try:
                with s3_errors(settings.s3), _found(filesystem, settings, key) as stored:
                    verdict = _damage(stored.read(), f"s3://{bucket}/{key}")
            except NotFound:
                found[key] = f"s3://{bucket}/{key} went while it was looked at"
                continue
            _VERDICTS[bucket, key, etag] = verdict
        if verdict:
            found[key] = verdict
    return found


def _damage(data: bytes, name: str) -> str:
    try:
        for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(DECODE_BATCH):
            batch.validate(full=True)  # UTF-8, too
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        return f"{name} is damaged ({what}): remove it, and bring its images by `dpdl data add`"
    return ""


def answered_by(settings: Settings, keys: Iterable[str]) -> dict[str, str]:
    """Object -> who gave the answer, of those objects that are answers."""
    filesystem = make_filesystem(settings)
    found = {}
    for key in keys:
        if is_answer(key):
            with _opened(filesystem, settings, key) as file:
                for name in file.read(columns=["answered_by"]).column(0).to_pylist():
                    found[key] = name  # one for all rows; of an object without rows nobody
    return found


def read_here(
    settings: Settings,
    groups: Sequence[RowGroup],
    size: int,
    *,
    keep: Keep | None = None,
    on_rejected: Callable[[RowRef, str], None] | None = None,
) -> Read:
    """Read and decode in this process, one row group at a time."""

    def read() -> Iterator[Decoded]:
        filesystem = make_filesystem(settings)
        for group in groups:
            for encoded, refs in _encoded(filesystem, settings, group):
                yield _decode(encoded, refs, size, keep, on_rejected)

    return read


def read_with_ray(
    environment: Mapping[str, str],
    groups: Sequence[RowGroup],
    size: int,
    *,
    tasks: int,
    keep: Keep | None = None,
) -> Read:
    """Read and decode in at most `tasks` Ray tasks at once, ahead of whoever consumes.

    Rows come in the order of `groups`, so a shard is the same in every pass and every run.
    """

    def read_group(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        settings = task_settings(environment)
        group = RowGroup(str(batch["key"][0]), int(batch["index"][0]), int(batch["rows"][0]))
        for piece in read_here(settings, [group], size, keep=keep)():
            columns = [asdict(row) for row in piece.rows]
            yield {
                "pixels": piece.images,
                **{name: np.array([c[name] for c in columns], dtype) for name, dtype in _COLUMNS},
            }

    def read() -> Iterator[Decoded]:
        if not groups:  # more workers than row groups
            return
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        pieces = ray.data.from_items(
            [asdict(group) for group in groups], override_num_blocks=len(groups)
        ).map_batches(
            read_group,
            batch_size=1,
            num_cpus=DECODE_CPUS,
            compute=ray.data.TaskPoolStrategy(size=tasks),
        )
        for batch in pieces.iter_batches(batch_size=None, prefetch_batches=2):
            columns = [batch[name].tolist() for name, _ in _COLUMNS]
            rows = [RowRef(*values) for values in zip(*columns, strict=True)]
            yield Decoded(batch["pixels"], rows)

    return read


_COLUMNS: list[tuple[str, Any]] = [
    ("key", object),
    ("row", np.int64),
    ("digest", object),
    ("label", np.int64),
    ("defect", object),
    ("camera", object),
    ("source", object),
    ("captured_at_ns", np.int64),
]
"""RowRef's fields, in order, as columns of a Ray Data block."""


class StreamedImages:
    """An ImageSource over a reader: re-iterable, fixed order, bounded memory.

    The first pass happens here: it counts, remembers each image's row and, if all fits in
    `cache_bytes`, keeps the pixels. `waited_s` is the time that consumers stood waiting for data.
    """

    def __init__(
        self, read: Read, size: int, *, expected: int, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._read = read
        self._cache: Pixels | None = None
        self.rows: list[RowRef] = []
        self.waited_s = 0.0
        started = time.perf_counter()
        if expected * size * size * 3 <= cache_bytes:
            self._cache = np.empty((expected, size, size, 3), np.uint8)
        for piece in read():
            if self._cache is not None:
                self._cache[len(self.rows) : len(self.rows) + len(piece.rows)] = piece.images
            self.rows += piece.rows
        self.num_images = len(self.rows)
        self.waited_s += time.perf_counter() - started

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """uint8 (B, S, S, 3); every batch full but the last."""
        if self._cache is not None:
            for start in range(0, self.num_images, batch_size):
                stop = min(start + batch_size, self.num_images)
                yield torch.from_numpy(self._cache[start:stop])
            return
        yield from self._streamed(batch_size)

    def _streamed(self, batch_size: int) -> Iterator[torch.Tensor]:
        pieces = self._read()
        held: list[Pixels] = []
        while True:
            started = time.perf_counter()
            piece = next(pieces, None)
            self.waited_s += time.perf_counter() - started
            if piece is not None:
                held.append(piece.images)
            if piece is None or sum(map(len, held)) >= batch_size:
                images = np.concatenate(held) if held else np.empty((0,), np.uint8)
                full = len(images) if piece is None else len(images) // batch_size * batch_size
                for start in range(0, full, batch_size):
                    # A copy: arrays from Ray's store are read-only, and torch wants them not to be.
                    yield torch.from_numpy(images[start : start + batch_size].copy())
                held = [images[full:]]
            if piece is None:
                return


def stack(source: StreamedImages) -> torch.Tensor:
    """All images of a small source as one uint8 (N, S, S, 3): the few known defects."""
    batches = list(source.batches(max(1, source.num_images)))
    return batches[0] if batches else torch.empty((0, 1, 1, 3), dtype=torch.uint8)


@contextmanager
def _opened(
    filesystem: pa.fs.FileSystem, settings: Settings, key: str, *, pre_buffer: bool = False
) -> Iterator[pq.ParquetFile]:
    """Errors: DataMoved for an object that is gone, DataError for no Parquet, and s3_errors'.

    pre_buffer: neighbouring columns are one request, and memory holds what is asked for.
    """
    path = f"{settings.s3.data_bucket}/{key}"
    try:
        with (
            s3_errors(settings.s3),
            pq.ParquetFile(_found(filesystem, settings, key), pre_buffer=pre_buffer) as file,
        ):
            yield file
    except NotFound:
        raise DataMoved(
            f"s3://{path} is gone: the data set was imported anew, or an answer removed, "
            "meanwhile; run this again"
        ) from None
    except (pa.ArrowInvalid, ServiceUnavailable) as error:
        # An OSError to pyarrow: a footer that is none looks as if S3 were away.
        if isinstance(error, ServiceUnavailable) and "deserialize thrift" not in str(error):
            raise
        raise DataError(f"s3://{path} is no Parquet file ({error}): remove it") from None


def _found(filesystem: pa.fs.FileSystem, settings: Settings, key: str) -> Any:
    """An object; an answer that was taken back since the caller learnt of it is still its own."""
    try:
        return filesystem.open_input_file(f"{settings.s3.data_bucket}/{key}")
    except FileNotFoundError:
        if not is_answer(key):
            raise
        return filesystem.open_input_file(f"{settings.s3.evidence_bucket}/{taken_back(key)}")


_READ = ["image", "label", "defect", "camera", "source", "captured_at"]
_SHA256 = re.compile("[0-9a-f]{64}")


def _check_columns(path: str, found: pa.Schema) -> None:
    """DataError for a Parquet object whose columns are not those that are read here.

    Whether a column may hold nulls belongs to it: a null is no image. Older imports have no digest.
    """
    for name in [*_READ, "digest"] if "digest" in found.names else _READ:
        wanted = SCHEMA.field(name)
        if found.get_field_index(name) < 0 or not found.field(name).equals(wanted):
            raise DataError(
                f"{path} is none of our Parquet files: it has no column `{name}: {wanted.type}"
                f"{'' if wanted.nullable else ' not null'}`; remove it, and bring images by "
                "`dpdl data add`"
            )


def _encoded(
    filesystem: pa.fs.FileSystem, settings: Settings, group: RowGroup
) -> Iterator[tuple[list[bytes], list[RowRef]]]:
    with _opened(filesystem, settings, group.key) as file:
        first = sum(file.metadata.row_group(i).num_rows for i in range(group.index))
        for batch in file.iter_batches(DECODE_BATCH, row_groups=[group.index], columns=_READ):
            images = batch.column("image").to_pylist()
            digests = [hashlib.sha256(image).hexdigest() for image in images]
            refs = _refs(group.key, first, batch, digests)
            first += batch.num_rows
            yield images, refs


def _refs(
    key: str, first: int, columns: pa.RecordBatch | pa.Table, digests: Sequence[str]
) -> list[RowRef]:
    """Rows of an object, the first of which is its `first`."""
    times = columns.column("captured_at").cast(pa.int64()).fill_null(0).to_pylist()
    label, defect, camera, source = (
        columns.column(name).to_pylist() for name in ("label", "defect", "camera", "source")
    )
    return [
        RowRef(
            key=key,
            row=first + i,
            digest=digest,
            label=label[i],
            defect=defect[i],
            camera=camera[i],
            source=source[i],
            captured_at_ns=times[i],
        )
        for i, digest in enumerate(digests)
    ]


def _decode(
    encoded: Sequence[bytes],
    refs: Sequence[RowRef],
    size: int,
    keep: Keep | None,
    on_rejected: Callable[[RowRef, str], None] | None,
) -> Decoded:
    images = np.empty((len(refs), size, size, 3), np.uint8)
    rows: list[RowRef] = []
    for data, ref in zip(encoded, refs, strict=True):
        if keep is not None and not keep(ref):
            continue
        try:
            images[len(rows)] = decode_image(data, size)
        except ImageRejected as error:
            if on_rejected is not None:
                on_rejected(ref, error.reason)
            continue
        rows.append(ref)
    return Decoded(images[: len(rows)], rows)
