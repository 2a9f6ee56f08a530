"""DPDL and the baselines behind one face for evaluate.py: settings, fit, judge."""

from __future__ import annotations

import functools
import hashlib
import json
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpdl_core import baselines
from dpdl_core.baselines import BaselineConfig, FrozenTrunk
from dpdl_core.config import DpdlConfig, override, recipe, to_json, untuned
from dpdl_core.features import load_network
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource, Pixels
from dpdl_core.model import part_groups

Progress = Callable[[str, float, dict[str, Any]], None]
Judged = tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class Fitted:
    train_seconds: float
    judge: Callable[[Tensor], Judged]
    """uint8 (B, S, S, 3) -> scores (B,) and heat maps (B, h, w) or None."""
    saved_seconds: Callable[[], float] = lambda: 0.0
    """Time spared so far by features that an earlier seed had computed."""


class Method(Protocol):
    image_size: int
    batch_size: int
    settings: str
    """JSON of all that the result depends on, the method's name, the weights' content and the
    device included."""

    def fit(
        self,
        images: Pixels,
        normals: Sequence[int],
        anomalies: Sequence[int],
        seed: int,
        tell: Progress,
    ) -> Fitted:
        """Train on rows of images uint8 (N, S, S, 3)."""
        ...


def make_method(
    name: str,
    recipe_name: str,
    overrides: Mapping[str, str],
    device: str,
    shots: int,
    without: Sequence[str] = (),
) -> Method:
    """Raises ValueError for an unknown method, recipe, key, value or part, and for what would do
    nothing."""
    if name == "dpdl":
        config = _dpdl_config(recipe(recipe_name), overrides, shots)
        return _Dpdl(config, _parts_named(config, without, shots), device)
    if name not in baselines.BASELINES:
        known = ", ".join(("dpdl", *baselines.BASELINES))
        raise ValueError(f"method={name!r}: one of {known}")
    if without:
        raise ValueError(f"without={','.join(without)}: {name} has no such parts, only dpdl has")
    return _Baseline(name, _baseline_config(name, recipe(recipe_name), overrides), device)


def _dpdl_config(start: DpdlConfig, overrides: Mapping[str, str], shots: int) -> DpdlConfig:
    """What fit() will go by: without anomalies it tunes nothing, whatever the recipe says."""
    if "renew_min_new" in overrides:
        raise ValueError("renew_min_new would do nothing: no normals arrive in an evaluation")
    config = override(start, overrides)
    if shots:
        return config
    plain = untuned(config)
    idle = [key for key in overrides if getattr(config, key) != getattr(plain, key)]
    if idle:
        raise ValueError(
            f"shots=0: {', '.join(idle)} would do nothing, since without anomalies no stage of "
            "the trunk is tuned; leave them out, or give shots"
        )
    return plain


def _parts_named(config: DpdlConfig, without: Sequence[str], shots: int) -> list[str]:
    """The parts meant by names of parts and of groups, in the model's order."""
    groups = part_groups(config)
    everything = [part for group in groups.values() for part in group]
    for name in without:
        if name not in groups and name not in everything:
            known = ", ".join((*groups, *everything))
            raise ValueError(f"without={name}: no such part; there are {known}")
    gone = [part for name in without for part in groups.get(name, [name])]
    counted = everything if shots else groups["prototypes"]
    idle = [part for part in gone if part not in counted]
    if idle:
        raise ValueError(
            f"shots=0: without {', '.join(idle)} would do nothing, since what is learnt from "
            "anomalies counts for nothing; leave it out, or give shots"
        )
    if set(counted) <= set(gone):
        raise ValueError(f"without={','.join(without)}: no part of the score would be left")
    return [part for part in everything if part in gone]


def _baseline_config(name: str, config: DpdlConfig, overrides: Mapping[str, str]) -> BaselineConfig:
    kinds = typing.get_type_hints(BaselineConfig)
    used = baselines.SETTINGS[name]
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        if key not in used:
            raise ValueError(f"{key}: no setting of {name}; there are {', '.join(used)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise ValueError(f"{key}={text}: need a whole number") from None
    start = BaselineConfig(trunk=config.trunk, weights=config.weights, image_size=config.image_size)
    return replace(start, **values)


class _Dpdl:
    def __init__(self, config: DpdlConfig, without: Sequence[str], device: str) -> None:
        self._config, self._without, self._device = config, without, device
        self.image_size, self.batch_size = config.image_size, config.batch_size
        found = _weights_sha256(config.trunk, config.weights)
        where = {"device": device, "weights_sha256": found}
        chosen = {**json.loads(to_json(config)), "without": list(without)}
        self.settings = json.dumps({"method": "dpdl", **chosen, **where})

    def fit(
        self,
        images: Pixels,
        normals: Sequence[int],
        anomalies: Sequence[int],
        seed: int,
        tell: Progress,
    ) -> Fitted:
        started = time.perf_counter()
        model = fit(
            self._config,
            ArraySource(images, normals),
            images[list(anomalies)],
            seed=seed,
            device=self._device,
            progress=lambda stage, share, figures: tell(stage, 0.9 * share, dict(figures)),
        )

        for part in self._without:
            model.weights[model.part_names.index(part)] = 0

        def judge(batch: Tensor) -> Judged:
            found = model.score(batch)
            return found.score.double().cpu().numpy(), found.maps.cpu().numpy()

        return Fitted(time.perf_counter() - started, judge)


def _weights_sha256(trunk: str, weights: str) -> str:
    """Of the file that weights=PATH names, or of the tensors, in order, that `package` or `hub`
    gives; "" for `random`. Raises as load_network()."""
    if weights == "random":
        return ""
    network = load_network(trunk, weights)
    if weights not in ("package", "hub"):
        return hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _frozen_trunk(
    name: str, weights: str, weights_sha256: str, image_size: int, device: str
) -> FrozenTrunk:
    """One for all baselines that a process compares: they look at the same images."""
    return FrozenTrunk(name, weights, image_size, device=device)


def forget_images() -> None:
    """Before another data set: what is kept of this one's images would be of no more use."""
    _frozen_trunk.cache_clear()


class _Baseline:
    def __init__(self, name: str, config: BaselineConfig, device: str) -> None:
        self._name, self._config = name, config
        found = _weights_sha256(config.trunk, config.weights)
        self._trunk = _frozen_trunk(config.trunk, config.weights, found, config.image_size, device)
        baselines.make(name, self._trunk, config)  # what cannot be is said before images are read
        self.image_size, self.batch_size = config.image_size, self._trunk.batch_size
        where = {"device": device, "weights_sha256": found}
        used = {key: getattr(config, key) for key in baselines.SETTINGS[name]}
        self.settings = json.dumps({"method": name, **used, **where})

    def fit(
        self,
        images: Pixels,
        normals: Sequence[int],
        anomalies: Sequence[int],
        seed: int,
        tell: Progress,
    ) -> Fitted:
        trunk = self._trunk
        method = baselines.make(self._name, trunk, self._config)
        started, spared = time.perf_counter(), trunk.saved_seconds
        method.fit(
            ArraySource(images, normals),
            torch.from_numpy(images[list(anomalies)]),
            seed=seed,
            progress=lambda share: tell("training", 0.9 * share, {}),
        )
        seconds = time.perf_counter() - started + trunk.saved_seconds - spared

        def judge(batch: Tensor) -> Judged:
            found = method.score(batch)
            maps = None if found.maps is None else found.maps.float().numpy()
            return found.score.double().numpy(), maps

        return Fitted(seconds, judge, lambda: trunk.saved_seconds)
