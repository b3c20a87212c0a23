"""Optimisers and learning-rate schedules, as a recipe writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optim:
    """An optimiser with its schedule. Learning rates are the ones used: any scaling with the batch is the recipe's."""

    name: Literal["sgd", "lars", "adamw", "rmsprop"] = "sgd"
    lr: float
    encoder_lr: float = 1.0  # the encoder's learning rate relative to `lr`: 0.1 suits fine-tuning a pretrained one
    momentum: float = 0.9
    nesterov: bool = True  # sgd only
    weight_decay: float = 5e-4  # on weights only, never on biases and norms
    schedule: Literal["cosine", "fixmatch", "constant", "step"] = "cosine"  # ends at 0; at 0.195 lr, cos(7 π t / 16)
    warmup: float = 0.05  # linear, fraction of all steps
    decay: float = 0.97  # step only: factor
    decay_every: float = 0.01  # step only: fraction of all steps

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr = {self.lr}: must be > 0")
        if not self.encoder_lr >= 0:
            raise ValueError(f"encoder_lr = {self.encoder_lr}: must be >= 0, relative to lr; 0 leaves it as it is")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup}: must be in [0, 1), a fraction of all steps")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum = {self.momentum}: must be in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay = {self.weight_decay}: must be >= 0")
        if not 0 < self.decay_every <= 1:
            raise ValueError(f"decay_every = {self.decay_every}: must be in (0, 1], a fraction of all steps")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of `step` in [0, total]: base 4.8, 10 warm-up of 100 steps give 2.4 at steps 5 and 55."""
        warm = self.warmup * total
        if step < warm:
            return self.lr * step / warm
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1e-9, total - warm))) / 2
        if self.schedule == "fixmatch":  # Sohn et al. 2020, arXiv:2001.07685, section 2.4
            return self.lr * math.cos(7 * math.pi * (step - warm) / max(1e-9, total - warm) / 16)
        if self.schedule == "step":
            return self.lr * self.decay ** int((step / total + 1e-9) / self.decay_every)
        return self.lr

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser over a model's trainable parameters: biases and norms without decay or layer-wise scaling."""
        encoder = getattr(model, "encoder", None)
        inside = {id(p) for p in encoder.parameters()} if encoder is not None and self.encoder_lr != 1 else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = []
        for part, factor in ((False, 1.0), (True, self.encoder_lr)):
            own = [p for p in trained if (id(p) in inside) == part]
            groups += [
                {"params": [p for p in own if p.ndim > 1], "weight_decay": self.weight_decay, "factor": factor},
                {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0, "adapt": False, "factor": factor},
            ]
        groups = [group for group in groups if group["params"]]
        if self.name == "lars":
            return Lars(groups, lr=self.lr, momentum=self.momentum)
        for group in groups:
            group.pop("adapt", None)
        if self.name == "sgd":
            nesterov = self.nesterov and self.momentum > 0
            sgd = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)
            if self.momentum:  # the fused step takes no weights that meet their first gradient later than others
                for weight in trained:
                    sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            return sgd
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, fused=True)
        # decay 0.9 and epsilon 1e-3 as in the released EfficientNet and Noisy Student code
        return torch.optim.RMSprop(groups, lr=self.lr, alpha=0.9, eps=1e-3, momentum=self.momentum, foreach=True)


class Lars(torch.optim.Optimizer):
    """LARS as SimCLR uses it (You et al. 2017, arXiv:1708.03888; Chen et al. 2020, section 2.1).

    g' = g + β w, r = η |w| / |g'| (1 where either norm is 0), v = μ v + γ r g', w = w - v. The 2017 paper has
    r = η |w| / (|g| + β |w|), which is smaller. Groups with `adapt: False` take r = 1.
    """

    def __init__(self, groups: Iterable[dict], *, lr: float, momentum: float = 0.9, trust: float = 1e-3) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            update = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            for weight in weights:
                self.state[weight].setdefault("velocity", torch.zeros_like(weight))
            velocity = [self.state[weight]["velocity"] for weight in weights]
            rates = torch.full((len(weights),), group["lr"], device=weights[0].device)
            if group["adapt"]:
                norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(update))
                ratio = group["trust"] * norms[0] / norms[1]
                rates = rates * torch.where((norms[0] > 0) & (norms[1] > 0), ratio, 1.0)
            torch._foreach_mul_(update, list(rates.unbind()))
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, update)
            torch._foreach_sub_(weights, velocity)
