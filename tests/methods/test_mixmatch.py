"""MixMatch: its guess and loss by hand, and what must not leak into a step."""

import math

import pytest
import torch
import torch.nn.functional as F

from methods.consistency import consistency, early_ramp
from methods.losses.cross_entropy import cross_entropy
from methods.mixmatch import MixMatch, MixMatchConfig, guess_labels
from methods.mixup import mix_up, pool_draws
from tests.methods.contract import BATCH, CLASSES, batch_of, build, double, double_batch


def prediction(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.5, (0.782609, 0.195652, 0.021739)), (1.0, (0.6, 0.3, 0.1)), (1e-4, (1.0, 0.0, 0.0))],
)
def test_the_guess_is_the_sharpened_mean_of_two_predictions(temperature, expected):
    first, second = prediction((0.8, 0.1, 0.1)), prediction((0.4, 0.5, 0.1))
    assert guess_labels(first, second, temperature=temperature)[0].tolist() == pytest.approx(expected, abs=1e-6)


def reference(method, batch, progress):
    """The loss, written out: a mean of squares over rows and classes, both streams in one pool."""
    c = method.config
    with torch.no_grad():
        two = torch.cat([batch["first"], batch["second"]])
        first, second = method.logits(two).softmax(dim=1).chunk(2)
        mean = (first + second) / 2
        guess = mean ** (1 / c.temperature)
        guess = guess / guess.sum(dim=1, keepdim=True)
    known = F.one_hot(batch["label"], CLASSES).to(guess.dtype)
    images = torch.cat([batch["labelled"], batch["first"], batch["second"]])
    images, target = mix_up(images, torch.cat([known, guess, guess]), pool_draws(batch, views=2), alpha=c.alpha)
    probability, rows = method.logits(images).softmax(dim=1), len(known)
    labelled = -(target[:rows] * probability[:rows].log()).sum() / rows
    squares = (target[rows:] - probability[rows:]).square().sum()
    unlabelled = squares / (CLASSES * 2 * len(guess))
    return labelled, unlabelled, labelled + c.unlabelled_weight * min(1.0, progress / c.ramp) * unlabelled


@pytest.mark.parametrize("progress", [0.0, 1 / 128, 0.5])
def test_a_step_is_that_of_an_independent_writing(progress):
    method = double(MixMatch, norm="group")
    batch = double_batch(method)
    found = method(batch, progress)
    labelled, unlabelled, loss = reference(method, batch, progress)
    assert found["labelled_loss"].item() == pytest.approx(labelled.item(), abs=1e-6)
    assert found["unlabelled_loss"].item() == pytest.approx(unlabelled.item(), abs=1e-6)
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-6)


def test_the_unlabelled_loss_is_a_mean_of_squares_and_no_cross_entropy():
    target, logits = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert consistency(target, logits, distance="mse").item() == pytest.approx(0.02, abs=1e-6)
    assert cross_entropy(logits, target).item() == pytest.approx(1.121686, abs=1e-6)
    certain = build(MixMatch)
    for parameter in certain.head.parameters():
        torch.nn.init.zeros_(parameter)  # every prediction is 1/3: guesses too, so unlabelled rows differ by labels
    found = certain(batch_of(certain), 0.5)
    assert found["labelled_loss"].item() == pytest.approx(math.log(3), abs=1e-5)
    assert found["unlabelled_loss"].item() < 2 / 9  # what a certain label costs, of which a mixture has at most half


def test_no_gradient_passes_through_a_guess():
    method = double(MixMatch, norm="group")
    batch = double_batch(method)
    method(batch, 0.5)["loss"].backward()
    reference(method, batch, 0.5)  # whose guesses are made without gradient, too
    found = [parameter.grad.clone() for parameter in method.parameters()]
    method.zero_grad()
    reference(method, batch, 0.5)[2].backward()
    for one, parameter in zip(found, method.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-8, rtol=1e-6)


def test_guessing_leaves_running_statistics_alone_and_the_mixtures_move_them_once():
    method = build(MixMatch)
    norm = method.encoder.blocks["c1"][1]
    batch = batch_of(method)
    seen = []
    norm.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].mean(dim=(0, 2, 3)).detach()))
    method(batch, 0.5)
    assert [len(part) for part in seen] == [len(norm.running_mean)] * 2 and norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[1])
    assert not torch.allclose(seen[0], seen[1])


def test_labelled_and_unlabelled_images_share_one_pass():
    method = build(MixMatch)
    sizes = []
    method.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    method(batch_of(method), 0.5)
    assert sizes == [2 * BATCH, 3 * BATCH]


def test_the_weight_rises_over_a_share_of_training_and_then_stays():
    method = double(MixMatch, norm="group")
    batch = double_batch(method)
    for progress, share in ((0.0, 0.0), (1 / 128, 0.5), (1 / 64, 1.0), (0.9, 1.0)):
        found = method(batch, progress)
        weight = (found["loss"] - found["labelled_loss"]) / found["unlabelled_loss"]
        assert weight.item() == pytest.approx(75 * share, abs=1e-6)


@pytest.mark.parametrize("ramp, steps, over", [
    (1 / 64, 2500, "after 39"), (1 / 64, 6400, None), (1 / 64, 6335, "after 99"), (0.4, 250, None), (0.0, 10, None),
])  # fmt: skip
def test_a_ramp_over_within_a_hundred_steps_is_advised_against(ramp, steps, over):
    told = early_ramp(ramp, steps)
    assert told is None if over is None else over in told
    assert MixMatchConfig(ramp=ramp).advice(steps) == told


def test_two_views_of_an_image_differ():
    batch = batch_of(build(MixMatch))
    assert not torch.equal(batch["first"], batch["second"])


def test_one_labelled_and_one_unlabelled_image_are_enough():
    method = build(MixMatch)
    losses = method(batch_of(method, rows=1), 0.5)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"alpha": -1.0}, "alpha = -1.0: must be > 0"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight = -1.0: must be >= 0"),
        ({"unlabelled_weight": math.inf}, "unlabelled_weight = inf: must be >= 0 and finite"),
        ({"ramp": 2.0}, r"ramp = 2.0: must be in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MixMatchConfig(**changes)
