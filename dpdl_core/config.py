"""Everything that can be chosen about a model, in one frozen value, and the two recipes.

Knows no tensors. Saved beside every model's weights; read by fit.py and model.py.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class DpdlConfig:
    """One model's choices. Stages are numbered from 1, shallow to deep."""

    recipe: str = "edge"
    """The name of the recipe these choices started from; says nothing to the code."""

    # the trunk
    trunk: str = "tf_efficientnet_lite0"
    """A timm model's name. Lite0 has stages 1-7, a ResNet 1-4."""
    weights: str = "package"
    """Where its ImageNet weights come from: package, hub, random, or a path (features.py)."""
    image_size: int = 224
    """Side in pixels of the square every image is squashed to."""

    # fine-tuning of the trunk (tune.py), before anything else is learnt on its features
    tuned_stages: int = 0
    """How many of the last stages are tuned; 0 leaves the trunk as it is."""
    tune_epochs: int = 50
    """Of tune_iterations batches each; a checkpoint follows every epoch."""
    tune_iterations: int = 20
    """Batches in an epoch."""
    tune_batch: int = 48
    """Images in a batch over all workers: a third each normal, pseudo and seen."""
    tune_learning_rate: float = 2e-4
    """AdamW's, with a cosine schedule; the prototypes' is ten times that."""
    tune_prototypes: int = 32
    """C of the prototypes that training moves; those of the score are other ones."""
    dispersion_weight: float = 0.01
    """Lambda of eq. 23."""
    kappa: float = 10.0
    """Concentration of eqs. 18-19."""
    rotate: bool = False
    """Turn and mirror training images; for objects without an upright pose."""
    renew_every_epochs: int = 0
    """Prototypes are re-initialised after every so many epochs of tuning; 0: never by the clock."""
    renew_min_new: int = 0
    """And as soon as so many new normals have arrived, which then join the run; 0: none join."""
    literal_loss: bool = False
    """Eqs. 16-17 with only their formulas mended (losses.py), for the ablation; they diverge."""

    # prototypes in the whitened space of pooled features (mean and deviation per channel)
    pooled_spaces: tuple[str, ...] = ("7q", "3-7", "5qe")
    """One energy per entry; an entry lists stages: `7`, `5+7`, `3-7`. A `q` after a single stage
    takes the means over the image and its quadrants in place of deviations. Which energy counts is
    found on held-out normals (calibrate.py). Each has a direction towards the seen anomalies, too,
    but for those with an `e` at the end: an energy only."""
    pooled_prototypes: int = 1
    """Prototypes of each; dimension decides there, not their number (docs/accuracy.md)."""

    pooled_axes: int = 256
    """Leading axes of each that are whitened one by one, the others by their mean variance."""

    # prototypes in the space of unit-norm patches
    patch_spaces: tuple[str, ...] = ("3-7",)
    """One energy per entry; stages are L2-normalised each, joined and projected. With an `s`
    after a 3x3 mean; with an `h` so too, but scored at every second row and column only."""
    patch_prototypes: int = 2048
    """C, capped at a third of the patches. The paper's 32 are far too few for patches."""
    patch_dims: int = 96
    """Leading principal directions kept of a patch."""
    patch_side: int = 14
    """Patches per side of an image; maps of other sizes are resampled to it."""
    patch_worst: float = 0.03
    """Share of an image's patches, the worst, whose mean energy is the image's."""
    eps: float = 0.001
    """Entropy of the bridge in squared units of a unit-norm patch (paper: 0.001)."""

    # what is known of anomalies
    pseudo_normals: int = 512
    """At most so many training normals are spoiled by cut-paste to weigh the parts."""
    folds: int = 5
    """Cross-fitting folds: no normal is calibrated by a fit that has seen it."""

    head_stages: str = "5-7"
    """Stages that the heads M_a and M_n look at, on the grid of the last."""
    head_normals: int = 512
    """Normals that the heads learn from, at most."""
    head_networks: int = 4
    """Networks side by side whose mean M_n is; a random start moves one alone by .01 and more."""
    head_iterations: int = 75
    """Steps of the heads' training, all images each."""
    head_learning_rate: float = 1e-3
    """AdamW's, with a cosine schedule."""
    head_weight_decay: float = 0.1
    """AdamW's; strong, since ten anomalies are few."""

    # bounds
    max_maps: int = 2048
    """Training normals whose feature maps are kept for prototypes (188 kB each in `edge`, 1.4 MB
    in `paper`)."""
    batch_size: int = 32
    """Images per forward pass in fitting."""

    def __post_init__(self) -> None:
        for name, low in _AT_LEAST.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: need at least {low}")
        if not 0 < self.patch_worst <= 1:
            raise ValueError(f"patch_worst={self.patch_worst}: need a share above 0, at most 1")
        if self.tune_batch % 3:
            raise ValueError(f"tune_batch={self.tune_batch}: need a multiple of 3")
        for name in ("eps", "kappa", "tune_learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need a finite number above 0")
        for name in ("dispersion_weight", "head_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need a finite number, 0 or more")
        if not self.tuned_stages:
            idle = [f"{name}={getattr(self, name)}" for name in _idle(self)]
            if idle:
                raise ValueError(
                    f"tuned_stages=0: {', '.join(idle)} would do nothing, since no stage of the "
                    "trunk is tuned; set tuned_stages, or leave them as they come"
                )
        if not self.patch_spaces:
            raise ValueError(
                "patch_spaces is empty: need at least one, which the heat map and M_r look at"
            )
        for name in ("pooled_spaces", "patch_spaces"):
            spaces = getattr(self, name)
            if len(set(spaces)) < len(spaces):
                raise ValueError(f"{name}={','.join(spaces)}: need each space once")
        for space in self.pooled_spaces:
            stages = stage_numbers(moment_stages(space))
            if is_quartered(space) and len(stages) > 1:
                raise ValueError(f"space {space!r}: quadrants are of one stage, as in `7q`")
        for space in self.patch_spaces:
            stage_numbers(patch_stages(space))


