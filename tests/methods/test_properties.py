"""What holds for every method: the order of a batch means nothing, and equal draws give equal losses."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.jigsaw import JigsawPlus
from methods.mixmatch import MixMatch
from methods.remixmatch import ReMixMatch
from tests.methods.contract import BATCH, METHODS, double, double_batch, steps

each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
seeds = st.integers(0, 2**20)
few = settings(max_examples=6, deadline=None)


@functools.cache
def method_of(cls, turn=0):
    """A method in double precision; of one whose tasks take turns, with the turn of `turn`."""
    method = double(cls, norm="batch")
    for _ in range(turn):
        method.on_step_end(0.0)
    return method


def losses(method, batch):
    """Its losses, of a step that is not finished, so that nothing of it stays."""
    return {name: value.detach() for name, value in method(batch, 0.0).items()}


@pytest.mark.parametrize("cls", [m for m in METHODS if m not in (MixMatch, ReMixMatch)], ids=lambda cls: cls.__name__)
@given(data=st.data(), seed=seeds)
@few
def test_the_order_of_a_batch_changes_no_loss(cls, data, seed):
    """All negatives of so small a batch are used, so which ones a batch draws does not depend on its order either.

    MixUp mixes each image with the one that has its place in the shuffled batch, so there the order means something.
    """
    if cls is JigsawPlus:  # strangers' tiles come from the next image, the first one's follow the last
        order = torch.arange(BATCH).roll(data.draw(st.integers(1, BATCH - 1)))
    else:
        order = torch.tensor(data.draw(st.permutations(range(BATCH))))
    for turn in range(steps(cls) // 2 or 1):
        method = method_of(cls, turn)
        batch = double_batch(method, seed)
        found = losses(method, batch)
        again = losses(method, {name: value[order] for name, value in batch.items()})
        for name, value in found.items():
            torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-6)


@each_method
@given(seed=seeds, other=seeds)
@few
def test_a_methods_draws_are_its_keys_and_not_the_generators(cls, seed, other):
    method = method_of(cls)
    batch = double_batch(method, seed)
    torch.manual_seed(seed)
    found = losses(method, batch)
    torch.manual_seed(other)
    again = losses(method, batch)
    assert all(torch.equal(again[name], value) for name, value in found.items())
