"""The order in which images are learned from: a pure function of seed and step, so any step can be resumed exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from methods.views.draws import Draws


@dataclass(frozen=True)
class Order:
    """An endless, shuffled stream over `rows` images in batches of `batch`.

    With at least a batch of images, an epoch is its whole batches, so that no image is in a batch twice, and those left
    over differ from epoch to epoch. With fewer, epochs follow each other inside a batch.
    """

    rows: int
    batch: int
    seed: int

    @property
    def images_per_epoch(self) -> int:
        """How many images a pass reads."""
        return self.rows // self.batch * self.batch if self.rows >= self.batch else self.rows

    def at(self, step: int, *, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Rows (B,) int64 and epochs (B,) int64 of a step's batch, or of one worker's contiguous part of it.

        The batch does not depend on `parts`. Raises ValueError when the batch cannot be split evenly.
        """
        if self.batch % parts:
            raise ValueError(f"batch {self.batch} cannot be split evenly over {parts} workers")
        share = self.batch // parts
        position = torch.arange(share) + step * self.batch + part * share
        epoch = position // self.images_per_epoch
        place = position % self.images_per_epoch
        rows = torch.empty_like(position)
        for number in epoch.unique().tolist():
            here = epoch == number
            rows[here] = _permutation(self.seed, self.rows, number)[place[here]]
        return rows, epoch


@lru_cache(maxsize=4)
def _permutation(seed: int, rows: int, epoch: int) -> Tensor:
    """The order of an epoch, (rows,) int64; kept, since each step of the epoch asks for it."""
    return Draws.of(seed, 0, torch.tensor([epoch])).permutation(rows)[0]
