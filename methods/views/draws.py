"""Counter-based random numbers: each is a pure function of (seed, epoch, sample index, view, stream, position).

No generator advances, so loader order, worker count and restarts change no draw. The mixing function is SplitMix64's
finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 4) on wrapping int64,
which gives the same bits on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 in, int64 of the same shape out, every bit depending on every bit."""
    value = (value ^ _shift_right(value, 30)) * _MIX1
    value = (value ^ _shift_right(value, 27)) * _MIX2
    return value ^ _shift_right(value, 31)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: `key` (B,) int64 names each sample's own endless, addressable sequence."""

    key: Tensor

    @staticmethod
    def of(seed: int, epoch: Tensor | int, index: Tensor, view: int = 0) -> Draws:
        """The draws of samples `index` (B,) int64 for one view; `epoch`, scalar or (B,), counts its earlier visits."""
        key = torch.as_tensor(index, dtype=torch.int64)
        for part in (seed, epoch, view):
            key = mix(key * _GOLDEN + torch.as_tensor(part, dtype=torch.int64, device=key.device) + 1)
        return Draws(key)

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, rows: slice | Tensor) -> Draws:
        """The draws of a part of the batch: row i's numbers do not depend on the other rows."""
        return Draws(self.key[rows])

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on another device, bit for bit."""
        return Draws(self.key.to(device))

    def fork(self, stream: int) -> Draws:
        """An independent sequence per sample, for one operation of a composition."""
        return Draws(mix(self.key * _MIX1 + stream * 2 + 1))

    def parts(self, count: int) -> Draws:
        """The draws of `count` parts of each sample, such as its tiles: (B * count,), a sample's together."""
        return Draws(torch.stack([self.fork(part).key for part in range(count)], dim=1).flatten())

    def bits(self, count: int) -> Tensor:
        """(B, count) int64, uniform over all 64-bit patterns."""
        position = torch.arange(1, count + 1, device=self.key.device) * _GOLDEN
        return mix(self.key[:, None] + position)

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, count) float32, uniform in [low, high) on a grid of 2^-24; other limits than these may round to high."""
        unit = _shift_right(self.bits(count), 40).to(torch.float32) * 2.0**-24
        return unit if (low, high) == (0.0, 1.0) else low + (high - low) * unit

    def chance(self, probability: float) -> Tensor:
        """(B,) bool, true with `probability`."""
        return self.uniform(1)[:, 0] < probability

    def integers(self, count: int, high: int) -> Tensor:
        """(B, count) int64, uniform over 0 .. high - 1 (bias below high / 2^24)."""
        return (self.uniform(count).double() * high).long()

    def permutation(self, count: int) -> Tensor:
        """(B, count) int64: a random order of 0 .. count - 1 for each sample."""
        return self.bits(count).argsort(dim=1)

    def normal(self, count: int) -> Tensor:
        """(B, count) float32, standard normal, by Box and Muller's transform."""
        first, second = self.uniform(2 * count).chunk(2, dim=1)
        return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)
