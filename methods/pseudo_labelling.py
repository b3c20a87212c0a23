"""Pseudo-labelling: Lee 2013, "Pseudo-Label", eq. 15 and 16, with the confidence threshold of Oliver et al. 2018,
arXiv:1804.09170, section 3.3. Settings: FixMatch's code for its baselines, Sohn et al. 2020, arXiv:2001.07685.

The network's own most probable class labels an unlabelled image while it trains, in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import NormFrom, acceptance, confident, consistency, linear_ramp, prediction, two_streams
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class PseudoLabellingConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift by an eighth, of both streams: FixMatch's code for its baselines
    min_confidence: float = 0.95  # of the largest probability, from the first step on; same code
    unlabelled_weight: float = 1.0  # same code
    ramp: float = 0.4  # share of training over which the weight rises from 0, linearly; same code
    label_smoothing: float = 0.0  # as in that code's loss; its flag of 0.1 would hold ten classes' labels below 0.95
    dropout: float = 0.0  # on the pooled features; same code has none, Lee 2013 has 0.5
    norm_from: NormFrom = "labelled"  # whose statistics batch norm keeps, same code; "all": both streams in one pass

    def __post_init__(self) -> None:
        self.check_shares("min_confidence", "ramp")
        self.check_fractions("label_smoothing", "dropout")
        self.check_weights("unlabelled_weight")


class PseudoLabelling(Method):
    """A classifier on labelled images, and on unlabelled ones with the classes that it is sure of."""

    Config = PseudoLabellingConfig

    def __init__(self, encoder: Encoder, config: PseudoLabellingConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak = self.config.weak.build(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label = self.config, batch["label"]
        labelled, logits = two_streams(
            self.logits, batch["labelled"], batch["weak"], model=self, norm_from=c.norm_from
        )  # fmt: skip
        target = prediction(logits)
        mask = confident(target, c.min_confidence)
        labelled_loss = cross_entropy(labelled, label, smoothing=c.label_smoothing)
        unlabelled_loss = consistency(target.argmax(dim=1), logits, distance="cross_entropy", mask=mask)
        weight = c.unlabelled_weight * linear_ramp(progress, c.ramp)
        return {
            "loss": labelled_loss + weight * unlabelled_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "train_accuracy": (labelled.argmax(dim=1) == label).float().mean(),
            **acceptance(target, mask),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))
