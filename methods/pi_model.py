"""Π-model: Laine and Aila 2016, arXiv:1610.02242, section 2.1. Two looks at an image get one prediction.

One of them is the target, without gradient, as in FixMatch's code for its baselines (Sohn et al. 2020,
arXiv:2001.07685), whose settings these are; in the paper both looks move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import (
    NormFrom,
    acceptance,
    consistency,
    exponential_ramp,
    linear_ramp,
    norm_statistics_kept,
    prediction,
    together,
)
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class PiModelConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift by an eighth, of both streams: FixMatch's code for its baselines
    unlabelled_weight: float = 10.0  # on squared errors averaged over classes, same code
    ramp: float = 0.4  # share of training over which the weight rises, same code
    ramp_form: Literal["linear", "exponential"] = "linear"  # same code; exponential is exp(-5 (1 - t)²), the paper's
    label_smoothing: float = 0.1  # same code declares it, and leaves it out of the loss
    dropout: float = 0.0  # on the pooled features, drawn anew for each look; same code has none, the paper has 0.5
    norm_from: NormFrom = "labelled"  # whose statistics batch norm keeps, same code; "all": both streams in one pass

    def __post_init__(self) -> None:
        self.check_shares("ramp")
        self.check_fractions("label_smoothing", "dropout")
        self.check_weights("unlabelled_weight")


class PiModel(Method):
    """A classifier on labelled images that agrees with itself on two views of each unlabelled one."""

    Config = PiModelConfig

    def __init__(self, encoder: Encoder, config: PiModelConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak = self.config.weak.build(pixels)
        return View("labelled", weak, stream="labelled"), View("first", weak), View("second", weak)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label = self.config, batch["label"]
        if c.norm_from == "all":
            labelled, first, second = together(self.logits, batch["labelled"], batch["first"], batch["second"])
        else:
            labelled = self.logits(batch["labelled"])
            with norm_statistics_kept(self):
                second = self.logits(batch["second"])
                with torch.no_grad():
                    first = self.logits(batch["first"])
        target = prediction(first)
        labelled_loss = cross_entropy(labelled, label, smoothing=c.label_smoothing)
        unlabelled_loss = consistency(target, second, distance="mse")
        ramp = linear_ramp if c.ramp_form == "linear" else exponential_ramp
        weight = c.unlabelled_weight * ramp(progress, c.ramp)
        return {
            "loss": labelled_loss + weight * unlabelled_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "train_accuracy": (labelled.argmax(dim=1) == label).float().mean(),
            **acceptance(target, target.new_ones(len(target))),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))
