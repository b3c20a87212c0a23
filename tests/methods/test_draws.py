"""Counter-based draws: pure functions of the sample, uniform and independent."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.draws import Draws, mix

ROWS = 20_000


def splitmix64(value):
    """The finaliser with Python's integers, as printed by Steele, Lea and Flood 2014, figure 14 (variant 13)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def signed(value):
    return value - 2**64 if value >= 2**63 else value


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_mixing_is_splitmix64_on_unsigned_integers(values):
    assert mix(torch.tensor(values)).tolist() == [signed(splitmix64(value % 2**64)) for value in values]


@given(
    seed=st.integers(0, 2**62), epoch=st.integers(0, 10_000), view=st.integers(0, 9),
    index=st.lists(st.integers(0, 2**40), min_size=1, max_size=9), rng=st.randoms(use_true_random=False),
)  # fmt: skip
@settings(deadline=None)
def test_a_rows_numbers_do_not_depend_on_the_other_rows(seed, epoch, view, index, rng):
    order = torch.tensor(rng.sample(range(len(index)), len(index)))
    whole = Draws.of(seed, epoch, torch.tensor(index), view)
    moved = Draws.of(seed, torch.full((len(index),), epoch), torch.tensor(index)[order], view)
    for numbers in (lambda d: d.uniform(5), lambda d: d.fork(3).permutation(4), lambda d: d.normal(2)):
        assert torch.equal(numbers(moved), numbers(whole)[order])
        assert torch.equal(numbers(whole[order]), numbers(whole)[order])
        assert torch.equal(numbers(whole[:1]), numbers(whole)[:1])


def test_more_numbers_begin_with_the_same_ones():
    draws = Draws.of(1, 2, torch.arange(7))
    assert torch.equal(draws.uniform(9)[:, :4], draws.uniform(4))


def test_every_part_of_the_key_changes_the_draws():
    index = torch.arange(100)
    keys = [
        Draws.of(0, 0, index), Draws.of(1, 0, index), Draws.of(0, 1, index), Draws.of(0, 0, index + 100),
        Draws.of(0, 0, index, 1), Draws.of(0, 0, index).fork(0), Draws.of(0, 0, index).fork(1),
        Draws.of(0, 0, index).fork(0).fork(1), Draws.of(0, 0, index).fork(1).fork(0),
    ]  # fmt: skip
    numbers = torch.cat([key.uniform(4).flatten() for key in keys])
    assert len(numbers.unique()) > 0.999 * len(numbers)  # 2^24 values, 3,600 draws: less than one pair is expected


@pytest.mark.parametrize("source", ["index", "epoch", "seed", "fork", "position"])
def test_numbers_are_uniform_whatever_is_counted(source):
    count = torch.arange(ROWS)
    numbers = {
        "index": lambda: Draws.of(0, 0, count).uniform(1),
        "epoch": lambda: Draws.of(0, count, torch.zeros(ROWS, dtype=torch.int64)).uniform(1),
        "seed": lambda: torch.cat([Draws.of(seed, 0, count[:10]).uniform(1) for seed in range(ROWS // 10)]),
        "fork": lambda: torch.cat([Draws.of(0, 0, count[:10]).fork(k).uniform(1) for k in range(ROWS // 10)]),
        "position": lambda: Draws.of(0, 0, count[:1]).uniform(ROWS),
    }[source]().flatten()
    bins = torch.bincount((numbers * 20).long(), minlength=20).double()
    chi_square = ((bins - ROWS / 20) ** 2 / (ROWS / 20)).sum().item()
    assert chi_square < 19 + 5 * math.sqrt(2 * 19)  # mean 19, s.d. sqrt(38): a bad generator is far beyond
    assert 0 <= numbers.min() and numbers.max() < 1


def test_streams_positions_neighbours_and_epochs_are_uncorrelated():
    index = torch.arange(ROWS)
    draws = Draws.of(5, 0, index)
    columns = torch.stack([
        *draws.uniform(3).unbind(1), draws.fork(0).uniform(1)[:, 0], draws.fork(1).uniform(1)[:, 0],
        draws.fork(0).fork(0).uniform(1)[:, 0], Draws.of(5, 1, index).uniform(1)[:, 0],
        Draws.of(5, 0, index + 1).uniform(1)[:, 0], Draws.of(5, 0, index, 1).uniform(1)[:, 0],
        Draws.of(6, 0, index).uniform(1)[:, 0],
    ])  # fmt: skip
    off_diagonal = torch.corrcoef(columns.double()) - torch.eye(len(columns))
    assert off_diagonal.abs().max() < 5 / math.sqrt(ROWS)


def test_chance_integers_permutations_and_normals_have_their_distribution():
    draws = Draws.of(3, 0, torch.arange(ROWS))
    assert draws.chance(0.3).double().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / ROWS))
    assert not draws.chance(0.0).any() and draws.chance(1.0).all()
    share = torch.bincount(draws.integers(1, 7)[:, 0], minlength=7).double() / ROWS
    assert len(share) == 7 and (share - 1 / 7).abs().max() < 5 * math.sqrt(6 / 49 / ROWS)
    orders = draws.permutation(3)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(ROWS, 3))
    share = torch.bincount(orders[:, 0] * 3 + orders[:, 1], minlength=9).double().reshape(3, 3) / ROWS
    assert (share - (1 - torch.eye(3)) / 6).abs().max() < 5 * math.sqrt(5 / 36 / ROWS)
    normal = draws.normal(2).double()
    assert normal.isfinite().all() and normal.mean().abs() < 5 / math.sqrt(2 * ROWS)
    assert normal.var().item() == pytest.approx(1, abs=5 * math.sqrt(1 / ROWS))
    assert (normal.abs() > 1.96).double().mean().item() == pytest.approx(0.05, abs=5 * math.sqrt(0.0475 / 2 / ROWS))


@given(low=st.floats(-100, 100, width=32), span=st.floats(0.125, 100, width=32))
@settings(deadline=None)
def test_limits_are_kept(low, span):
    numbers = Draws.of(0, 0, torch.arange(500)).uniform(4, low, low + span)
    assert low - 1e-5 <= numbers.min() and numbers.max() <= low + span + 1e-5
    assert numbers.max() - numbers.min() > 0.98 * span
