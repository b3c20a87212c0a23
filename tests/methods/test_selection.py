"""Filter and balance: Noisy Student's rule over the whole set."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.selection import REASONS, even_limit, select
from methods.views.draws import Draws


def draws(n, seed=0):
    return Draws.of(seed, 0, torch.arange(n))


A, B = (0.9, 0.8, 0.7, 0.4, 0.35, 0.2), (0.6, 0.31)


def test_more_than_the_limit_keeps_the_most_confident_once():
    p = torch.stack([torch.tensor(A), torch.full((6,), 0.1)], dim=1)
    chosen = select(*p.max(dim=1), min_confidence=0.3, per_class=3, balance="limit", draws=draws(6))
    assert chosen.copies.tolist() == [1, 1, 1, 0, 0, 0]
    assert [REASONS[r] for r in chosen.reason.tolist()] == ["kept"] * 3 + ["over class limit"] * 2 + [
        "below confidence"
    ]


def test_fewer_than_the_limit_are_repeated_one_and_a_half_times_on_average():
    p = torch.stack([torch.full((2,), 0.1), torch.tensor(B)], dim=1)
    totals = [
        select(*p.max(dim=1), min_confidence=0.3, per_class=3, balance="replicate", draws=draws(2, seed)).copies
        for seed in range(400)
    ]
    copies = torch.stack(totals).double()
    assert set(copies.unique().tolist()) == {1.0, 2.0}
    assert (copies.mean(dim=0) - 1.5).abs().max() < 4 * 0.5 / 400**0.5


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), limit=st.integers(1, 20))
def test_two_shards_give_the_same_selection_as_one(seed, n, limit):
    p = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
    whole = select(*p.max(dim=1), min_confidence=0.3, per_class=limit, balance="replicate", draws=draws(n))
    order = torch.arange(n).flip(0)
    turned = p[order].max(dim=1)
    again = select(*turned, min_confidence=0.3, per_class=limit, balance="replicate", draws=draws(n)[order])
    kept = p.max(dim=1).values >= 0.3
    assert torch.equal((whole.copies > 0).sum(), (again.copies > 0).sum())
    assert not (whole.copies > 0)[~kept].any()
    if len(p.max(dim=1).values.unique()) == n:  # without ties the same images, not only as many
        assert torch.equal(whole.copies, again.copies[order])


@given(seed=st.integers(0, 1000), low=st.floats(0.2, 0.6), more=st.floats(0, 0.4))
def test_a_higher_threshold_never_keeps_more(seed, low, more):
    p = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
    kept = [
        (select(*p.max(dim=1), min_confidence=c, per_class=None, balance="none", draws=draws(50)).copies > 0)
        for c in (low, low + more)
    ]
    assert not (kept[1] & ~kept[0]).any()


def test_nothing_confident_keeps_nothing():
    p = torch.full((5, 4), 0.25)
    chosen = select(*p.max(dim=1), min_confidence=0.9, per_class=None, balance="replicate", draws=draws(5))
    assert chosen.copies.sum() == 0


def test_the_limit_that_evens_classes_by_hand():
    assert even_limit(torch.tensor([980, 5, 5, 5, 5]), 0.8) == 80
    assert even_limit(torch.tensor([3, 0, 4]), 0.6) == 4  # none holds more anyway
    assert even_limit(torch.tensor([0, 7]), 0.8) == 7  # one class alone stays alone
    assert even_limit(torch.tensor([9, 9]), 0.3) == 9 and even_limit(torch.tensor([9, 4]), 0.3) == 4


@given(count=st.lists(st.integers(0, 300), min_size=2, max_size=6), share=st.floats(0.5, 1.0))
def test_a_limit_that_evens_classes_is_the_largest_that_does(count, share):
    count = torch.tensor(count)
    if int((count > 0).sum()) < 2:
        return
    limit = even_limit(count, share)
    assert count.clamp(max=limit).max() <= share * count.clamp(max=limit).sum()
    if limit < count.max():
        assert limit + 1 > share * count.clamp(max=limit + 1).sum()
