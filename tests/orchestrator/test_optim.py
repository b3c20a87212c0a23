"""Optimisers and schedules against values by hand."""

import pytest
import torch
from torch import nn

from orchestrator.training.optim import Lars, Optim


def test_lars_scales_a_layers_step_by_its_norms():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    weight.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    Lars([{"params": [weight], "weight_decay": 0.01}], lr=1.0, momentum=0.0).step()
    assert weight.detach().flatten().tolist() == pytest.approx([2.995004, 3.999806], abs=1e-6)


def test_lars_leaves_biases_unscaled_and_without_decay():
    layer = nn.Linear(2, 1)
    optimizer = Optim(name="lars", lr=0.5, weight_decay=0.1).build(layer)
    layer.weight.grad, layer.bias.grad = torch.zeros_like(layer.weight), torch.ones_like(layer.bias)
    before = layer.bias.item()
    optimizer.step()
    assert layer.bias.item() == pytest.approx(before - 0.5)


def test_lars_momentum_follows_its_recurrence():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = Lars([{"params": [weight]}], lr=2.0, momentum=0.9)
    w, v = weight.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for gradient in ([[1.0, 0.0]], [[0.5, -2.0]], [[0.0, 1.0]]):
        g = torch.tensor(gradient, dtype=torch.float64)
        weight.grad = g.clone()
        optimizer.step()
        v = 0.9 * v + 2.0 * 0.001 * w.norm() / g.norm() * g
        w = w - v
    torch.testing.assert_close(weight.detach(), w)


def test_fixmatchs_cosine_ends_at_a_fifth():
    optim = Optim(lr=0.03, schedule="fixmatch", warmup=0.0)
    rates = [optim.rate(step, 100) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([0.03, 0.028246, 0.023190, 0.015423, 0.005853], abs=1e-6)


def test_warm_up_then_cosine_by_hand():
    optim = Optim(lr=4.8, warmup=0.1)
    assert [optim.rate(step, 100) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 2.4, 4.8, 2.4, 0])


def test_step_schedule_of_the_efficientnet_recipe():
    optim = Optim(name="rmsprop", lr=0.128, schedule="step", warmup=0.0, decay=0.97, decay_every=2.4 / 350)
    assert optim.rate(35_000, 35_000) == pytest.approx(0.128 * 0.97**145)  # 145 drops of 2.4 epochs in 350


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "rmsprop"])
def test_every_optimiser_learns_and_decays_only_weights(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = Optim(name=name, lr=1.0 if name == "lars" else 0.01).build(model)
    assert sorted(group["weight_decay"] > 0 for group in optimizer.param_groups) == [False, True]
    x, y = torch.randn(64, 4), torch.arange(64) % 2
    x[:, 0] += 3 * y
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_bad_value_names_the_field_the_value_and_the_range():
    with pytest.raises(ValueError, match=r"lr = -1.0: must be > 0"):
        Optim(lr=-1.0)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 1)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "rmsprop"])
def test_the_encoder_may_learn_slower_than_the_head_and_every_weight_is_in_one_group(name):
    model = _Model()
    optimizer = Optim(name=name, lr=0.5, encoder_lr=0.1).build(model)
    factor = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    assert [factor[id(p)] for p in model.parameters()] == [0.1, 0.1, 1.0, 1.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    assert len(Optim(name=name, lr=0.5).build(model).param_groups) == 2


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "rmsprop"])
def test_weights_may_meet_their_first_gradient_after_others(name):
    model = _Model()
    optimizer = Optim(name=name, lr=0.1).build(model)
    for part in ("encoder", "head", "encoder"):
        before = [p.detach().clone() for p in model.parameters()]
        for p in getattr(model, part).parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert moved == ([True, True, False, False] if part == "encoder" else [False, False, True, True])


def test_sgd_starts_from_momentum_zero():
    torch.manual_seed(0)
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    first = Optim(lr=0.1, weight_decay=0.0).build(ours)
    second = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        for model, optimizer in ((ours, first), (plain, second)):
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, plain.weight)


def test_an_encoder_that_would_learn_backwards_is_refused():
    with pytest.raises(ValueError, match="encoder_lr = -1"):
        Optim(lr=0.1, encoder_lr=-1)
