"""The exponential moving average of a model: Tarvainen and Valpola 2017, arXiv:1703.01780, eq. 2."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def effective_decay(decay: float, step: int) -> float:
    """min(decay, (1 + t) / (10 + t)): 0.1 at t = 0, 0.55 at 10, so that the first steps are not remembered for ever."""
    return min(decay, (1 + step) / (10 + step))


def averaged_copy(model: M) -> M:
    """A frozen copy in eval mode, the average's first value."""
    average = copy.deepcopy(model).eval()
    for parameter in average.parameters():
        parameter.requires_grad_(False)
    return average


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, decay: float, step: int) -> None:
    """θ' = m θ' + (1 - m) θ with m = effective_decay(decay, step), after the optimiser's step number `step` (from 0).

    One rule for all state: parameters and float buffers (running statistics) are averaged, integer buffers copied.
    """
    floats: tuple[list, list] = ([], [])
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            floats[0].append(old)
            floats[1].append(new)
        else:
            old.copy_(new)
    torch._foreach_lerp_(floats[0], floats[1], 1 - effective_decay(decay, step))
