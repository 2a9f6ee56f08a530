"""What scoring costs beyond the bare trunk: both in one run, in turns, at one batch size.

The trunk is the model's own, batch norms and padding folded: the fastest form there is here, so
`ratio` is not made to look good by a slow one. `timm_ratio` is against the same stages as timm
gives them, which is what leaving all of ours away would bring. Turns are taken in alternating
order, so that a machine that slows down slows all; rates are of the median turn.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdl_core.config import DpdlConfig, override, recipe, to_json, untuned
from dpdl_core.estimate import PATCH_SAMPLE
from dpdl_core.features import Trunk
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource
from dpdl_core.model import Dpdl

Progress = Callable[[str, float, dict[str, Any]], None]
FIT_NORMALS = 64
"""Images of noise that the measured model is fitted on, at least; what it costs does not depend on
them as long as they give the settings' number of prototypes."""


@dataclass(frozen=True, kw_only=True)
class BenchScoreOptions:
    """What `dpdl bench score` was asked."""

    recipe: str = "edge"
    overrides: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 32
    repetitions: int = 20
    """Turns of each; one more comes first and is not counted."""
    device: str = "cpu"
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.repetitions < 1:
            raise ValueError("batch_size and repetitions: need at least 1")


def bench_score(options: BenchScoreOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Rates in images per second and their ratio; writes the report if asked to."""
    tell: Progress = progress or (lambda stage, share, figures: None)
    config = override(recipe(options.recipe), options.overrides)
    tell("fitting", 0.0, {})
    model = _any_model(config, options.device)
    generator = torch.Generator().manual_seed(1)
    batch = _noise(options.batch_size, config.image_size, generator).to(options.device)
    plain = Trunk(config.trunk, config.weights, config.image_size).to(options.device)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "timm": plain.to(memory_format=torch.channels_last),
        "trunk": model.trunk,
        "score": model.score,
    }
    seconds = _take_turns(calls, batch, options.repetitions, tell)
    rates = {name: options.batch_size / statistics.median(s) for name, s in seconds.items()}
    report = {
        **{f"{name}_images_per_second": rate for name, rate in rates.items()},
        "ratio": rates["score"] / rates["trunk"],
        "timm_ratio": rates["score"] / rates["timm"],
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        **{f"{name}_seconds": turns for name, turns in seconds.items()},
        "settings": json.loads(to_json(config)),
        "prototypes": model.parts.energies.sizes,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "device": options.device,
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _any_model(config: DpdlConfig, device: str) -> Dpdl:
    # What training does more of changes the model's numbers, not the cost of using them.
    config = replace(untuned(config), head_iterations=1, folds=2, pseudo_normals=8)
    generator = torch.Generator().manual_seed(0)
    normals = ArraySource(_noise(_num_normals(config), config.image_size, generator))
    return fit(config, normals, _noise(2, config.image_size, generator), seed=0, device=device)


def _num_normals(config: DpdlConfig) -> int:
    """Images that give as many prototypes as a training on plenty of them."""
    patches = min(3 * config.patch_prototypes, PATCH_SAMPLE)  # fit_codes caps C at a third
    images = min(math.ceil(patches / config.patch_side**2), config.max_maps)
    return max(FIT_NORMALS, images, 10 * config.pooled_prototypes)  # fit_pooled caps at a tenth


def _noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    shape = (count, size, size, 3)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@torch.inference_mode()
def _take_turns(
    calls: Mapping[str, Callable[[Tensor], Any]], batch: Tensor, repetitions: int, tell: Progress
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repetitions + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            _wait(batch)
            started = time.perf_counter()
            calls[name](batch)
            _wait(batch)
            if turn > 0:  # the first pays for caches and memory
                seconds[name].append(time.perf_counter() - started)
        tell("measuring", turn / repetitions, {})
    return seconds


def _wait(batch: Tensor) -> None:
    """A GPU answers before it is done."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
