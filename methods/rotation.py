"""Rotation prediction: Gidaris et al. 2018, arXiv:1803.07728. By how many quarters was an image turned?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.encoders import Encoder
from methods.losses.cross_entropy import cross_entropy
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import turn


@dataclass(frozen=True, kw_only=True)
class RotationConfig(MethodConfig):
    augment: Augment = Augment()  # crop with padding 4 and flip, both before turning: the released code for CIFAR-10
    turns: Literal["all", "one"] = "all"  # of each image in a batch; one, drawn, learns slower

    def __post_init__(self) -> None:
        if self.turns not in ("all", "one"):
            raise ValueError(f"turns = {self.turns}: must be all or one")


class RotationTask(PretextTask):
    """A linear layer of four classes on the pooled feature: 0, 90, 180, 270 degrees counter-clockwise."""

    chance_loss = math.log(4)

    def __init__(self, encoder: Encoder, config: RotationConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(encoder.dim, 4)

    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """As `PretextTask.forward`, of the mean over all views; also "rotation_accuracy", a fraction."""
        views, quarters = self.puzzle(images, draws)
        logits = self.head(encoder(views))  # one pass: batch norm sees all turns together
        accuracy = (logits.argmax(dim=1) == quarters).float().mean()
        return {"loss": cross_entropy(logits, quarters), "rotation_accuracy": accuracy}

    def puzzle(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Turned images and by how many quarters, 0 .. 3: (4B, 3, H, H) with all images per turn, or (B, 3, H, H).

        Turned by moving pixels, never by interpolating: corners or a smoothing would tell the answer.

        Raises:
            ValueError: the images are not square; what a turn would cut or fill would tell the answer.
        """
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"images {tuple(images.shape)}: rotation needs square ones, crop them first")
        if self.config.turns == "all":
            turned = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
            return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))
        quarters = draws.integers(1, 4)[:, 0]
        return turn(images, quarters), quarters


class Rotation(Method):
    """An encoder, trained to tell which way is up. Its middle transfers better than its end."""

    Config = RotationConfig
    clean_norm = True  # three of four images it sees are turned

    def __init__(self, encoder: Encoder, config: RotationConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = RotationTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)
