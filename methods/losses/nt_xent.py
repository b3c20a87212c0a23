"""NT-Xent, the contrastive loss of SimCLR: Chen et al. 2020, arXiv:2002.05709, eq. 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from methods.precision import full_precision


@full_precision
def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float, anchors: slice = slice(None)) -> Tensor:
    """Cross-entropy of picking each anchor's positive among all 2B - 1 other rows.

    Args:
        z1, z2: projections of two views, (B, D) with B >= 2. Row i of both comes from image i; every other row is a
            negative; the length of a row does not matter. Under data parallelism pass gathered rows.
        temperature: τ > 0, dividing cosine similarities.
        anchors: the images that choose, of both views: a worker's own b among all workers'. Its memory is then 2b by
            2B, and the mean over the workers is the loss of all anchors.
    Returns:
        Mean over the anchors in nats, 0-d float32 (the released code returns twice this). Orthogonal images with
        z1 == z2 give log(1 + (2B - 2) exp(-1/τ)); a collapsed encoder gives log(2B - 1).
    Raises:
        ValueError: shapes differ, are not 2-d, or B < 2, which leaves no negatives.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"nt_xent: z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}: need equal (B, D), B >= 2")
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    rows, own = torch.cat([z1, z2]), torch.cat([z1[anchors], z2[anchors]])
    similarity = einsum(own / temperature, rows, "i d, j d -> i j")
    place = torch.arange(len(rows), device=rows.device).view(2, -1)[:, anchors]
    itself, positive = place.flatten(), place.flip(0).flatten()
    # nobody is their own negative. Past autograd, which needs no word of it: softmax gives -inf the gradient 0, and a
    # mask that it knows of costs passes over the matrix
    similarity.detach().scatter_(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarity, positive)
