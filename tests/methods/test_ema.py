"""The moving average: its decay, its rule for buffers, and that it meets the live weights."""

import pytest
import torch
from torch import nn

from methods.ema import averaged_copy, effective_decay, update_average


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (1, 0.181818), (10, 0.55), (100, 0.918182), (1000, 0.991089), (100_000, 0.9999)]
)
def test_early_steps_use_a_smaller_decay(step, expected):
    assert effective_decay(0.9999, step) == pytest.approx(expected, abs=1e-6)


def test_weights_and_running_statistics_are_averaged_and_counters_copied():
    model = nn.BatchNorm1d(2)
    average = averaged_copy(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(10.0)
        model.num_batches_tracked.fill_(7)
    update_average(average, model, decay=0.5, step=1_000_000)
    assert average.weight.tolist() == [2.0, 2.0] and average.running_mean.tolist() == [5.0, 5.0]
    assert average.num_batches_tracked.item() == 7


def test_no_gradient_reaches_the_average_and_no_update_reaches_the_model():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = averaged_copy(model)
    update_average(average, model, decay=0.9, step=5)
    assert not any(p.requires_grad for p in average.parameters()) and torch.equal(model.weight, before)


def test_the_average_meets_weights_that_stand_still():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = averaged_copy(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    for step in range(2000):
        update_average(average, model, decay=0.99, step=step)
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-4)
