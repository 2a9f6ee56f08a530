"""A training's whole state as safetensors and JSON: nothing in it is ever unpickled.

Knows the network, optimiser, schedule and generator of tune.py. Where the bytes are kept is the
caller's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FORMAT = 2
TENSORS, FACTS = "training.safetensors", "training.json"


@dataclass(frozen=True)
class TuneState:
    """What a training goes on from."""

    tensors: dict[str, Tensor]
    """Network, optimiser moments, the generator's state, images left out, held out."""
    facts: dict[str, Any]
    """Epochs and steps done, schedule, the optimiser's groups."""

    def to_files(self) -> dict[str, bytes]:
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
        }
        facts = {"format": FORMAT, **self.facts}
        return {
            TENSORS: safetensors.torch.save(tensors),
            FACTS: (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode(),
        }

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> TuneState:
        """Raises ValueError for what is no state, or one of another format."""
        try:
            facts = json.loads(files[FACTS])
            tensors = safetensors.torch.load(files[TENSORS])
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a training's checkpoint ({error!r}): start anew") from None
        if facts.pop("format", None) != FORMAT:
            raise ValueError(f"a checkpoint of another format than {FORMAT}: start anew")
        return cls(tensors, facts)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start so, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def capture(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    extra: dict[str, Tensor],
    facts: dict[str, Any],
) -> TuneState:
    """The state as it is now."""
    described = optimizer.state_dict()
    moments = {
        f"optimizer.{index}.{name}": value
        for index, values in described["state"].items()
        for name, value in values.items()
    }
    # cat() of a scalar's view would share its memory with the next step's: clone all.
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    together = tensors | moments | extra | {"generator": generator.get_state()}
    return TuneState(
        {name: tensor.detach().cpu().clone() for name, tensor in together.items()},
        facts | {"groups": described["param_groups"], "schedule": schedule.state_dict()},
    )


def restore(
    state: TuneState,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> None:
    """Put all of it back. ValueError where the checkpoint is of another network."""
    try:
        network.load_state_dict(state.part("network."))
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"the checkpoint is of another config: {first[0].strip()}") from None
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.part("optimizer.").items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": state.facts["groups"]})
    schedule.load_state_dict(state.facts["schedule"])
    generator.set_state(state.tensors["generator"])
