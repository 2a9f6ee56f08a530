"""Batch norms that see the whole batch, however many ranks hold it.

Knows modules and ranks only. torch's own SyncBatchNorm runs on accelerators only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpdl_core.distributed import all_sum_with_grad, is_distributed


class GlobalNorm(nn.Module):
    """`norm` with, in training, the mean and variance of all ranks' images."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if not (self.norm.training and is_distributed()):
            plain: Tensor = self.norm(x)
            return plain
        norm, wide = self.norm, x.float()
        ones = wide.new_full((1,), x.shape[0] * x.shape[2] * x.shape[3])
        sums = all_sum_with_grad(torch.cat([wide.sum((0, 2, 3)), ones]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # Two passes: a difference of squares would lose the digits of channels far from zero.
        gap = wide - mean.view(1, -1, 1, 1)
        variance = all_sum_with_grad(gap.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        scale = norm.weight.float() * (variance + norm.eps).rsqrt()
        y = (gap * scale.view(1, -1, 1, 1) + norm.bias.float().view(1, -1, 1, 1)).to(x.dtype)
        # timm's batch norms carry their activation with them.
        out: Tensor = getattr(norm, "act", nn.Identity())(getattr(norm, "drop", nn.Identity())(y))
        return out

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(variance.to(norm.running_var), norm.momentum)


def widen_norms(module: nn.Module) -> None:
    """Put a GlobalNorm around every batch norm below `module`, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GlobalNorm(child))
        else:
            widen_norms(child)


def narrow_norms(module: nn.Module) -> None:
    """Take them off again."""
    for name, child in list(module.named_children()):
        if isinstance(child, GlobalNorm):
            setattr(module, name, child.norm)
        else:
            narrow_norms(child)
