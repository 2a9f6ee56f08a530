"""What a worker's tuning is given and keeps: its shard, new normals, and checkpoints in S3.

The other half of dpdl_core.tune.Keeper. Checkpoints go through Ray Train's storage: rank 0 hands
in a folder of safetensors and JSON, nothing is unpickled. Images are numbered by the objects' order
and their rows, so a number means the same image on any number of workers.
Letters: W workers.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch
import torch.distributed

from dpdl_core.shard import Shard
from dpdl_core.tune_state import TuneState
from infra.answers import is_answer
from infra.errors import DataError
from infra.settings import Settings
from pipelines.dataset_index import incoming, load_index
from pipelines.held_out import is_held_out, usable
from pipelines.people import repeated
from pipelines.run_record import EPOCHS, epochs_from_lines, epochs_to_lines
from pipelines.sources import (
    RowGroup,
    RowRef,
    StreamedImages,
    answered_by,
    damaged,
    row_groups,
)

ARRIVED = "arrived.json"
"""In a checkpoint: JOINED of the run's data, with the new normals that joined it."""
JOINED = ("incoming", "repeated", "answered_by")


class Numbers:
    """The number of every image of some objects, in the order in which they were added."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._next = 0

    def add(self, groups: Sequence[RowGroup]) -> None:
        for group in groups:
            self._first.setdefault(group.key, self._next)
            self._next += group.rows

    def of(self, rows: Sequence[RowRef]) -> torch.Tensor:
        return torch.tensor([self._first[r.key] + r.row for r in rows], dtype=torch.long)


class Open(Protocol):
    def __call__(
        self, groups: Sequence[RowGroup], keep: Callable[[RowRef], bool] | None = None
    ) -> StreamedImages:
        """This worker's share of some row groups."""
        ...


class WorkerKeeper:
    """Keeper of one worker; every rank has one and they are called together."""

    def __init__(
        self,
        settings: Settings,
        data: Mapping[str, Any],
        open_images: Open,
        files: Mapping[str, bytes],
    ) -> None:
        """data: the run's, as a manifest keeps it; its incoming objects are learnt from the start.
        files: of the checkpoint to go on from, none to start anew."""
        self._settings, self._open = settings, open_images
        self._files = dict(files)
        self._numbers = Numbers()
        self._sources: list[tuple[StreamedImages, torch.Tensor]] = []
        self.epochs = epochs_from_lines(self._files.get(EPOCHS, b""))
        self.data = {**data, **json.loads(self._files.get(ARRIVED, b"{}"))}
        """With the new normals that have joined."""
        self.left_out = torch.zeros(0, dtype=torch.long)

    @property
    def waited_s(self) -> float:
        """Seconds that reading was waited for, in all passes."""
        return sum(source.waited_s for source, _ in self._sources)

    def normals(self, groups: Sequence[RowGroup]) -> Shard:
        """This worker's shard of the data set's normals, of those that people vouch for, and of
        those that had joined before."""
        self._numbers.add(groups)
        shard = self._shard(groups)
        known = list(self.data["incoming"])
        return shard.and_also(self._joined(known)) if known else shard

    def resume(self) -> TuneState | None:
        if not self.epochs:
            return None
        state = TuneState.from_files(self._files)
        self.left_out = state.tensors["left_out"]  # no epoch may follow that would say it again
        return state

    def keep(self, state: TuneState, figures: dict[str, Any]) -> None:
        """One checkpoint in S3; returns when it is whole."""
        self.epochs.append(figures)
        self.left_out = state.tensors["left_out"]
        if _rank() != 0:
            ray.train.report(figures)
            return
        files = state.to_files() | {
            EPOCHS: epochs_to_lines(self.epochs),
            ARRIVED: json.dumps(self.joined()).encode(),
        }
        report(figures, files)

    def arrivals(self, at_least: int) -> tuple[Shard, torch.Tensor] | None:
        found = _from_first(lambda: self._new(at_least))
        if not found:
            return None
        for part in JOINED:
            self.data[part] = {**self.data[part], **found[part]}
        shard = self._joined(list(found["incoming"]))
        source, numbers = self._sources[-1]
        return shard, numbers[torch.tensor([is_answer(row.key) for row in source.rows]).bool()]

    def joined(self) -> dict[str, Any]:
        """JOINED of the run's data as it is now."""
        return {part: self.data[part] for part in JOINED}

    def digests(self, numbers: torch.Tensor) -> list[str]:
        """Of the images of these numbers on all ranks: what a manifest calls them."""
        mine = [
            source.rows[place].digest
            for source, known in self._sources
            for place in torch.isin(known, numbers).nonzero().flatten().tolist()
        ]
        return sorted(digest for each in gather(mine) for digest in each)

    def _new(self, at_least: int) -> dict[str, dict[str, Any]]:
        """Objects that have not joined, if they hold enough rows together, and the rows of them
        that are known. One that cannot be read, or not to its end, is left: a refresh names it."""
        name, joined = self.data["dataset"], self.data["incoming"]
        new: dict[str, str] = {}
        rows: dict[str, int] = {}
        for found in incoming(self._settings, name):
            if found.key not in joined:
                with contextlib.suppress(DataError):
                    groups = row_groups(self._settings, [found.key])
                    rows[found.key] = sum(group.rows for group in groups)
                    new[found.key] = found.etag
        if sum(rows.values()) < at_least:
            return {}
        for key in damaged(self._settings, new):
            del new[key], rows[key]
        if not new or sum(rows.values()) < at_least:
            return {}
        index = load_index(self._settings, name)
        again = repeated(self._settings, index, used=joined, new=new)
        return {
            "incoming": new,
            "repeated": again,
            "answered_by": answered_by(self._settings, new),
        }

    def _joined(self, keys: Sequence[str]) -> Shard:
        groups = row_groups(self._settings, keys)
        self._numbers.add(groups)
        may_use = usable(self.data)
        # A share of new normals is never learnt from: refreshes judge candidates by it.
        return self._shard(groups, lambda row: may_use(row) and not is_held_out(row))

    def _shard(
        self, groups: Sequence[RowGroup], keep: Callable[[RowRef], bool] | None = None
    ) -> Shard:
        source = self._open(groups, keep)
        part = (source, self._numbers.of(source.rows))
        self._sources.append(part)
        return Shard([part])


def report(figures: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Hand files to Ray Train as this run's latest checkpoint, from rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        ray.train.report(dict(figures), checkpoint=ray.train.Checkpoint.from_directory(folder))


def latest() -> dict[str, bytes]:
    """Files of the run's latest checkpoint; none at its first start."""
    checkpoint = ray.train.get_checkpoint()
    return {} if checkpoint is None else files_of(checkpoint)


def files_of(checkpoint: Any) -> dict[str, bytes]:
    with checkpoint.as_directory() as folder:
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def gather(mine: Any) -> list[Any]:
    """One object of every rank, in rank order, on every rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _from_first(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 sees, on every rank: two looks at S3 may differ. Its error is every rank's."""
    error: Exception | None = None
    found: dict[str, Any] = {}
    if _rank() == 0:
        try:
            found = look()
        except Exception as failed:
            error = failed
    if torch.distributed.is_initialized():
        box: list[Any] = [(found, error)]
        torch.distributed.broadcast_object_list(box)
        found, error = box[0]
    if error is not None:
        raise error
    return found


def _rank() -> int:
    return int(ray.train.get_context().get_world_rank())
