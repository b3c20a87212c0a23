"""What every method owes: found in `methods`, checked one by one, nothing to register."""

import copy

import pytest
import torch

from methods.views.draws import Draws
from tests.methods.contract import METHODS, PIXELS, batch_of, build, steps


def step(method, seed=1):
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    optimizer.zero_grad()
    torch.manual_seed(seed)
    losses = method(batch_of(method, seed), 0.5)
    losses["loss"].backward()
    optimizer.step()
    method.on_step_end(0.5)
    return losses["loss"].detach()


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
class TestContract:
    def test_the_loss_is_a_finite_float32_number(self, cls):
        method = build(cls)
        losses = method(batch_of(method), 0.0)
        assert losses["loss"].isfinite() and losses["loss"].dtype == torch.float32 and losses["loss"].ndim == 0

    def test_every_trained_weight_gets_a_finite_gradient(self, cls):
        method = build(cls)
        for number in range(steps(cls)):  # some weights have their turn in a later step
            method(batch_of(method, number), 0.0)["loss"].backward()
            method.on_step_end(0.0)
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_views_are_named_once_and_give_the_asked_size_in_range(self, cls):
        method = build(cls)
        views = method.views(PIXELS)
        assert len({view.name for view in views}) == len(views)
        images = torch.randint(256, (3, 3, 20, 24), dtype=torch.uint8)
        for view in views:
            out = view.transform(images, Draws.of(0, 0, torch.arange(3)))
            assert out.shape == (3, 3, PIXELS, PIXELS) and out.dtype == torch.float32
            assert 0 <= out.min() and out.max() <= 1

    def test_a_state_round_trip_gives_an_equal_next_step(self, cls):
        method = build(cls)
        step(method)
        other = build(cls)
        other.load_state_dict(copy.deepcopy(method.state_dict()))
        assert torch.equal(step(method, 2), step(other, 2))
        for (name, a), b in zip(method.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name

    def test_bf16_autocast_leaves_the_loss_float32_and_near(self, cls):
        method = build(cls)
        batch = batch_of(method)
        torch.manual_seed(3)
        exact = method(batch, 0.0)["loss"]
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            rough = method(batch, 0.0)["loss"]
        assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.05, abs=0.05)

    def test_features_are_those_of_the_encoder_and_eval_changes_nothing(self, cls):
        method = build(cls).eval()
        before = copy.deepcopy(method.state_dict())
        images = torch.rand(2, 3, PIXELS, PIXELS)
        assert method.features(images).shape == (2, method.encoder.dim)
        assert torch.equal(method.features(images), method.features(images))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))
