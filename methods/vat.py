"""Virtual adversarial training: Miyato et al. 2017, arXiv:1704.03976, algorithm 1, with entropy minimisation.

The prediction for an unlabelled image is kept along the small shift that would change it most. Settings: FixMatch's
code for its baselines, Sohn et al. 2020, arXiv:2001.07685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import (
    NormFrom,
    acceptance,
    consistency,
    linear_ramp,
    norm_statistics_kept,
    prediction,
    together,
    two_streams,
)
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.precision import full_precision
from methods.views.draws import Draws
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class VATConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift by an eighth, of both streams: FixMatch's code for its baselines
    epsilon: float = 3.0  # ε, the shift's length over all pixels in [0, 1], at 32 px: 6 in same code, on [-1, 1]
    xi: float = 1e-3  # ξ, the trial step; the paper's 1e-6 drowns in float32's rounding, see `adversarial_shift`
    iterations: int = 1  # of the power method, K in section 3.3
    unlabelled_weight: float = 0.3  # same code; 1 in the paper, algorithm 1
    ramp: float = 0.4  # share of training over which the weight rises from 0, linearly; same code
    entropy_weight: float = 0.06  # on the predictions' mean entropy from the first step on, same code; 0 is plain VAT
    label_smoothing: float = 0.1  # same code declares it, and leaves it out of the loss
    norm_from: NormFrom = "labelled"  # whose statistics batch norm keeps, same code; "all": both streams in one pass

    def __post_init__(self) -> None:
        self.check_shares("ramp")
        self.check_fractions("label_smoothing")
        if not (math.isfinite(self.xi) and self.xi > 0):
            raise ValueError(f"xi = {self.xi}: must be > 0, the length of the trial step")
        if self.iterations < 1:
            raise ValueError(f"iterations = {self.iterations}: must be >= 1")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon = {self.epsilon}: must be >= 0 and finite, the length of the worst step")
        self.check_weights("unlabelled_weight", "entropy_weight")


class VAT(Method):
    """A classifier on labelled images whose word on an unlabelled one holds in the worst direction nearby.

    It has no dropout: two masks would differ by far more than the trial step, which would then point nowhere.
    """

    Config = VATConfig

    def __init__(self, encoder: Encoder, config: VATConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, dropout=0.0)

    def views(self, pixels: int) -> tuple[View, ...]:
        weak = self.config.weak.build(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label, images = self.config, batch["label"], batch["weak"]

        def network(moved: Tensor) -> Tensor:  # normalised as the clean images are, or ε = 0 would cost something
            if c.norm_from == "labelled":
                return self.logits(moved)
            return together(self.logits, batch["labelled"], moved)[1]

        labelled, clean = two_streams(self.logits, batch["labelled"], images, model=self, norm_from=c.norm_from)
        start = Draws(batch["unlabelled.key"]).fork(0).normal(images[0].numel()).view(images.shape).to(images.dtype)
        with norm_statistics_kept(self):
            shift = adversarial_shift(images, start, network, epsilon=c.epsilon, xi=c.xi, iterations=c.iterations)
            moved = network(images + shift)
        target = prediction(clean)
        labelled_loss = cross_entropy(labelled, label, smoothing=c.label_smoothing)
        unlabelled_loss = consistency(target, moved, distance="kl")
        entropy_loss = entropy(clean)
        weight = c.unlabelled_weight * linear_ramp(progress, c.ramp)
        return {
            "loss": labelled_loss + weight * unlabelled_loss + c.entropy_weight * entropy_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "entropy_loss": entropy_loss.detach(),
            "train_accuracy": (labelled.argmax(dim=1) == label).float().mean(),
            **acceptance(target, target.new_ones(len(target))),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


@full_precision
def adversarial_shift(
    images: Tensor, start: Tensor, network: Callable[[Tensor], Tensor], *,
    epsilon: float, xi: float, iterations: int = 1,
) -> Tensor:  # fmt: skip
    """r = ε g / ‖g‖ with g the gradient, at a trial step ξ d / ‖d‖, of the divergence from the clean prediction, which
    is one step of the power method towards its steepest direction: section 3.3.

    Both predictions differ by about ξ / 100, so they are made in whole float32: autocast and TF32 are off. Of 64
    CIFAR-10 images, before and after training, the direction has a cosine with that of float64 of 0.18 and 0.07 at
    ξ = 1e-6, 0.99 and 0.98 at 1e-4, 1.00 and 1.00 at 1e-3, 0.96 and 0.98 at 0.1.

    Args:
        images: (B, 3, H, W) in [0, 1]. start: random directions of any length, of the same shape.
        network: images to logits (B, K); no gradient of it is left on its weights.
        epsilon, xi: lengths over all pixels of an image, in units of [0, 1].
    Returns:
        (B, 3, H, W) of length ε each, 0 where nothing changes the prediction; without gradient.
    """
    with full_float32(), torch.enable_grad():
        with torch.no_grad():
            clean, direction = prediction(network(images)), start
        for _ in range(iterations):
            step = (xi * unit(direction)).requires_grad_()
            divergence = consistency(clean, network(images + step), distance="kl")
            (direction,) = torch.autograd.grad(divergence, step)
    return epsilon * unit(direction)


def unit(vectors: Tensor) -> Tensor:
    """Each of (B, C, H, W) at length 1, first divided by its largest entry so that no square underflows; 0 stays 0."""
    tiny = torch.finfo(vectors.dtype).tiny
    for order in (math.inf, 2):
        vectors = vectors / torch.linalg.vector_norm(vectors, order, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return vectors


@full_precision
def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of softmax(logits), (B, K), in nats: ln K where they are equal."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, a GPU's float32 convolutions and products keep all 24 bits of a factor, of which TF32 keeps 11."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
