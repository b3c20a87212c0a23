"""UDA: Xie et al. 2019, arXiv:1904.12848. What is predicted for an image holds for its strong augmentation too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.collectives import all_reduce, workers
from methods.consistency import acceptance, confident, consistency, together
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.precision import full_precision
from methods.views.policy import Augment
from methods.views.strong import StrongAugment

Annealing = Literal["none", "linear", "exp", "log"]


@dataclass(frozen=True, kw_only=True)
class UDAConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift, section 4
    strong: StrongAugment = StrongAugment()  # RandAugment and cutout, section 2.2, as FixMatch's code has them
    temperature: float = 1.0  # T of the target, FixMatch's code for its baselines; section 2.4: 0.4
    min_confidence: float = 0.95  # β, of the prediction before it is sharpened, same code; section 2.4: 0.8
    unlabelled_weight: float = 1.0  # λ, section 2.1
    annealing: Annealing = "none"  # of the training signal, section 2.5: exp suits few labels, log many
    dropout: float = 0.0  # on the pooled features

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0; 1 does not sharpen")
        self.check_shares("min_confidence")
        self.check_weights("unlabelled_weight")
        if self.annealing not in get_args(Annealing):
            raise ValueError(f"annealing = {self.annealing}: must be one of {', '.join(get_args(Annealing))}")
        self.check_fractions("dropout")


class UDA(Method):
    """A classifier whose confident predictions for weak views are learned by strong ones, as whole distributions.

    Batch norm: all three views go through in one pass.
    """

    Config = UDAConfig

    def __init__(self, encoder: Encoder, config: UDAConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder, self.classes = config, encoder, classes
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak, strong = self.config.weak.build(pixels), self.config.strong.build(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak), View("strong", strong)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label = self.config, batch["label"]
        labelled, weak, strong = together(self.logits, batch["labelled"], batch["weak"], batch["strong"])
        threshold = signal_threshold(c.annealing, progress, self.classes)
        labelled_loss, learned = annealed_cross_entropy(labelled, label, threshold=threshold)
        unlabelled_loss, logged = consistency_loss(
            weak, strong, temperature=c.temperature, min_confidence=c.min_confidence
        )
        return {
            "loss": labelled_loss + c.unlabelled_weight * unlabelled_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "train_accuracy": (labelled.argmax(dim=1) == label).float().mean(), "labelled_learned": learned, **logged,
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


@full_precision
def consistency_loss(
    weak: Tensor, strong: Tensor, *, temperature: float, min_confidence: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over all rows of 1[max p >= β] KL(softmax(weak / T) || softmax(strong)), and `acceptance`, to be logged.

    Args:
        weak, strong: logits (B, K) of two views of each image; no gradient reaches the weak ones.
    Returns:
        In nats: (2, 1, 0) and (1, 1, 0) give 0.564 at T = 0.4 and 0.120 at T = 1, and 0 where β is above 0.665.
    """
    weak = weak.detach()
    probability = weak.softmax(dim=1)
    mask = confident(probability, min_confidence)
    loss = consistency((weak / temperature).softmax(dim=1), strong, distance="kl", mask=mask)
    return loss, acceptance(probability, mask)


def signal_threshold(annealing: Annealing, progress: float, classes: int) -> float:
    """η_t = α_t (1 - 1 / K) + 1 / K, section 2.5, to which a label may be known and still be learned from.

    At t = 0.5 and K = 10: linear 0.55, exp 0.174, log 0.926; "none" is 1 throughout.
    """
    match annealing:
        case "linear":
            share = progress
        case "exp":
            share = math.exp(5 * (progress - 1))
        case "log":
            share = 1 - math.exp(-5 * progress)
        case _:
            return 1.0
    return share * (1 - 1 / classes) + 1 / classes


@full_precision
def annealed_cross_entropy(logits: Tensor, label: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the rows whose label has a probability of at most `threshold`, and their share, to be logged.

    The mean is over the rows that are kept, of all workers; 0, with gradient 0, where none is.

    Args:
        logits: (B, K). label: (B,) int64. threshold: η in (0, 1]; at 1 it is the plain mean.
    """
    if threshold >= 1:  # all are kept: the workers need not ask each other
        return cross_entropy(logits, label), logits.new_ones(())
    each = F.cross_entropy(logits, label, reduction="none")
    kept = (each.detach().neg().exp() <= threshold).to(each.dtype)
    count = all_reduce(kept.sum()) / workers()
    return (each * kept).sum() / count.clamp_min(1 / workers()), kept.mean()
