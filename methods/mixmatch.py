"""MixMatch: Berthelot et al. 2019, arXiv:1905.02249. Guess, sharpen, and mix labelled and unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import (
    acceptance,
    consistency,
    early_ramp,
    linear_ramp,
    norm_statistics_kept,
    sharpen,
    together,
)
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.mixup import mix_up, pool_draws
from methods.precision import full_precision
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class MixMatchConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift, section 4.1; two of them of an unlabelled image, K = 2, section 3.4
    temperature: float = 0.5  # T that sharpens the guess, section 3.4; 1 leaves it as it is
    alpha: float = 0.75  # of MixUp's Beta(α, α), section 3.4; FixMatch's code for its baselines: 0.5
    unlabelled_weight: float = 75.0  # λ_u for CIFAR-10, section 4.2.1; FixMatch's code for its baselines: 100
    ramp: float = 1 / 64  # share of training in which λ_u rises: 1024 · 1024 of 2^26 images in the same code
    dropout: float = 0.0  # on the pooled features; the paper has none

    def __post_init__(self) -> None:
        for name, what in (("temperature", "1 does not sharpen"), ("alpha", "small mixes little")):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} = {value}: must be > 0; {what}")
        self.check_weights("unlabelled_weight")
        self.check_shares("ramp")
        self.check_fractions("dropout")

    def advice(self, steps: int) -> str | None:
        return early_ramp(self.ramp, steps)


class MixMatch(Method):
    """A classifier on mixtures of labelled and unlabelled images; the mean of two predictions labels the latter.

    Batch norm: the guess is made with the statistics of its own batch and leaves the running ones alone; the mixtures,
    labelled and unlabelled ones in the same pass, move them. The released code cuts that pass into interleaved chunks.
    """

    Config = MixMatchConfig

    def __init__(self, encoder: Encoder, config: MixMatchConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder, self.classes = config, encoder, classes
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak = self.config.weak.build(pixels)
        return View("labelled", weak, stream="labelled"), View("first", weak), View("second", weak)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label = self.config, batch["label"]
        pool = [batch["labelled"], batch["first"], batch["second"]]
        with torch.no_grad(), norm_statistics_kept(self):
            guess = guess_labels(*together(self.logits, *pool[1:]), temperature=c.temperature)
        known = F.one_hot(label, self.classes).to(guess.dtype)
        images, target = mix_up(
            torch.cat(pool), torch.cat([known, guess, guess]), pool_draws(batch, views=2), alpha=c.alpha
        )
        logits, rows = self.logits(images), len(label)
        labelled_loss = cross_entropy(logits[:rows], target[:rows])
        unlabelled_loss = consistency(target[rows:], logits[rows:], distance="mse")
        weight = c.unlabelled_weight * linear_ramp(progress, c.ramp)
        return {
            "loss": labelled_loss + weight * unlabelled_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "train_accuracy": (logits[:rows].argmax(dim=1) == label).float().mean(),  # of mixtures
            **acceptance(guess, guess.new_ones(len(guess))),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


@full_precision
def guess_labels(*views: Tensor, temperature: float) -> Tensor:
    """The sharpened mean of the predictions for several views, eq. 6 and 7: logits (B, K) each to (B, K)."""
    return sharpen(torch.stack([view.softmax(dim=1) for view in views]).mean(dim=0), temperature)
