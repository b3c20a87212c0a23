"""Batch norm's statistics on clean images, for networks that trained on something else.

A network that saw tiles, grey or turned pictures keeps the means and variances of those, and probes and clusters would
read its features of whole images through them: "precise BN", Wu and Johnson 2021, arXiv:2105.07576, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.views.draws import Draws
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.training.precision import autocast

CHUNK = 256  # images a forward pass


def clean_rows(images: Images, count: int, seed: int) -> Tensor:
    """At most `count` different rows, (M,) int64, chosen by the seed; of streamed images, of a few row groups."""
    if images.blocks is not None:
        return Order.of(images, min(count, len(images)), seed).at(0)[0]
    return Draws.of(seed, 0, torch.tensor([count])).permutation(len(images))[0, :count]


def clean_images(images: Images, count: int, seed: int) -> Tensor:
    """At most `count` images, chosen by the seed, float32 (M, 3, H, W) in [0, 1] on the CPU."""
    return images.batch(clean_rows(images, count, seed)).float() / 255


@torch.no_grad()
def reset_norm(method: Method, images: Tensor, precision: str) -> None:
    """Set the statistics of the encoder's batch norms to their means over `images`, read as probes read them.

    Args:
        images: (M, 3, H, W) in [0, 1] on the method's device.
    """
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    training, momenta = method.training, [norm.momentum for norm in norms]
    method.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain mean over all forward passes
    reached: list[nn.Module] = []
    hooks = [norm.register_forward_pre_hook(lambda module, _: reached.append(module)) for norm in norms]
    with autocast(precision, images.device.type):  # which norms the features pass: the others keep theirs
        method.features(images[:2].contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    for norm in norms:
        if any(norm is module for module in reached):
            norm.reset_running_stats()
        else:
            norm.eval()
    with autocast(precision, images.device.type):
        for chunk in images.split(CHUNK):
            if len(chunk) > 1:
                method.features(chunk.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    method.train(training)
