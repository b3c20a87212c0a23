"""A memory bank, and embeddings against it: one embedding an image, Wu et al. 2018, arXiv:1805.01978, section 3."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from methods.collectives import all_gather
from methods.losses.nce import constant_z_nce, info_nce, log_partition, softmax_nce
from methods.precision import full_precision
from methods.views.draws import Draws

Form = Literal["softmax_nce", "constant_z", "info_nce"]
Negatives = Literal["shared", "own"]


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
        unit = F.normalize(embedding.detach().to(self.rows.dtype), dim=1)
        index, unit = all_gather(index), all_gather(unit)
        last = torch.full((len(self.rows),), -1, dtype=torch.int64, device=index.device)
        order = torch.arange(len(index), device=index.device)
        last.scatter_reduce_(0, index, order, reduce="amax")  # an assignment by index does not say which of two wins
        unit = unit[last[index]]
        self.rows[index] = F.normalize(self.momentum * self.rows[index] + (1 - self.momentum) * unit, dim=1)


class BankContrast(nn.Module):
    """Embeddings against a bank: each should match its image's row and none of the negatives.

    Negatives are uniform over the other images: an image is never its own. Where as many as there are other images are
    asked for, they are all of them, and the sampled losses are exact. "own" draws them for each image, with
    replacement, as the papers do. "shared" is another estimator: one set of different images a batch, by its first
    image's draws, of which each image uses the others. What one image is compared with is uniform as before, without
    replacement; but the images of a batch see the same negatives, so the loss varies more from batch to batch. At 256
    images, 4,096 negatives and a bank of 50,000 x 128 it is 25 to 45 times as fast on a CPU: it gathers no rows.

    "constant_z" keeps the Z that the rows had when they were random. Where they then gather in one direction, as they
    do while an encoder is young, it stays too small and every negative is penalised: of 4,096 images, batch 64, PIRL's
    loss rose from 8.3 to 20 in 256 steps, where "softmax_nce" fell to 7.7. It is there to compare with the papers.

    Args:
        images: N >= 2. dim: D.
        form: of the loss; its scale differs, since the NCE forms sum over negatives.
        temperature: τ > 0, dividing cosine similarities.
        count: K, negatives an image, at most N - 1 are used.
        momentum: as of `MemoryBank`.
    """

    log_normaliser: Tensor
    estimated: Tensor

    def __init__(
        self, images: int, dim: int, *, form: Form, temperature: float, negatives: Negatives, count: int,
        momentum: float,
    ) -> None:  # fmt: skip
        super().__init__()
        if images < 2:
            raise ValueError(f"{images} unlabelled images: a memory bank needs at least 2, to tell them apart")
        self.form, self.temperature, self.negatives = form, temperature, negatives
        self.count = min(count, images - 1)
        self.bank = MemoryBank(images, dim, momentum=momentum)
        self.register_buffer("log_normaliser", torch.zeros(()))  # ln Z of "constant_z"
        self.register_buffer("estimated", torch.tensor(False))
        self._seen: list[tuple[Tensor, Tensor]] = []  # of this step, one a micro-batch; empty between steps

    def forward(self, embedding: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """The losses (V,) float32, in nats, of V embeddings of each image, against the same negatives.

        Args:
            embedding: (V, B, D), of any length: normalised here.
            index: (B,) int64, the images. draws: theirs.
        """
        scores, positive = self.scores(embedding, index, draws)
        if self.form == "info_nce":
            return torch.stack([info_nce(one, positive) for one in scores])
        if self.form == "softmax_nce":
            return torch.stack([softmax_nce(one, positive) for one in scores])
        images, log_normaliser = len(self.bank.rows), self._frozen(scores)
        return torch.stack([
            constant_z_nce(one, positive, log_normaliser=log_normaliser, images=images) for one in scores
        ])  # fmt: skip

    @full_precision
    def scores(self, embedding: Tensor, index: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Scores (V, B, 1 + K) of the candidates, and the column (B,) int64 where each image has itself."""
        rows = self.bank.rows
        unit = F.normalize(embedding, dim=2) / self.temperature
        if self.count == len(rows) - 1:
            return unit @ rows.T, index
        if self.negatives == "own":
            other = draws.integers(self.count, len(rows) - 1)
            other = other + (other >= index[:, None])  # steps over the image itself
            candidates = rows[torch.cat([index[:, None], other], dim=1)]
            return einsum(unit, candidates, "v b d, b c d -> v b c"), torch.zeros_like(index)
        chosen = Draws(all_gather(draws.key[:1])[:1]).bits(len(rows)).topk(self.count + 1).indices[0]
        # one more than asked for: an image that is among the chosen has itself there, the others where the last one is
        place = torch.full((len(rows),), self.count, dtype=torch.int64, device=index.device)
        place[chosen] = torch.arange(self.count + 1, device=index.device)
        positive = place[index]
        itself = einsum(unit, rows[index], "v b d, b d -> v b")
        column = positive[:, None].expand(len(unit), -1, 1)
        return (unit @ rows[chosen].T).scatter(2, column, itself[:, :, None]), positive

    @torch.no_grad()
    def _frozen(self, scores: Tensor) -> Tensor:
        """ln Z of the first batch, of all workers. It is estimated at each step and dropped: asking whether there is
        one already would wait for the device."""
        parts = all_gather(log_partition(scores, images=len(self.bank.rows))[None])
        estimate = parts.logsumexp(dim=0) - math.log(len(parts))
        frozen = torch.where(self.estimated, self.log_normaliser, estimate)
        self.log_normaliser.copy_(frozen)
        self.estimated.fill_(True)
        return frozen

    def remember(self, index: Tensor, embedding: Tensor) -> None:
        """Keeps embeddings (B, D) of the images themselves for `update`: a loss reads the rows until its gradient is
        there, and a step that fails must leave none of itself."""
        self._seen.append((index, embedding.detach()))

    def update(self) -> None:
        """After the optimiser's step: writes what was remembered into the bank."""
        if self._seen:
            index, embedding = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self.bank.update(index, embedding)
        self._seen = []


def check_contrast(*, form: str, temperature: float, negatives: str, count: int, momentum: float) -> None:
    """Refuses settings that `BankContrast` cannot use, by the names they have in a configuration."""
    for name, value, allowed in (("form", form, get_args(Form)), ("negatives", negatives, get_args(Negatives))):
        if value not in allowed:
            raise ValueError(f"{name} = {value}: must be one of {', '.join(allowed)}")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be > 0, it divides similarities")
    if count < 1:
        raise ValueError(f"negative_count = {count}: must be >= 1")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum = {momentum}: must be in [0, 1), the share of the old row that is kept")
