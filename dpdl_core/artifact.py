"""A fitted model as files: weights, config, thresholds, metrics.

Knows bytes and the model; not where files are kept (infra.model_store does). Nothing is ever
unpickled: weights are safetensors, everything else is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dpdl_core import config as configs
from dpdl_core.estimate import blank_energies
from dpdl_core.features import Trunk
from dpdl_core.learn import Parts
from dpdl_core.model import Dpdl

FORMAT = 3
READABLE = (2, FORMAT)
"""Format 2 has whiteners as whole matrices."""
WEIGHTS, CONFIG, THRESHOLDS, METRICS = (
    "weights.safetensors",
    "config.json",
    "thresholds.json",
    "metrics.json",
)
FILES = (WEIGHTS, CONFIG, THRESHOLDS, METRICS)
MANIFEST = "manifest.json"
_WHOLE_WHITENER = r"parts\.energies\.pooled\..+\.whitener"
_ALL_AXES = 1 << 20
"""More than any trunk has."""


class ArtifactError(ValueError):
    """Files that are not a usable model; the message names the file and what is wrong."""


@dataclass(frozen=True)
class LoadedVersion:
    """A model with what belongs to it."""

    model: Dpdl
    thresholds: dict[str, Any]
    metrics: dict[str, Any]


def pack(
    model: Dpdl, *, thresholds: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, bytes]:
    """The model's files by name; the same model gives the same bytes."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    described = {
        "format": FORMAT,
        "config": json.loads(configs.to_json(model.config)),
        "prototypes": model.parts.energies.sizes,
    }
    return {
        WEIGHTS: safetensors.torch.save(state),
        CONFIG: _to_json(described),
        THRESHOLDS: _to_json(dict(thresholds)),
        METRICS: _to_json(dict(metrics)),
    }


def unpack(files: Mapping[str, bytes], device: str | torch.device = "cpu") -> LoadedVersion:
    """The model of pack()'s files.

    Raises ArtifactError for a missing or broken file, a newer format, wrong shapes and weights
    that are not finite.
    """
    missing = [name for name in FILES if name not in files]
    if missing:
        raise ArtifactError(f"model without {', '.join(missing)}: need {', '.join(FILES)}")
    described = _from_json(files, CONFIG)
    if described.get("format") not in READABLE:
        raise ArtifactError(
            f"{CONFIG}: format {described.get('format')!r}, this program reads "
            f"{' and '.join(map(str, READABLE))}; update the program or train again"
        )
    model = _blank(described)
    _load_weights(model, files[WEIGHTS])
    return LoadedVersion(
        model.eval().requires_grad_(False).to(device),
        _from_json(files, THRESHOLDS),
        _from_json(files, METRICS),
    )


def save(
    directory: str | Path,
    model: Dpdl,
    *,
    thresholds: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """pack() into a directory, and a manifest with the sha256 of each file, written last."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    files = pack(model, thresholds=thresholds, metrics=metrics)
    for name, data in files.items():
        (root / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (root / MANIFEST).write_bytes(_to_json({"format": FORMAT, "sha256": digests}))


def load(directory: str | Path, device: str | torch.device = "cpu") -> LoadedVersion:
    """The model of save()'s directory. Raises ArtifactError as unpack(), and for a changed file."""
    root = Path(directory)
    files = {p.name: p.read_bytes() for p in root.glob("*") if p.name in (*FILES, MANIFEST)}
    if MANIFEST not in files:
        raise ArtifactError(f"{root}: no {MANIFEST}; not a saved model, or one half written")
    digests = _from_json(files, MANIFEST).get("sha256", {})
    for name in FILES:
        if name in files and hashlib.sha256(files[name]).hexdigest() != digests.get(name):
            raise ArtifactError(f"{root / name}: changed since it was saved (sha256 differs)")
    return unpack(files, device)


def _blank(described: dict[str, Any]) -> Dpdl:
    try:
        # Versions from before they were a choice have one head network, and whiten every axis.
        before = {"head_networks": 1, "pooled_axes": _ALL_AXES}
        config = configs.from_json(json.dumps({**before, **described["config"]}))
        trunk = Trunk(config.trunk, image_size=config.image_size).fuse()
        sizes = {str(k): int(v) for k, v in described["prototypes"].items()}
        energies = blank_energies(config, trunk.channels, sizes)
        return Dpdl(config, trunk, Parts(config, trunk.channels, energies))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{CONFIG}: {error}") from error


def _load_weights(model: Dpdl, data: bytes) -> None:
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{WEIGHTS}: not a safetensors file ({error})") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(f"{WEIGHTS}: {name} holds NaN or infinity")
    for name in [name for name in state if re.fullmatch(_WHOLE_WHITENER, name)]:
        state |= _by_axes(name, state.pop(name))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ArtifactError(f"{WEIGHTS} does not fit {CONFIG}: {first[0].strip()}") from error


def _by_axes(name: str, whitener: Tensor) -> dict[str, Tensor]:
    """A symmetric whitener of format 2 as PooledEnergy keeps it now, every axis by itself."""
    if whitener.dim() != 2 or whitener.shape[0] != whitener.shape[1]:
        raise ArtifactError(f"{WEIGHTS}: {name} of shape {tuple(whitener.shape)} is no whitener")
    gain, axes = torch.linalg.eigh(whitener.double())
    found = {"axes": axes, "gain": gain, "rest": torch.zeros(())}
    return {name.replace("whitener", key): value.float() for key, value in found.items()}


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _from_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ArtifactError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{name}: {type(value).__name__} where an object belongs")
    return value
