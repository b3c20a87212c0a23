"""The order of images: a pure function of seed and step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.loader import Order


@given(rows=st.integers(1, 60), batch=st.integers(1, 24), seed=st.integers(0, 2**31), epochs=st.integers(1, 3))
def test_an_epoch_shows_each_image_at_most_once_and_all_where_they_fit(rows, batch, seed, epochs):
    order = Order(rows, batch, seed)
    steps = -(-order.images_per_epoch * epochs // batch)
    seen = [order.at(step) for step in range(steps)]
    places, numbers = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for epoch in range(epochs - 1 if rows < batch else epochs):
        inside = places[numbers == epoch]
        assert (
            len(inside.unique()) == len(inside) == order.images_per_epoch and 0 <= inside.min() <= inside.max() < rows
        )


@given(rows=st.integers(8, 60), seed=st.integers(0, 2**31), step=st.integers(0, 50))
def test_workers_together_read_the_one_batch_and_it_holds_no_image_twice(rows, seed, step):
    order = Order(rows, 8, seed)
    whole = order.at(step)[0]
    parts = torch.cat([order.at(step, part=part, parts=4)[0] for part in range(4)])
    assert torch.equal(whole, parts) and len(whole.unique()) == 8


def test_epochs_and_seeds_differ_and_a_repeat_does_not():
    first = Order(1000, 100, 0)
    assert not torch.equal(first.at(0)[0], first.at(10)[0])
    assert not torch.equal(first.at(0)[0], Order(1000, 100, 1).at(0)[0])
    assert torch.equal(first.at(7)[0], Order(1000, 100, 0).at(7)[0])


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="batch 9 cannot be split evenly over 2 workers"):
        Order(20, 9, 0).at(0, parts=2)
