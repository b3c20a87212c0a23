"""The order in which images are learned from: a pure function of seed and step, so any step can be resumed exactly."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from methods.views.draws import Draws
from orchestrator.data.images import Images

_ROWS_IN_WINDOW = 1  # streams of draws, beside the one of whole epochs


class Blocks:
    """Rows that lie together and are read together: an epoch shuffles the blocks, and then the rows of `window` blocks
    at a time, so that nothing has to be held but those.

    Args:
        starts: (B + 1,) where each block begins, from 0 to the number of rows.
    """

    def __init__(self, starts: np.ndarray, window: int) -> None:
        self.starts, self.window = torch.from_numpy(starts), window

    def first_rows(self, seed: int, epoch: int, window: int, *, part: int, parts: int) -> Tensor:
        """A row of each block of a window that a worker's parts of the batches come from, with one to each side, since
        batches do not take equally much of all."""
        order, _ = _order_of_blocks(self, seed, epoch)
        blocks = order[window * self.window : (window + 1) * self.window].sort().values
        first, last = part * len(blocks) // parts - 1, -(-(part + 1) * len(blocks) // parts) + 1
        return self.starts[blocks[max(0, first) : last]]

    def rows(self, place: Tensor, seed: int, epoch: int) -> Tensor:
        """Rows (P,) int64 at the places (P,) of an epoch's order: a pure function, whatever was asked before."""
        _, ends = _order_of_blocks(self, seed, epoch)
        number = torch.searchsorted(ends, place, right=True)
        rows = torch.empty_like(place)
        for window in number.unique().tolist():
            here = number == window
            first = int(ends[window - 1]) if window else 0
            rows[here] = _rows_of_window(self, seed, epoch, window)[place[here] - first]
        return rows


@dataclass(frozen=True)
class Order:
    """An endless, shuffled stream over `rows` images in batches of `batch`.

    With at least a batch of images, an epoch is its whole batches, so that no image is in a batch twice, and those left
    over differ from epoch to epoch. With fewer, epochs follow each other inside a batch.

    Without `blocks` an epoch is any order of its rows. With them it is a two-level shuffle, and the rows of a batch are
    in the order of their blocks, so that a worker's part of it comes from few of them.
    """

    rows: int
    batch: int
    seed: int
    blocks: Blocks | None = field(default=None, compare=False)

    @staticmethod
    def of(images: Images, batch: int, seed: int, *, copies: Tensor | None = None) -> Order:
        """The order over images, row i repeated `copies[i]` times in place where that is given: (N,) int64."""
        rows = len(images) if copies is None else int(copies.sum())
        if images.blocks is None:
            return Order(rows, batch, seed)
        starts = images.blocks
        if copies is not None:
            starts = np.unique(np.concatenate([[0], np.cumsum(copies.numpy())])[starts])
        return Order(rows, batch, seed, Blocks(starts, images.window))

    @property
    def images_per_epoch(self) -> int:
        """How many images a pass reads."""
        return self.rows // self.batch * self.batch if self.rows >= self.batch else self.rows

    def window(self, step: int) -> tuple[int, int]:
        """(epoch, number in it) of the window that a step's batch ends in."""
        assert self.blocks is not None
        epoch, place = divmod((step + 1) * self.batch - 1, self.images_per_epoch)
        _, ends = _order_of_blocks(self.blocks, self.seed, epoch)
        return epoch, int(torch.searchsorted(ends, place, right=True))

    def window_after(self, step: int) -> tuple[int, int]:
        """The window that comes next."""
        assert self.blocks is not None
        epoch, number = self.window(step)
        _, ends = _order_of_blocks(self.blocks, self.seed, epoch)
        return (epoch, number + 1) if number + 1 < len(ends) else (epoch + 1, 0)

    def at(self, step: int, *, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Rows (B,) int64 and epochs (B,) int64 of a step's batch, or of one worker's contiguous part of it.

        The batch does not depend on `parts`. Raises ValueError when the batch cannot be split evenly.
        """
        if self.batch % parts:
            raise ValueError(f"batch {self.batch} cannot be split evenly over {parts} workers")
        share = self.batch // parts
        mine = slice(part * share, (part + 1) * share)
        position = torch.arange(self.batch) + step * self.batch
        if self.blocks is None:
            position = position[mine]
        epoch = position // self.images_per_epoch
        place = position % self.images_per_epoch
        rows = torch.empty_like(position)
        for number in epoch.unique().tolist():
            here = epoch == number
            if self.blocks is None:
                rows[here] = _permutation(self.seed, self.rows, number)[place[here]]
            else:
                rows[here] = self.blocks.rows(place[here], self.seed, number)
        if self.blocks is not None:
            by_block = torch.searchsorted(self.blocks.starts, rows, right=True).argsort(stable=True)[mine]
            return rows[by_block], epoch[by_block]
        return rows, epoch


def read_ahead(
    images: Images, order: Order, step: int, *, part: int = 0, parts: int = 1, rows: Tensor | None = None
) -> list[Future]:
    """Begin to read what the window after a step's needs, where the step is the first that ends in its window.

    Args:
        rows: (N,) the image that each place of the order stands for, where they are not the same.
    """
    if order.blocks is None or order.window(step) == order.window(step - 1):
        return []
    now, coming = (
        order.blocks.first_rows(order.seed, *window, part=part, parts=parts)
        for window in (order.window(step), order.window_after(step))
    )
    return images.read_ahead(*((now, coming) if rows is None else (rows[now], rows[coming])))


@lru_cache(maxsize=4)
def _permutation(seed: int, rows: int, epoch: int) -> Tensor:
    """The order of an epoch, (rows,) int64; kept, since each step of the epoch asks for it."""
    return Draws.of(seed, 0, torch.tensor([epoch])).permutation(rows)[0]


@lru_cache(maxsize=8)
def _order_of_blocks(blocks: Blocks, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Of an epoch: the blocks (B,) in their order, and where each window ends in the epoch's order."""
    sizes = blocks.starts.diff()
    order = _permutation(seed, len(sizes), epoch)
    ends = sizes[order].cumsum(0)
    return order, torch.cat([ends[blocks.window - 1 :: blocks.window], ends[-1:]]).unique()


@lru_cache(maxsize=8)
def _rows_of_window(blocks: Blocks, seed: int, epoch: int, window: int) -> Tensor:
    """The rows of a window in their order."""
    order, _ = _order_of_blocks(blocks, seed, epoch)
    mine = order[window * blocks.window : (window + 1) * blocks.window].tolist()
    rows = torch.cat([torch.arange(int(blocks.starts[block]), int(blocks.starts[block + 1])) for block in mine])
    draws = Draws.of(seed, torch.tensor([epoch]), torch.tensor([window]), view=_ROWS_IN_WINDOW)
    return rows[draws.permutation(len(rows))[0]]