_TUNING = (
    "tune_epochs",
    "tune_iterations",
    "tune_batch",
    "tune_learning_rate",
    "tune_prototypes",
    "dispersion_weight",
    "kappa",
    "rotate",
    "renew_every_epochs",
    "renew_min_new",
    "literal_loss",
)
"""What acts in tuning only."""
_AS_THEY_COME: dict[str, Any] = {f.name: f.default for f in fields(DpdlConfig) if f.name in _TUNING}


def untuned(config: DpdlConfig) -> DpdlConfig:
    """The same with its trunk left as it comes."""
    return replace(config, tuned_stages=0, **_AS_THEY_COME)


def _idle(config: DpdlConfig) -> list[str]:
    """Settings of tuning that are not as they come."""
    return [name for name, value in _AS_THEY_COME.items() if getattr(config, name) != value]


_AT_LEAST = {
    "image_size": 32,
    "pooled_prototypes": 1,
    "pooled_axes": 1,
    "patch_prototypes": 1,
    "patch_dims": 1,
    "patch_side": 1,
    "folds": 2,
    "max_maps": 8,
    "batch_size": 1,
    "tuned_stages": 0,
    "tune_epochs": 1,
    "tune_iterations": 1,
    "tune_batch": 3,
    "tune_prototypes": 1,
    "renew_every_epochs": 0,
    "renew_min_new": 0,
    "head_iterations": 1,
    "head_networks": 1,
    "head_normals": 2,
    "pseudo_normals": 1,
}


