"""One run of an evaluation: its scores, and how they are kept on disk until it goes on.

Knows nothing of methods. A run lies under a hash of all that its scores depend on, so that what is
found there is the answer to the very question asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dpdl_core
from dpdl_core.metrics import auroc, average_precision
from dpdl_core.protocol import Split
from pipelines import evaluate_methods
from pipelines.evaluate_report import RunPictures

_PACKAGES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "opencv-python-headless")
"""What a method computes with: another version may give other figures. Those that decode need not
be here, since the pixels themselves count."""


@dataclass(frozen=True)
class Run:
    """Scores of one run's test images; a JSON file each."""

    seed: int
    seen_class: str | None
    split_sha256: str
    sources: list[str]
    defects: list[str]
    """Class of each test image, "" for a normal one."""
    scores: list[float]
    train_seconds: float
    score_seconds: float
    machine: dict[str, Any]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @property
    def labels(self) -> list[int]:
        return [int(bool(defect)) for defect in self.defects]

    @property
    def auroc(self) -> float:
        return auroc(self.labels, self.scores)

    @property
    def ap(self) -> float:
        return average_precision(self.labels, self.scores)


def key(split: Split, pixels: str, settings: str) -> str:
    """Of everything a run's scores depend on."""
    parts = [split.sha256, pixels, settings, code_sha256(), *_versions().values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def machine_of(device: str) -> dict[str, Any]:
    """What a run's seconds depend on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        **_versions(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }


def code_sha256() -> str:
    """Of dpdl_core and of what calls its methods here."""
    root = Path(dpdl_core.__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(root.rglob("*.py")), Path(evaluate_methods.__file__)]:
        digest.update(os.path.relpath(path, root).encode() + path.read_bytes())
    return digest.hexdigest()


def resume(stem: Path) -> tuple[Run, RunPictures] | None:
    record = stem.with_suffix(".json")
    if not record.exists():
        return None
    return Run(**json.loads(record.read_text())), RunPictures.load(stem.with_suffix(".npz"))


def keep(stem: Path, split: Split, run: Run, pictures: RunPictures) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    split.save(stem.with_suffix(".split.json"))
    pictures.save(stem.with_suffix(".npz"))
    write(stem.with_suffix(".json"), json.dumps(asdict(run)))  # last: it says that all is there


def write(path: Path, text: str) -> None:
    """Whole or not at all, also when the process dies in between."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
