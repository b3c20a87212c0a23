"""Permutations far from each other, the classes of a jigsaw puzzle: Noroozi and Favaro 2016, arXiv:1603.09246, alg. 1.

The distance of two is Hamming's: at how many places they differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["max-avg", "max-min"]


@lru_cache(maxsize=32)
def permutation_set(tiles: int, count: int, rule: Rule) -> tuple[tuple[int, ...], ...]:
    """`count` permutations of 0 .. tiles - 1, chosen one by one: each next is the farthest from those chosen before.

    The first is the identity and of equals the lexicographically first is taken, so a set is a function of its
    arguments, and a smaller set the beginning of a larger. The paper starts at random: that renames the tiles.

    Args:
        tiles: at most 9, since all tiles! are compared.
        rule: what is greatest, the mean distance to those chosen (the published sets) or the least. max-avg happily
            takes two that differ by one swap; max-min keeps labels apart.
    Returns:
        4 of 4 by either rule: 0123, 1032, 2301, 3210.
    """
    every = all_permutations(tiles)
    if not 1 <= count <= len(every):
        raise ValueError(f"count = {count}: must be in [1, {len(every)}], {tiles} tiles have no more orders")
    places = every.T.contiguous()
    differs = torch.stack([places != tile for tile in range(tiles)], dim=1).view(torch.uint8)  # (place, tile, all)
    score = torch.full((len(every),), 0 if rule == "max-avg" else tiles, dtype=torch.int32, device="cpu")
    chosen, taken = [0], -(2**30)
    while len(chosen) < count:
        distance = torch.zeros(len(every), dtype=torch.uint8, device="cpu")
        for place, tile in enumerate(every[chosen[-1]].tolist()):
            distance += differs[place, tile]
        score = score + distance if rule == "max-avg" else score.minimum(distance)
        score[chosen[-1]] = taken
        chosen.append(int(score.argmax()))
    return tuple(tuple(row) for row in every[chosen].tolist())


def all_permutations(tiles: int) -> Tensor:
    """All permutations of 0 .. tiles - 1 in lexicographic order: (tiles!, tiles) uint8, on the CPU."""
    if not 0 <= tiles <= 9:
        raise ValueError(f"tiles = {tiles}: must be in [0, 9], ten have 3,628,800 orders")
    if tiles == 0:
        return torch.zeros(1, 0, dtype=torch.uint8, device="cpu")
    rest = all_permutations(tiles - 1)
    # after a first tile the others follow in every order, renamed to leave it out
    first = [rest.new_full((len(rest), 1), tile) for tile in range(tiles)]
    return torch.cat([torch.cat([column, rest + (rest >= column)], dim=1) for column in first])


def separation(permutations: tuple[tuple[int, ...], ...]) -> tuple[float, int]:
    """Mean and least distance of pairs of different rows, of at least 2: 0123, 1032, 2301 have 4.0 and 4."""
    rows = torch.tensor(permutations, dtype=torch.float32, device="cpu")
    total, least = 0.0, rows.shape[1]
    for first in range(0, len(rows), 512):
        distance = torch.cdist(rows[first : first + 512], rows, p=0)
        total += distance.sum(dtype=torch.float64).item()
        own = torch.arange(len(distance), device="cpu")
        distance[own, first + own] = rows.shape[1]
        least = min(least, int(distance.min()))
    return total / (len(rows) * (len(rows) - 1)), least
