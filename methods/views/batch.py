"""What every view needs of a batch: its check, its size, its cut into parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.views.draws import Draws

_CPU_CHUNK = 2**17  # elements worked on at once: 512 KiB of float32, so that input and output share a core's L2
_DEVICE_CHUNK = 2**28  # 1 GiB of float32: a bound on scratch memory, since launches cost more than caches there


def check_images(images: Tensor, draws: Draws) -> None:
    """Refuses what no view can read.

    Raises:
        ValueError: not uint8 (B, 3, H, W) with all sizes at least 1, or not one draw an image.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: need uint8 (B, 3, H, W), no size 0")
    if len(draws) != len(images):
        raise ValueError(f"{len(draws)} draws for {len(images)} images: need one each")


def constant(values: tuple, device: torch.device) -> Tensor:
    """A (nested) tuple of numbers as a tensor, copied to the device once. Not to be written to."""
    return _constant(values, repr(values), device)


@lru_cache(maxsize=64)
def _constant(values: tuple, written: str, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)  # `written`, since (1,) == (1.0,) == (True,), of three types


def chunks(begin: int, end: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Cuts rows begin .. end - 1, of `elements` numbers each, into even parts of about a cache's size."""
    parts = max(1, round((end - begin) * elements / (_CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK)))
    rows = max(1, math.ceil((end - begin) / parts))
    for first in range(begin, end, rows):
        yield slice(first, min(first + rows, end))


def grouped(code: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Sorts a batch by what is done to each sample; waits for the device, since the bounds cut tensors.

    Args:
        code: (B,) int64 in 0 .. count - 1.
    Returns:
        The rows in order of their code, (B,) int64, and count + 1 bounds: rows[bounds[k] : bounds[k + 1]] have code k.
    """
    code, rows = code.sort()
    return rows, torch.searchsorted(code, torch.arange(count + 1, device=code.device)).tolist()


def to_float(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 [0, 1]."""
    return images.to(torch.float32).div_(255)


def resize(images: Tensor, pixels: int) -> Tensor:
    """uint8 (B, 3, H, W) to uint8 (B, 3, pixels, pixels); nothing when the size is right.

    Bilinear, antialiased where it shrinks, rounded to whole values. Another aspect ratio is squeezed, not cropped: no
    edge of an image is lost.
    """
    if images.shape[2:] == (pixels, pixels):
        return images
    resized = torch.empty(len(images), 3, pixels, pixels, dtype=torch.uint8, device=images.device)
    elements = 3 * max(images.shape[2] * images.shape[3], pixels * pixels)
    for part in chunks(0, len(images), elements, images.device):
        smooth = F.interpolate(images[part].float(), (pixels, pixels), mode="bilinear", antialias=True)
        resized[part] = smooth.round_().clamp_(0, 255)
    return resized
