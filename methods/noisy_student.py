"""Noisy Student: Xie et al. 2020, arXiv:1911.04252, algorithm 1, step 3: the noised student.

The teacher's labels, their filtering and their balancing are `methods.selection`; the rounds are the pipeline's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.encoders import Encoder, set_drop_path
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class NoisyStudentConfig(MethodConfig):
    augment: Augment = Augment(randaugment=5.0)  # input noise; magnitude 5 is the authors' SVHN setting, 27 for B7
    soft: bool = True  # the teacher's whole distribution, section 4.2; False: its most probable class
    label_smoothing: float = 0.1  # on labels, and on hard pseudo-labels (soft ones are smooth already)
    dropout: float = 0.3  # model noise on the pooled features; B0 0.2 to B7 0.5
    drop_path: float = 0.0  # stochastic depth of the last block; the paper's 0.2 needs residual blocks
    unlabelled_weight: float = 1.0  # on the mean loss of the unlabelled part, relative to the paper's concatenated mean

    def __post_init__(self) -> None:
        self.check_fractions("label_smoothing", "dropout", "drop_path")
        if not 0 < self.unlabelled_weight < math.inf:
            raise ValueError(
                f"unlabelled_weight = {self.unlabelled_weight}: must be > 0 and finite; use Supervised to leave it out"
            )


class NoisyStudent(Method):
    """A classifier on labelled images and on unlabelled ones with a teacher's labels, both noised, in one pass."""

    Config = NoisyStudentConfig
    needs_targets = True

    def __init__(self, encoder: Encoder, config: NoisyStudentConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        set_drop_path(encoder, config.drop_path)
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        augment = self.config.augment.build(pixels)
        return View("labelled", augment, stream="labelled"), View("unlabelled", augment)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits = self.logits(torch.cat([labelled, unlabelled]))  # one pass: batch norm sees both streams
        parts = logits.split([len(labelled), len(unlabelled)])
        return joint_loss(
            *parts, label=batch["label"], target=batch["target"].detach(), soft=self.config.soft,
            smoothing=self.config.label_smoothing, unlabelled_weight=self.config.unlabelled_weight,
        )  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


def joint_loss(
    labelled: Tensor, unlabelled: Tensor, *, label: Tensor, target: Tensor,
    soft: bool, smoothing: float, unlabelled_weight: float = 1.0,
) -> Losses:  # fmt: skip
    """The mean over the concatenated batch, (L_l + r w L_u) / (1 + r w), with r unlabelled images a labelled one.

    The released code sums instead, L_l + r L_u: 1 + r times this, in effect another learning rate.

    Args:
        labelled, unlabelled: logits (B, K) and (rB, K).
        label: (B,) int64. target: the teacher's probabilities (rB, K), or its most probable classes (rB,) int64.
        soft: learn the distribution; otherwise the most probable class, smoothed like a label.
    Returns:
        "loss" and its two parts in nats: parts 0.9 and 0.5 at r = 3 give 0.6.
    """
    labelled_loss = cross_entropy(labelled, label, smoothing=smoothing)
    best = target.argmax(dim=1) if target.ndim == 2 else target
    if soft:
        unlabelled_loss = cross_entropy(unlabelled, target)
    else:
        unlabelled_loss = cross_entropy(unlabelled, best, smoothing=smoothing)
    share = unlabelled_weight * len(unlabelled) / len(labelled)
    with torch.no_grad():
        accuracy = (labelled.argmax(dim=1) == label).float().mean()
        agreement = (unlabelled.argmax(dim=1) == best).float().mean()
    return {
        "loss": (labelled_loss + share * unlabelled_loss) / (1 + share),
        "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
        "train_accuracy": accuracy, "teacher_agreement": agreement,
    }  # fmt: skip
