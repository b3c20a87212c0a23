"""Consistency regularisation: what pseudo-labelling, Π-model, Mean Teacher, VAT, MixMatch, UDA and FixMatch share.

For an unlabelled image u with two views or two models, the loss is λ(t) (1 / |U|) Σ m_u d(q_u, p(A(u))): a target q
without gradient, a mask m, a distance d. Each method chooses these and calls the functions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.precision import full_precision

NormFrom = Literal["labelled", "all"]
RAMP_STEPS = 100  # in fewer a network learns next to nothing


def together(network: Callable[[Tensor], Tensor], *streams: Tensor) -> tuple[Tensor, ...]:
    """One pass over several batches of images, so that batch norm sees all of them, and the outputs of each."""
    return network(torch.cat(streams)).split([len(images) for images in streams])


@contextmanager
def norm_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalises with the batch's statistics but does not add them to its running ones."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, batches) in zip(norms, saved, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if batches is None else batches.clone()  # a count that is thrown away
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def two_streams(
    network: Callable[[Tensor], Tensor], labelled: Tensor, unlabelled: Tensor, *, model: nn.Module, norm_from: NormFrom
) -> tuple[Tensor, Tensor]:
    """The outputs of labelled and of unlabelled images, and whose statistics batch norm of `model` remembers.

    "labelled": two passes, each normalised by its own statistics, of which the labelled ones' are added to the running
    ones, so that unlabelled images do nothing but add their loss. "all": one pass, normalised and remembered together.
    """
    if norm_from == "all":
        first, second = together(network, labelled, unlabelled)
        return first, second
    first = network(labelled)
    with norm_statistics_kept(model):
        return first, network(unlabelled)


@torch.no_grad()
@full_precision
def prediction(logits: Tensor) -> Tensor:
    """The distributions (B, K) of logits (B, K) as a target: float32 whatever autocast does, and without gradient."""
    return logits.softmax(dim=1)


@full_precision
def sharpen(probability: Tensor, temperature: float) -> Tensor:
    """q ∝ p^(1 / T) of distributions (B, K): (.6, .3, .1) at T = 0.5 is (.783, .196, .022); T = 1 changes nothing.

    MixMatch, Berthelot et al. 2019, arXiv:1905.02249, eq. 7. Computed from logarithms, so that no T underflows.
    """
    return F.softmax(probability.clamp_min(torch.finfo(probability.dtype).tiny).log() / temperature, dim=1)


@full_precision
def confident(probability: Tensor, threshold: float) -> Tensor:
    """(B,) float: 1 where the largest probability of (B, K) is at least the threshold, else 0."""
    return (probability.amax(dim=1) >= threshold).to(probability.dtype)


@full_precision
def consistency(
    target: Tensor, logits: Tensor, *, distance: Literal["mse", "kl", "cross_entropy"], mask: Tensor | None = None
) -> Tensor:
    """The mean over ALL rows of m · d(q, softmax(logits)): rows that the mask leaves out count as 0, and so the loss
    fades with them.

    Args:
        target: distributions (B, K), or labels (B,) int64 for the cross-entropy; no gradient reaches them.
        logits: (B, K).
        distance: "mse" averages the squared differences over the classes; "kl" is KL(q ‖ p).
        mask: (B,) in [0, 1].
    Returns:
        0-d, in nats ("mse": without unit).
    """
    target = target.detach()
    match distance:
        case "mse":
            each = (target - logits.softmax(dim=1)).square().mean(dim=1)
        case "kl":
            each = F.kl_div(logits.log_softmax(dim=1), target, reduction="none").sum(dim=1)
        case "cross_entropy":
            each = F.cross_entropy(logits, target, reduction="none")
    return (each if mask is None else each * mask.detach()).mean()


def early_ramp(ramp: float, steps: int) -> str | None:
    """Advice against a `ramp`, a share of training, that is over before the network knows anything. 0 is a choice."""
    over = round(ramp * steps)
    if ramp == 0 or over >= RAMP_STEPS:
        return None
    return (
        f"ramp = {ramp:g} of {steps:,} steps is over after {over}, and guesses of a network that knows nothing yet may "
        "let one class swallow the others; in short runs give 0.4 to 1"
    )


def linear_ramp(progress: float, share: float) -> float:
    """0 at the start to 1 at `share` of training, then 1; `share` 0 is 1 throughout."""
    return 1.0 if progress >= share else progress / share


def exponential_ramp(progress: float, share: float) -> float:
    """exp(-5 (1 - t)²) with t from 0 to 1 over `share` of training: .0067 at the start, .287 halfway, then 1.

    Laine and Aila 2016, arXiv:1610.02242, section 2.
    """
    return math.exp(-5 * (1 - linear_ramp(progress, share)) ** 2)


@torch.no_grad()
@full_precision
def acceptance(probability: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What is logged of pseudo-labels: "accepted", the share of rows; "confidence", the mean largest probability;
    "largest_class", the share of the accepted rows that the most frequent class holds (0 when none is accepted)."""
    top = probability.max(dim=1)
    held = torch.zeros(probability.shape[1], device=mask.device, dtype=mask.dtype).index_add_(0, top.indices, mask)
    return {
        "accepted": mask.mean(), "confidence": top.values.mean(),
        "largest_class": held.max() / mask.sum().clamp_min(1),
    }  # fmt: skip
