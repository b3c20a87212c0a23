"""The contract every method fulfils: its modules, the views it trains on, its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from methods.views.draws import Draws

Transform = Callable[[Tensor, Draws], Tensor]
Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Stream = Literal["labelled", "unlabelled"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's configuration: frozen, keyword-only, each default with its source."""


@dataclass(frozen=True)
class View:
    """One augmented look at an image.

    Args:
        name: key of the view in the batch.
        transform: batched augmentation, uint8 (B, 3, H, W) and the batch's draws to float32 (B, 3, h, w) in [0, 1].
        stream: which images it is made from: "labelled" or "unlabelled".
    """

    name: str
    transform: Transform
    stream: Stream = "unlabelled"


class Method(nn.Module, ABC):
    """One method, made as `cls(encoder, config, classes=K)`, K = 0 without labels.

    `state_dict()` is its state, all of it: a teacher, a bank or a centre is a submodule or a buffer.

    `progress` is the share of training done, in [0, 1). A batch maps each view's name to (B, 3, H, W), and, for each
    stream, "<stream>.index" (B,); a labelled stream brings "label", (B,) int64; pseudo-labels of an unlabelled stream
    come as "target", (B, K) float32 rows that sum to 1.
    """

    Config: ClassVar[type[MethodConfig]]
    needs_targets: ClassVar[bool] = False  # reads "target", pseudo-labels of its unlabelled images
    needs_distinct: ClassVar[bool] = False  # an image must not be in a batch twice

    @abstractmethod
    def views(self, pixels: int) -> tuple[View, ...]:
        """The views a training step reads, at `pixels` by `pixels`."""

    @abstractmethod
    def training_step(self, batch: Batch, progress: float) -> Losses:
        """Losses of one batch, in nats: "loss" is minimised, the others are only logged."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (B, dim) that probes, k-NN and clusters read, of images (B, 3, H, W) in [0, 1]."""

    def on_step_end(self, progress: float) -> None:
        """After the optimiser's step: EMA, bank, centre. Default: nothing."""

    def forward(self, batch: Batch, progress: float) -> Losses:
        """`training_step`, so that the hooks of data-parallel wrappers fire."""
        return self.training_step(batch, progress)
