"""Tiles of images, for puzzles: cut from a grid, with gaps, each on its own scale of brightness."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from methods.views.draws import Draws


def cut_tiles(images: Tensor, draws: Draws, *, grid: int, tile: int, gap: int = 0) -> Tensor:
    """One tile of each cell of a grid, at a random place in its cell, drawn for each cell and axis on its own.

    Args:
        images: (B, C, H, W) with H and W multiples of `grid`.
        tile: side in pixels, at most a cell's; what is smaller leaves gaps, so that edges do not continue.
        gap: least pixels between tiles of neighbouring cells: without, two may happen to touch.
    Returns:
        (B, grid², C, tile, tile), cells row by row. Cells of 85 with tiles of 64 and gap 1, as in Noroozi and Favaro's
        code, leave 1 to 41 pixels, 21 on average.
    """
    cells = rearrange(images, "b c (i h) (j w) -> b (i j) c h w", i=grid, j=grid)
    count, number, channels, height, width = cells.shape
    if tile > min(height, width):
        raise ValueError(f"tile = {tile}: larger than a cell of {height} x {width} pixels")
    if not 0 <= gap <= min(height, width) - tile:
        raise ValueError(f"gap = {gap}: must be in [0, {min(height, width) - tile}], what a tile leaves of its cell")
    down = draws.fork(0).integers(number, height - tile - gap + 1)
    across = draws.fork(1).integers(number, width - tile - gap + 1)
    inside = torch.arange(tile, device=images.device)
    rows, columns = down[..., None] + inside, across[..., None] + inside
    index = (rows[..., :, None] * width + columns[..., None, :]).flatten(2)
    picked = cells.flatten(3).gather(3, index[:, :, None].expand(-1, -1, channels, -1))
    return picked.unflatten(3, (tile, tile))


def standardise(tiles: Tensor, *, floor: float = 1e-3) -> Tensor:
    """Each tile (..., C, h, w) with mean 0 and deviation 1 over its numbers; deviations below `floor` count as it."""
    mean = tiles.mean(dim=(-3, -2, -1), keepdim=True)
    deviation = tiles.std(dim=(-3, -2, -1), keepdim=True, correction=0)
    return (tiles - mean) / deviation.clamp(min=floor)


def greyscale(images: Tensor, which: Tensor) -> Tensor:
    """The images (B, 3, H, W) for which `which` (B,) is true in grey: ITU-R 601 luma in all three channels."""
    luma = torch.tensor((0.299, 0.587, 0.114), device=images.device, dtype=images.dtype)
    grey = (images * luma[:, None, None]).sum(dim=1, keepdim=True).expand_as(images)
    return torch.where(which[:, None, None, None], grey, images)


def without_green_magenta(images: Tensor, which: Tensor) -> Tensor:
    """The images (B, 3, H, W) for which `which` (B,) is true without their green-magenta part: x - (a·x) a / 6.

    With a = (-1, 2, -1), along which lenses part the colours towards an image's edge and so tell where a patch is from:
    Doersch et al. 2015, arXiv:1505.05192, section 3.1. Greys stay, pure green (0, 1, 0) becomes a third of white.
    """
    axis = torch.tensor((-1.0, 2.0, -1.0), device=images.device, dtype=images.dtype)[:, None, None]
    rest = images - (images * axis).sum(dim=1, keepdim=True) / 6 * axis
    return torch.where(which[:, None, None, None], rest, images)


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Each image (B, 3, H, H) turned to the left by its `quarters` (B,) int64, 0 .. 3, of a full turn, exactly."""
    turned = torch.stack([images.rot90(quarter, (2, 3)) for quarter in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]