def recipe(name: str) -> DpdlConfig:
    """`edge`: Lite0 at 224 px for a CPU. `paper`: ResNet-18 at 448 px, trunk fine-tuned."""
    if name == "edge":
        return DpdlConfig()
    if name == "paper":
        return DpdlConfig(
            recipe="paper",
            trunk="resnet18.tv_in1k",  # torchvision's weights: without a tag timm takes its own
            weights="hub",
            image_size=448,
            pooled_spaces=("4q", "2-4", "3qe"),
            patch_spaces=("2-4",),
            head_stages="3-4",
            tuned_stages=4,
            rotate=True,
        )
    raise ValueError(f"recipe={name!r}: there are `edge` and `paper`")


def override(config: DpdlConfig, values: Mapping[str, str]) -> DpdlConfig:
    """The config with fields set from text, as `--set key=value` gives them.

    Lists are comma-separated. Raises ValueError that lists the keys for an unknown one.
    """
    types = typing.get_type_hints(DpdlConfig)
    changes: dict[str, Any] = {}
    for key, text in values.items():
        if key not in types:
            raise ValueError(f"{key}: no such setting; there are {', '.join(sorted(types))}")
        changes[key] = _parse(key, text, types[key])
    return replace(config, **changes)


def _parse(key: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text}: need true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(part for part in (p.strip() for p in text.split(",")) if part)
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}={text}: need {wanted}") from None


def to_json(config: DpdlConfig) -> str:
    return json.dumps(asdict(config), indent=2)


def from_json(text: str) -> DpdlConfig:
    """Raises ValueError for text that is no config or has fields of another version."""
    try:
        values: dict[str, Any] = json.loads(text)
        known = {f.name for f in fields(DpdlConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}: saved by a newer version?")
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if not lists.get("tuned_stages", 0):
            # Earlier programs let settings pass that did nothing, and saved them.
            lists |= _AS_THEY_COME
        return DpdlConfig(**lists)
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a config: {error}") from error


def patch_stages(space: str) -> str:
    """An entry of patch_spaces without what follows its stages: `3+5+7h` -> `3+5+7`."""
    return space[:-1] if space.endswith(("s", "h")) else space


def patch_step(space: str) -> int:
    """Of how many rows and columns of the grid an entry of patch_spaces looks at one."""
    return 2 if space.endswith("h") else 1


def stage_numbers(space: str) -> list[int]:
    """Stage indices from 0 of a space's name: `5+7` -> [4, 6], `1-3` -> [0, 1, 2]."""
    stages: list[int] = []
    for part in space.split("+"):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"space {space!r}: list stages as 7, 5+7 or 1-7")
        stages.extend(range(int(first) - 1, int(last or first)))
    if not stages or min(stages) < 0 or stages != sorted(set(stages)):
        raise ValueError(f"space {space!r}: stages start at 1 and go up")
    return stages


def pooled_stages(config: DpdlConfig) -> list[int]:
    """All stages whose moments a pooled space looks at, from 0."""
    spaces = [moment_stages(space) for space in config.pooled_spaces]
    return sorted({s for space in spaces for s in stage_numbers(space)})


def moment_stages(space: str) -> str:
    """An entry of pooled_spaces without what follows its stages: `5qe` -> `5`."""
    return space.removesuffix("e").removesuffix("q")


def is_quartered(space: str) -> bool:
    """Whether an entry of pooled_spaces takes means over quadrants."""
    return space.removesuffix("e").endswith("q")


def direction_spaces(config: DpdlConfig) -> list[str]:
    """Pooled spaces with a direction towards the seen anomalies."""
    return [space for space in config.pooled_spaces if not space.endswith("e")]


def quartered_stages(config: DpdlConfig) -> list[int]:
    """All stages whose quadrants a pooled space looks at, from 0."""
    spaces = [moment_stages(space) for space in config.pooled_spaces if is_quartered(space)]
    return sorted({s for space in spaces for s in stage_numbers(space)})


def map_stages(config: DpdlConfig) -> list[int]:
    """All stages whose maps a patch space or a head looks at, from 0."""
    spaces = [patch_stages(space) for space in config.patch_spaces]
    return sorted({s for space in [*spaces, config.head_stages] for s in stage_numbers(space)})
