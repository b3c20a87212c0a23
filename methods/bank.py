"""A memory bank: one embedding an image, Wu et al. 2018, arXiv:1805.01978, section 3.1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.collectives import all_gather


class MemoryBank(nn.Module):
    """`rows` (N, D): unit vectors by image index, never trained. Every worker holds all of them, and they stay equal.

    Args:
        images: N.
        dim: D.
        momentum: share of the old row that an update keeps, μ in [0, 1).
    """

    rows: Tensor

    def __init__(self, images: int, dim: int, *, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(images, dim), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor) -> None:
        """m_i = normalise(μ m_i + (1 - μ) v_i), of all workers' images; of an image met twice the last one counts.

        Row (1, 0) with v = (0.6, 0.8) and μ = 0.5 becomes (0.894427, 0.447214).

        Args:
            index: (B,) int64. embedding: (B, D), of any length: normalised here.
        """
        index, embedding = all_gather(index), all_gather(F.normalize(embedding.detach().float(), dim=1))
        place = torch.full((len(self.rows),), -1, dtype=torch.int64, device=index.device)
        order = torch.arange(len(index), device=index.device)
        place.scatter_reduce_(0, index, order, reduce="amax")  # an assignment by index does not say which of two wins
        last = place[index] == order
        index, embedding = index[last], embedding[last]
        old = self.rows[index]
        self.rows[index] = F.normalize(self.momentum * old + (1 - self.momentum) * embedding.to(old.dtype), dim=1)
