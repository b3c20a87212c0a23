"""What every method owes: found in `methods`, checked one by one, nothing to register."""

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch

import methods
from methods.base import Method
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.views.draws import Draws

CLASSES, PIXELS, BATCH = 3, 16, 4


def every_method():
    for info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"methods.{info.name}")
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Method)
                and not inspect.isabstract(cls)
                and cls.__module__ == module.__name__
            ):
                yield cls


METHODS = list(every_method())


def build(cls, norm="batch"):
    torch.manual_seed(0)
    return cls(SmallCNN(SmallCNNConfig(width=0.25, norm=norm)), cls.Config(), classes=CLASSES, images=BATCH)


def batch_of(method, seed=0, rows=BATCH):
    rng = torch.Generator().manual_seed(seed)
    images = {
        s: torch.randint(256, (rows, 3, PIXELS, PIXELS), generator=rng, dtype=torch.uint8)
        for s in ("labelled", "unlabelled")
    }
    index = torch.arange(rows)
    batch = {f"{name}.index": index for name in images}
    batch |= {f"{name}.key": Draws.of(seed, 0, index, -1).key for name in images}
    for number, view in enumerate(method.views(PIXELS)):
        batch[view.name] = view.transform(images[view.stream], Draws.of(seed, 0, index, number))
    batch["label"] = torch.arange(rows) % CLASSES
    batch["target"] = torch.randn(rows, CLASSES, generator=rng).softmax(dim=1)
    return batch


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
        for number in range(4 if cls.skips_weights else 1):  # some weights have their turn in a later step
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
