"""Mean Teacher: Tarvainen and Valpola 2017, arXiv:1703.01780. The moving average of the weights sets the targets.

The average is training's (`methods.ema`, eq. 2 of the paper) and lent to the method. Settings: FixMatch's code for its
baselines, Sohn et al. 2020, arXiv:2001.07685.
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
    prediction,
    two_streams,
)
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class MeanTeacherConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift by an eighth, of both streams: FixMatch's code for its baselines
    unlabelled_weight: float = 50.0  # on squared errors averaged over classes, same code
    ramp: float = 0.4  # share of training over which the weight rises, same code
    ramp_form: Literal["linear", "exponential"] = "linear"  # same code; exponential is exp(-5 (1 - t)²), the paper's
    label_smoothing: float = 0.001  # same code declares it, and leaves it out of the loss
    dropout: float = 0.0  # on the student's pooled features; same code has none, the paper has 0.5
    norm_from: NormFrom = "labelled"  # whose statistics batch norm keeps, same code; "all": both streams in one pass

    def __post_init__(self) -> None:
        self.check_shares("ramp")
        self.check_fractions("label_smoothing", "dropout")
        self.check_weights("unlabelled_weight")


class MeanTeacher(Method):
    """A classifier on labelled images that follows, on one view of an unlabelled image, its average's word on another.

    The average predicts without noise of its own: by averaged running statistics and without dropout. The same code
    normalises its batch, and averages weights only; the paper's teacher has dropout.
    """

    Config = MeanTeacherConfig
    needs_average = True

    def __init__(self, encoder: Encoder, config: MeanTeacherConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak = self.config.weak.build(pixels)
        return View("labelled", weak, stream="labelled"), View("first", weak), View("second", weak)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label, average = self.config, batch["label"], self.average
        assert isinstance(average, MeanTeacher), "the average was not lent: see Method.attach"
        labelled, second = two_streams(
            self.logits, batch["labelled"], batch["second"], model=self, norm_from=c.norm_from
        )  # fmt: skip
        with torch.no_grad():
            target = prediction(average.logits(batch["first"]))
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
