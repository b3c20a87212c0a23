"""Supervised training with the noise of Noisy Student: Xie et al. 2020, arXiv:1911.04252, section 2.

With the same augmentation, dropout and stochastic depth as a student this is the teacher, and the baseline that a
student has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.encoders import Encoder, set_drop_path
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    augment: Augment = Augment()  # pad 4, crop, flip: He et al. 2015, section 4.2
    label_smoothing: float = 0.0  # 0.1 in Noisy Student
    soft: bool = False  # of a teacher's labels learn the whole distribution: distillation, Hinton et al. 2015, T = 1
    dropout: float = 0.0  # on the pooled features, fraction dropped
    drop_path: float = 0.0  # stochastic depth of the last block, linear decay; 0.2 in Noisy Student

    def __post_init__(self) -> None:
        self.check_fractions("label_smoothing", "dropout", "drop_path")
        if self.soft and self.label_smoothing:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be 0 with soft, which is smooth already")


class Supervised(Method):
    """A classifier on labelled images."""

    Config = SupervisedConfig

    def __init__(self, encoder: Encoder, config: SupervisedConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        set_drop_path(encoder, config.drop_path)
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("labelled", self.config.augment.build(pixels), stream="labelled"),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        logits = self.logits(batch["labelled"])
        if self.config.soft:
            loss = cross_entropy(logits, batch["target"])
        else:
            loss = cross_entropy(logits, batch["label"], smoothing=self.config.label_smoothing)
        return {"loss": loss, "train_accuracy": (logits.argmax(dim=1) == batch["label"]).float().mean()}

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))
