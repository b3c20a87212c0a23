"""The consistency functions against hand-computed values, and what no gradient may pass."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methods.consistency import (
    acceptance,
    confident,
    consistency,
    exponential_ramp,
    linear_ramp,
    norm_statistics_kept,
    prediction,
    sharpen,
    together,
    two_streams,
)

Q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
P = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)


def test_sharpening_by_hand():
    found = sharpen(torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64), 0.5)
    assert found[0].tolist() == pytest.approx([0.782609, 0.195652, 0.021739], abs=1e-6)


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6), st.floats(0.001, 10))
def test_sharpening_keeps_a_distribution_and_its_order(weights, temperature):
    probability = torch.tensor([weights], dtype=torch.float64)
    probability /= probability.sum()
    sharp = sharpen(probability, temperature)
    assert sharp.sum().item() == pytest.approx(1.0)
    assert sharp[0].argmax() == probability[0].argmax() or sharp[0].max() == sharp[0][probability[0].argmax()]
    torch.testing.assert_close(sharpen(probability, 1.0), probability)


def test_sharpening_a_certain_row_at_a_tiny_temperature_stays_finite():
    found = sharpen(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.3, 0.3]]), 0.005)
    assert found.isfinite().all() and found[0].tolist() == [1.0, 0.0, 0.0] and found[1].argmax() == 0


def test_squared_error_is_a_mean_over_classes():
    assert consistency(Q, P.log(), distance="mse").item() == pytest.approx(0.02, abs=1e-9)


def test_kl_divergence_of_two_logits_by_hand():
    weak, strong = torch.tensor([[2.0, 1, 0]], dtype=torch.float64), torch.tensor([[1.0, 1, 0]], dtype=torch.float64)
    found = consistency(weak.softmax(1), strong, distance="kl").item()
    assert found == pytest.approx(0.119630, abs=1e-6)


def test_masked_rows_still_divide():
    logits = torch.zeros(4, 2)
    found = consistency(torch.zeros(4, dtype=torch.int64), logits, distance="cross_entropy",
                        mask=torch.tensor([1.0, 0, 0, 0]))  # fmt: skip
    assert found.item() == pytest.approx(math.log(2) / 4)


@pytest.mark.parametrize("distance", ["mse", "kl", "cross_entropy"])
def test_an_all_rejected_batch_has_loss_zero_and_gradient_zero(distance):
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2]) if distance == "cross_entropy" else torch.rand(3, 4).softmax(1)
    loss = consistency(target, logits, distance=distance, mask=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_no_gradient_reaches_the_target(distance):
    target = torch.randn(3, 4, requires_grad=True)
    logits = torch.randn(3, 4, requires_grad=True)
    consistency(target.softmax(1), logits, distance=distance).backward()
    assert target.grad is None and logits.grad.any()


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_agreement_costs_nothing(distance):
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss = consistency(logits.softmax(1), logits, distance=distance)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12) and logits.grad.abs().max() < 1e-12


def test_the_threshold_itself_is_confident():
    assert confident(torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.25, 0.75]]), 0.5).tolist() == [1, 1, 1]
    assert confident(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), 0.75).tolist() == [0, 1]


def test_ramps_by_hand():
    assert [exponential_ramp(t / 4, 1.0) for t in range(5)] == pytest.approx(
        [0.006738, 0.060055, 0.286505, 0.731616, 1.0], abs=1e-6
    )
    assert [linear_ramp(t / 10, 0.4) for t in (0, 2, 4, 9)] == pytest.approx([0, 0.5, 1, 1])
    assert linear_ramp(0.0, 0.0) == 1.0


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])  # the latter where several GPUs train together
def test_kept_norm_statistics_are_bit_equal_and_others_move(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with norm_statistics_kept(model):
        inside = model(torch.arange(12.0).view(4, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    outside = model(torch.arange(12.0).view(4, 3))
    assert torch.equal(inside, outside)
    assert not torch.equal(before["1.running_mean"], model[1].running_mean) and model[1].num_batches_tracked == 1


def test_together_is_one_pass_whose_parts_come_back_in_order():
    sizes = []

    def network(images):
        sizes.append(len(images))
        return images * 2

    first, second = together(network, torch.ones(2, 1), torch.full((3, 1), 5.0))
    assert sizes == [5] and first.flatten().tolist() == [2, 2] and second.flatten().tolist() == [10, 10, 10]


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3), 4 + torch.randn(7, 3)


def test_of_two_streams_the_labelled_ones_statistics_are_kept_and_each_is_normalised_by_its_own():
    model, labelled, unlabelled = normed()
    other = copy.deepcopy(model)
    found = two_streams(model, labelled, unlabelled, model=model, norm_from="labelled")
    assert torch.equal(found[0], other(labelled))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    torch.testing.assert_close(found[1].mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)


def test_or_both_streams_are_normalised_and_kept_together():
    model, labelled, unlabelled = normed()
    other = copy.deepcopy(model)
    found = two_streams(model, labelled, unlabelled, model=model, norm_from="all")
    assert [len(part) for part in found] == [5, 7] and torch.equal(
        torch.cat(found), other(torch.cat([labelled, unlabelled]))
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_prediction_is_a_float32_distribution_without_gradient():
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    assert prediction(logits)[0].tolist() == pytest.approx([0.5, 0.25, 0.25]) and not prediction(logits).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert prediction(logits.bfloat16()).dtype == torch.float32


def test_acceptance_by_hand_and_of_nothing():
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    found = acceptance(probability, torch.tensor([1.0, 1, 1, 0]))
    assert found["accepted"] == 0.75 and found["largest_class"].item() == pytest.approx(2 / 3)
    assert found["confidence"].item() == pytest.approx(0.725)
    assert acceptance(probability, torch.zeros(4))["largest_class"] == 0
