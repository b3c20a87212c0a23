"""SimCLR: Chen et al. 2020, arXiv:2002.05709. Two views of an image agree, every other image repels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.collectives import all_gather, own_rows
from methods.encoders import Encoder
from methods.heads import mlp
from methods.losses.nce import mean_cosine
from methods.losses.nt_xent import nt_xent
from methods.views.simclr import simclr_augment


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    temperature: float = 0.5  # τ; the authors' CIFAR-10 command, google-research/simclr README. ImageNet: 0.1
    out_dim: int = 128  # D; results hardly depend on it, Fig. 8
    jitter: float = 0.5  # colour strength, same command. ImageNet: 1.0
    blur: bool = False  # same command. ImageNet: True
    min_area: float = 0.08  # smallest crop, fraction of the image, appendix A; 0.2 or more suits short runs
    flip: bool = True  # off where a mirror image changes the meaning, such as digits
    colour: Literal["exact", "linear"] = "exact"  # linear folds the jitter into one matrix: faster, without clamps

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0, it divides similarities")
        if self.out_dim < 1:
            raise ValueError(f"out_dim = {self.out_dim}: must be >= 1")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area = {self.min_area}: must be in (0, 1]")
        if not 0 <= self.jitter <= 1.25:
            raise ValueError(f"jitter = {self.jitter}: must be in [0, 1.25]")


class SimCLR(Method):
    """An encoder and a projector g(·), trained to pick an image's other view among all views of the batch."""

    Config = SimCLRConfig
    needs_distinct = True  # an image that is in a batch twice would be its own negative

    def __init__(self, encoder: Encoder, config: SimCLRConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = mlp(encoder.dim, encoder.dim, config.out_dim)  # dropped after pretraining: probe h, never z

    def views(self, pixels: int) -> tuple[View, ...]:
        c = self.config
        augment = simclr_augment(
            pixels, jitter=c.jitter, blur=c.blur, min_area=c.min_area, flip=c.flip, colour=c.colour
        )
        return View("view1", augment), View("view2", augment)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        images = torch.cat([batch["view1"], batch["view2"]])  # one pass: batch norm sees both views
        z1, z2 = self.projector(self.encoder(images)).chunk(2)
        anchors = own_rows(len(z1))  # the whole matrix on every worker would grow with the square of the batch
        loss = nt_xent(all_gather(z1), all_gather(z2), temperature=self.config.temperature, anchors=anchors)
        return {"loss": loss, "mean_cosine": mean_cosine(z1)}

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)
