"""Sums and gathers over the processes of torch.distributed; the identity without it.

Knows torch.distributed only. Whoever starts the processes (Ray Train, torchrun, a test)
initialises the group; nothing here does. Every function is collective: all ranks must call it.

Gradients. In training each rank computes the same loss of all ranks' rows (`gather_with_grad`) and
the ranks' gradients are averaged, as DistributedDataParallel does: that is the loss's own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 without torch.distributed."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are; 1 without torch.distributed."""
    return dist.get_world_size() if is_distributed() else 1


def _wire_device(tensor: Tensor) -> torch.device:
    """NCCL moves CUDA tensors only, whatever device the caller computes on."""
    if dist.get_backend() == "nccl" and not tensor.is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def all_sum(tensor: Tensor) -> Tensor:
    """Element-wise sum over all ranks, on every rank; the argument stays as it is."""
    if not is_distributed():
        return tensor
    total = tensor.detach().to(_wire_device(tensor), copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_max(tensor: Tensor) -> Tensor:
    """Element-wise largest over all ranks, on every rank."""
    if not is_distributed():
        return tensor
    largest = tensor.detach().to(_wire_device(tensor), copy=True).contiguous()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank. Shape and dtype must be the same on all ranks."""
    if not is_distributed():
        return tensor
    copy = tensor.detach().to(_wire_device(tensor), copy=True).contiguous()
    dist.broadcast(copy, src=0)
    return copy.to(tensor.device)


def row_counts(tensor: Tensor) -> list[int]:
    """len(tensor) of every rank, in rank order."""
    if not is_distributed():
        return [len(tensor)]
    counts = torch.zeros(world_size(), dtype=torch.long, device=tensor.device)
    counts[rank()] = len(tensor)
    return [int(n) for n in all_sum(counts).tolist()]


def gather_rows(tensor: Tensor) -> Tensor:
    """All ranks' rows, (n_r, ...) -> (sum of n_r, ...), in rank order, on every rank.

    Shards may differ in length and may be empty; trailing shape and dtype must agree.
    """
    if not is_distributed():
        return tensor
    counts = row_counts(tensor)
    device = _wire_device(tensor)
    padded = torch.zeros(max(counts), *tensor.shape[1:], dtype=tensor.dtype, device=device)
    padded[: len(tensor)] = tensor.detach()
    shards = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shards, padded)
    rows = torch.cat([shard[:n] for shard, n in zip(shards, counts, strict=True)])
    return rows.to(tensor.device)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """`gather_rows` for a loss that every rank computes: this rank's rows keep their gradient.

    Scaled by the number of ranks, since averaging the ranks' gradients divides by it.
    """
    if not is_distributed():
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


def all_sum_with_grad(tensor: Tensor) -> Tensor:
    """`all_sum` that passes gradients on to every rank's summand."""
    if not is_distributed():
        return tensor
    total: Tensor = _AllSum.apply(tensor)  # type: ignore[no-untyped-call]
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        counts = row_counts(tensor)
        start = sum(counts[: rank()])
        ctx.mine = slice(start, start + len(tensor))
        return gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0][ctx.mine] * world_size()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_sum(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_sum(grads[0])
