"""The contract every method fulfils: its modules, the views it trains on, its loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from methods.views.draws import Draws

if TYPE_CHECKING:
    from methods.encoders import Encoder

Transform = Callable[[Tensor, Draws], Tensor]
Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Stream = Literal["labelled", "unlabelled"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's configuration: frozen, keyword-only, each default with its source."""

    def check_fractions(self, *names: str) -> None:
        """Refuses fields that are no share below all, such as of dropped features: ValueError outside [0, 1)."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value}: must be in [0, 1)")

    def check_shares(self, *names: str) -> None:
        """Refuses fields that are no share, such as of training: ValueError outside [0, 1]."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must be in [0, 1]")

    def check_weights(self, *names: str) -> None:
        """Refuses fields that are no weight of a loss: ValueError unless finite and >= 0."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value}: must be >= 0 and finite; 0 leaves that loss out")

    def advice(self, steps: int) -> str | None:
        """What a person should know before a training of so many steps: a default that suits only much longer ones."""
        return None


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


class PretextTask(nn.Module, ABC):
    """A puzzle made from unlabelled images: its head and its loss, for any encoder, so that several can share one.

    `chance_loss` is about what guessing costs, in the loss's units: ln 4 for rotation.
    """

    chance_loss: float = 1.0

    @abstractmethod
    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """Losses of one batch, in nats: "loss" is minimised, the others are only logged.

        Args:
            images: float32 (B, 3, H, W) in [0, 1], cropped and flipped.
            draws: of the B images; everything random comes from them.
        """

    def on_start(self, images: Tensor) -> None:
        """As `Method.on_start`."""


class Method(nn.Module, ABC):
    """One method, made as `cls(encoder, config, classes=K, images=N)`: K classes of its labels (0 without), and the
    number N of its unlabelled images (0 without), whose indices are 0 .. N - 1.

    `state_dict()` is its state, all of it: a teacher, a bank or a centre is a submodule or a buffer.

    `progress` is the share of training done, in [0, 1). A batch maps each view's name to (B, 3, H, W), and for each
    stream brings "<stream>.index" (B,) int64, and "<stream>.key" (B,) int64, of `Draws(key)`: what a method draws for
    an image, such as a permutation, it draws from these. A labelled stream brings "label", (B,) int64; a teacher's
    labels come as "target": where the configuration's `soft` is true (B, K) float32 rows that sum to 1, else (B,)
    int64.
    """

    Config: ClassVar[type[MethodConfig]]
    encoder: Encoder
    needs_targets: ClassVar[bool] = False  # reads "target", pseudo-labels of its unlabelled images
    needs_distinct: ClassVar[bool] = False  # an image must not be in a batch twice
    clean_norm: ClassVar[bool] = (
        False  # trains on what looks unlike an image: batch norm is set on clean ones at the end
    )
    skips_weights: ClassVar[bool] = False  # a step may leave some weights without a gradient
    needs_average: ClassVar[bool] = False  # reads `average`, so training must keep one
    needs_teacher: ClassVar[bool] = False  # reads `teacher`
    teacher_dim: int | None = None  # of a teacher it reads the features, of this length; None: the logits
    average: Method | None = None  # lent by training: the moving average of this method, frozen, in eval mode
    teacher: Method | None = None  # lent by training: a given model, frozen, in eval mode

    @abstractmethod
    def views(self, pixels: int) -> tuple[View, ...]:
        """The views a training step reads, at `pixels` by `pixels`."""

    @abstractmethod
    def training_step(self, batch: Batch, progress: float) -> Losses:
        """Losses of one batch, in nats: "loss" is minimised, the others are only logged."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (B, dim) that probes, k-NN and clusters read, of images (B, 3, H, W) in [0, 1]."""

    def attach(self, *, average: Method | None = None, teacher: Method | None = None) -> None:
        """Lend it what belongs to others and is not part of its state: nothing of them is trained, saved or sent."""
        self.__dict__.update(average=average, teacher=teacher)  # past nn.Module, which would register them

    def on_start(self, images: Tensor) -> None:
        """Before the first step: clean unlabelled images (M, 3, H, W) in [0, 1], for priors. Default: nothing."""

    def on_step_end(self, progress: float) -> None:
        """After the optimiser's step: EMA, bank, centre. Default: nothing."""

    def forward(self, batch: Batch, progress: float) -> Losses:
        """`training_step`, so that the hooks of data-parallel wrappers fire."""
        return self.training_step(batch, progress)


def is_classifier(method: Method | type[Method]) -> bool:
    """Whether it tells classes apart: it has `logits(images)`, (B, K)."""
    return callable(getattr(method, "logits", None))
