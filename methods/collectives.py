"""Gathering rows of all workers with the exact gradient.

Each worker computes the loss of the whole gathered batch, so the gradients of all workers add up in the backward pass,
and data-parallel averaging then gives the gradient of one process with the whole batch.
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
