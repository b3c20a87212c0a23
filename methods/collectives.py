"""Gathering rows of all workers with the exact gradient.

Let each worker's loss L_w read all W workers' rows, and L be the mean of the L_w: over its own anchors only, or over
all of them, then W times the same. In the backward pass a worker receives Σ_w dL_w/drows for its rows, the sum over the
losses of all, and averages over the workers what follows from it: (1/W) Σ_w dL_w = dL, the gradient of one process with
the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()  # gloo returns wrong sums on other layouts, without a word
        total = total.clone() if total is gradient else total
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all workers in rank order: (B, ...) on each worker to (W * B, ...); the same tensor when alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _AllGather.apply(rows)


def own_rows(count: int) -> slice:
    """Where this worker's `count` rows are among all workers' gathered ones."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return slice(rank * count, (rank + 1) * count)


def workers() -> int:
    """How many processes work together; 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(value: Tensor, *, largest: bool = False) -> Tensor:
    """The sum, or the largest, of all workers' `value`, elementwise and without a gradient; the same tensor alone."""
    if workers() == 1:
        return value
    total = value.detach().contiguous().clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return total


def gather_uneven(rows: Tensor) -> Tensor:
    """The rows of all workers in rank order, as many as each has, without a gradient: (n_w, ...) to (N, ...)."""
    if workers() == 1:
        return rows
    counts = all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective wants equal shapes
    padded[: len(rows)] = rows.detach()
    parts = all_gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
