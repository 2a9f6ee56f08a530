"""Methods to hold DPDL against, on the same trunk, resolution and splits.

None of them knows how images are read or results are kept; `make` is the way in.
"""

from __future__ import annotations

from collections.abc import Callable

from dpdl_core.baselines.base import Baseline, Judgement
from dpdl_core.baselines.devnet import DevNet
from dpdl_core.baselines.dra import Dra
from dpdl_core.baselines.frozen import BaselineConfig, FrozenTrunk
from dpdl_core.baselines.knn import NearestPatches
from dpdl_core.baselines.mahalanobis import Mahalanobis
from dpdl_core.baselines.supervised import check_seen
from dpdl_core.baselines.tails import Tails

__all__ = [
    "BASELINES",
    "SETTINGS",
    "Baseline",
    "BaselineConfig",
    "FrozenTrunk",
    "Judgement",
    "check_shots",
    "make",
]

_MAKERS: dict[str, Callable[[FrozenTrunk, BaselineConfig], Baseline]] = {
    "mahalanobis": lambda trunk, config: Mahalanobis(trunk, all_stages=False),
    "mahalanobis-all": lambda trunk, config: Mahalanobis(trunk, all_stages=True),
    "knn": NearestPatches,
    "tails": Tails,
    "devnet": DevNet,
    "dra": Dra,
}
BASELINES = tuple(_MAKERS)

_SHARED = ("trunk", "weights", "image_size")
_BANK = (*_SHARED, "bank")
_TRAINED = (*_SHARED, "iterations", "max_pool")
SETTINGS: dict[str, tuple[str, ...]] = {
    "mahalanobis": _SHARED,
    "mahalanobis-all": _SHARED,
    "knn": _BANK,
    "tails": _BANK,
    "devnet": _TRAINED,
    "dra": _TRAINED,
}
"""The fields of BaselineConfig that a method looks at."""


def check_shots(name: str, shots: int) -> None:
    """Raises ValueError where a method cannot learn from so few anomalies, before any is read."""
    if name in ("devnet", "dra"):
        check_seen(name, shots)


def make(name: str, trunk: FrozenTrunk, config: BaselineConfig) -> Baseline:
    """An unfitted baseline on a trunk that several may share. Raises ValueError for a bad name,
    and for a trunk that takes no images of a size that the method looks at."""
    if name not in _MAKERS:
        raise ValueError(f"method={name!r}: one of {', '.join(BASELINES)}")
    return _MAKERS[name](trunk, config)
