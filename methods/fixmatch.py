"""FixMatch: Sohn et al. 2020, arXiv:2001.07685. What is confident on a weak view is the label of the strong view.

Two forms, by how the strong view is made: with RandAugment, or with CTAugment (Berthelot et al. 2019,
arXiv:1911.09785), whose strength is learned from the labelled images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import acceptance, confident, consistency, norm_statistics_kept, together
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.precision import full_precision
from methods.views.ctaugment import CTAugment, CTAugmentConfig, recognised
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.strong import StrongAugment


@dataclass(frozen=True, kw_only=True)
class FixMatchConfig(MethodConfig):
    weak: Augment = Augment()  # flip, and a crop moved by an eighth of 32 pixels: section 2.3
    strong: StrongAugment = StrongAugment()  # RandAugment and cutout, the released code
    min_confidence: float = 0.95  # τ, table 4; 0.8 for runs of a few thousand steps
    unlabelled_weight: float = 1.0  # λ_u, table 4
    dropout: float = 0.0  # on the pooled features, fraction dropped
    weak_no_grad: bool = False  # weak views in a pass of their own without gradient: saves a third of a step

    def __post_init__(self) -> None:
        _check(self)


class FixMatch(Method):
    """A classifier on labelled images, and on unlabelled ones under its own labels."""

    Config = FixMatchConfig

    def __init__(self, encoder: Encoder, config: FixMatchConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak, strong = self.config.weak.build(pixels), self.config.strong.build(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak), View("strong", strong)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return fixmatch_losses(
            *three_views(self, batch, weak_no_grad=self.config.weak_no_grad), label=batch["label"],
            min_confidence=self.config.min_confidence, unlabelled_weight=self.config.unlabelled_weight,
        )  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


@dataclass(frozen=True, kw_only=True)
class FixMatchCTAConfig(MethodConfig):
    weak: Augment = Augment()  # flip, and a crop moved by an eighth of 32 pixels: section 2.3
    strong: CTAugmentConfig = CTAugmentConfig()  # section 2.3
    min_confidence: float = 0.95  # τ, table 4; 0.8 for runs of a few thousand steps
    unlabelled_weight: float = 1.0  # λ_u, table 4
    dropout: float = 0.0  # on the pooled features, fraction dropped
    weak_no_grad: bool = False  # weak views in a pass of their own without gradient: saves a third of a step

    def __post_init__(self) -> None:
        _check(self)


class FixMatchCTA(Method):
    """FixMatch whose strong views are drawn by weights that follow what the average still recognises."""

    Config = FixMatchCTAConfig
    needs_average = True

    def __init__(self, encoder: Encoder, config: FixMatchCTAConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)
        self.policy = CTAugment(config.strong)
        self.probed: list[tuple[Tensor, Tensor]] = []  # of this step, one a micro-batch; empty between steps

    def views(self, pixels: int) -> tuple[View, ...]:
        weak, strong = self.config.weak.build(pixels), self.policy.strong(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak), View("strong", strong)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        average, label = self.average, batch["label"]
        assert isinstance(average, FixMatchCTA), "the average was not lent: see Method.attach"
        losses = fixmatch_losses(
            *three_views(self, batch, weak_no_grad=self.config.weak_no_grad), label=label,
            min_confidence=self.config.min_confidence, unlabelled_weight=self.config.unlabelled_weight,
        )  # fmt: skip
        probes, record = self.policy.probe(batch["labelled"], Draws(batch["labelled.key"]))
        with torch.no_grad():
            match = recognised(average.logits(probes).float().softmax(dim=1), label)
        self.probed.append((record, match))
        kept = (self.policy.rates() > 0).sum() / len(self.policy.weights)
        return {**losses, "probes_recognised": match.mean(), "bins_kept": kept}

    def on_step_end(self, progress: float) -> None:
        if self.probed:
            record, match = (torch.cat(parts) for parts in zip(*self.probed, strict=True))
            self.policy.update(record, match)
        self.probed = []

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


def _check(config: FixMatchConfig | FixMatchCTAConfig) -> None:
    """Refuses what no configuration of this file may have."""
    config.check_shares("min_confidence")
    config.check_fractions("dropout")
    if not 0 < config.unlabelled_weight < math.inf:
        raise ValueError(
            f"unlabelled_weight = {config.unlabelled_weight}: must be > 0 and finite; use Supervised to leave it out"
        )


def three_views(method: FixMatch | FixMatchCTA, batch: Batch, *, weak_no_grad: bool) -> tuple[Tensor, ...]:
    """Logits of the views "labelled", "weak" and "strong", by the live network in training mode.

    Usually one pass, so that batch norm sees all three. With `weak_no_grad` the weak views are normalised among
    themselves and their statistics are not kept.
    """
    labelled, weak, strong = batch["labelled"], batch["weak"], batch["strong"]
    if not weak_no_grad:
        return together(method.logits, labelled, weak, strong)
    with torch.no_grad(), norm_statistics_kept(method):
        of_weak = method.logits(weak)
    of_labelled, of_strong = together(method.logits, labelled, strong)
    return of_labelled, of_weak, of_strong


@full_precision
def fixmatch_losses(
    labelled: Tensor, weak: Tensor, strong: Tensor, *, label: Tensor, min_confidence: float, unlabelled_weight: float
) -> Losses:
    """ℓ_s + λ_u ℓ_u, equations 3 and 4: the unlabelled loss is a mean over all unlabelled images, accepted or not.

    Args:
        labelled: logits (B, K), with `label` (B,) int64. weak, strong: logits (μB, K) of two views of the same images.
        min_confidence: τ; a row is accepted where the largest probability of its weak view is at least this.
    Returns:
        "loss", its parts in nats, and what was accepted. No gradient reaches `weak`.
    """
    probability = weak.detach().softmax(dim=1)
    mask = confident(probability, min_confidence)
    labelled_loss = cross_entropy(labelled, label)
    unlabelled_loss = consistency(probability.argmax(dim=1), strong, distance="cross_entropy", mask=mask)
    return {
        "loss": labelled_loss + unlabelled_weight * unlabelled_loss,
        "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
        "train_accuracy": (labelled.argmax(dim=1) == label).float().mean(),
        **acceptance(probability, mask),
    }  # fmt: skip
