"""UDA: its target, mask and annealed labels by hand, and what must not leak into a step."""

import math

import pytest
import torch
import torch.nn.functional as F

from methods.losses.cross_entropy import cross_entropy
from methods.uda import UDA, UDAConfig, annealed_cross_entropy, consistency_loss, signal_threshold
from tests.methods.contract import BATCH, batch_of, build, double, double_batch, pictures

WEAK = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
STRONG = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("annealing", "expected"),
    [
        ("linear", (0.1, 0.55, 1.0)), ("exp", (0.106064, 0.173876, 1.0)), ("log", (0.1, 0.926124, 0.993936)),
        ("none", (1.0, 1.0, 1.0)),
    ],
)  # fmt: skip
def test_the_threshold_of_the_training_signal_at_start_middle_and_end(annealing, expected):
    assert [signal_threshold(annealing, t, 10) for t in (0.0, 0.5, 1.0)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(0.4, 0.563673), (1.0, 0.119630)])
def test_the_divergence_from_a_sharpened_target_by_hand(temperature, expected):
    loss, _ = consistency_loss(WEAK, STRONG, temperature=temperature, min_confidence=0.0)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_prediction_minus_sharpened_target_and_none_reaches_the_weak_view():
    weak, strong = WEAK.clone().requires_grad_(), STRONG.clone().requires_grad_()
    consistency_loss(weak, strong, temperature=0.4, min_confidence=0.5)[0].backward()
    assert weak.grad is None
    target = STRONG.softmax(dim=1) - strong.grad
    assert target[0].tolist() == pytest.approx([0.918423, 0.075389, 0.006188], abs=1e-6)


@pytest.mark.parametrize(("min_confidence", "learned"), [(0.6652, True), (0.6653, False), (0.9, False)])
def test_the_mask_reads_the_prediction_before_it_is_sharpened(min_confidence, learned):
    loss, logged = consistency_loss(WEAK, STRONG, temperature=0.4, min_confidence=min_confidence)
    assert loss.item() == pytest.approx(0.563673 if learned else 0.0, abs=1e-6)
    assert logged["accepted"] == float(learned) and logged["confidence"].item() == pytest.approx(0.665241, abs=1e-6)


def test_rows_below_the_threshold_still_divide():
    weak = torch.cat([WEAK, torch.zeros(3, 3, dtype=torch.float64)])
    loss, _ = consistency_loss(weak, STRONG.expand(4, -1), temperature=0.4, min_confidence=0.6)
    assert loss.item() == pytest.approx(0.563673 / 4, abs=1e-6)


def logits_with(*probabilities):
    """Logits of two classes that give class 0 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_what_is_known_too_well_is_dropped_and_the_rest_is_averaged():
    logits, label = logits_with(0.9, 0.5, 0.2), torch.zeros(3, dtype=torch.int64)
    loss, learned = annealed_cross_entropy(logits, label, threshold=0.6)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)  # not the confident 0.9, and not over 3
    assert learned.item() == pytest.approx(2 / 3)


def test_a_batch_that_is_all_known_costs_nothing_and_moves_nothing():
    logits = logits_with(0.9, 0.8).requires_grad_()
    loss, learned = annealed_cross_entropy(logits, torch.zeros(2, dtype=torch.int64), threshold=0.6)
    loss.backward()
    assert loss.item() == 0 and learned.item() == 0 and not logits.grad.any()


def test_without_annealing_every_label_counts_however_well_known():
    logits, label = torch.tensor([[80.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])  # the first is 1 in float32
    loss, learned = annealed_cross_entropy(logits, label, threshold=signal_threshold("none", 0.9, 2))
    assert torch.equal(loss, cross_entropy(logits, label)) and learned == 1
    assert annealed_cross_entropy(logits, label, threshold=0.999)[1] == 0.5


def test_a_step_is_that_of_an_independent_writing():
    method = double(UDA, norm="group")
    method.config = UDAConfig(temperature=0.4, min_confidence=0.34, unlabelled_weight=2.0, annealing="linear")
    batch = double_batch(method)
    found = method(batch, 0.5)
    with torch.no_grad():
        p = method.logits(batch["labelled"]).softmax(dim=1)[torch.arange(BATCH), batch["label"]]
        kept = p <= 0.5 * (1 - 1 / 3) + 1 / 3
        labelled = -p[kept].log().mean()
        weak, strong = method.logits(batch["weak"]), method.logits(batch["strong"]).log_softmax(dim=1)
        target, mask = (weak / 0.4).softmax(dim=1), weak.softmax(dim=1).amax(dim=1) >= 0.34
        unlabelled = ((target * (target.log() - strong)).sum(dim=1) * mask).sum() / BATCH
    assert 0 < mask.sum() and kept.any()
    assert found["labelled_loss"].item() == pytest.approx(labelled.item(), abs=1e-6)
    assert found["unlabelled_loss"].item() == pytest.approx(unlabelled.item(), abs=1e-6)
    assert found["loss"].item() == pytest.approx((labelled + 2 * unlabelled).item(), abs=1e-6)
    assert found["accepted"].item() == pytest.approx(mask.double().mean().item())


def test_nothing_confident_leaves_the_supervised_loss_and_its_gradient():
    method = double(UDA, norm="group")
    method.config = UDAConfig(min_confidence=1.0)
    batch = double_batch(method)
    found = method(batch, 0.5)
    found["loss"].backward()
    got = [parameter.grad.clone() for parameter in method.parameters()]
    method.zero_grad()
    expected = F.cross_entropy(method.logits(batch["labelled"]), batch["label"])
    expected.backward()
    assert found["unlabelled_loss"] == 0 and found["loss"].item() == pytest.approx(expected.item(), abs=1e-9)
    for one, parameter in zip(got, method.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-9, rtol=1e-6)


def test_unlabelled_images_do_not_change_the_labelled_loss():
    method = double(UDA, norm="group")
    few, many = double_batch(method), double_batch(method, images={**pictures(), "unlabelled": pictures(5)["labelled"]})
    assert not torch.equal(few["weak"], many["weak"])
    assert method(few, 0.5)["labelled_loss"].item() == pytest.approx(method(many, 0.5)["labelled_loss"].item())


def test_the_three_views_share_one_pass():
    method = build(UDA)
    sizes = []
    method.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    method(batch_of(method), 0.5)
    assert sizes == [3 * BATCH]


@pytest.mark.parametrize("annealing", ["linear", "exp", "log"])
@pytest.mark.parametrize("progress", [0.0, 0.5, 0.999])
def test_one_labelled_and_one_unlabelled_image_are_enough(annealing, progress):
    method = build(UDA, annealing=annealing, temperature=0.4, min_confidence=0.0)
    losses = method(batch_of(method, rows=1), progress)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"min_confidence": 2}, r"min_confidence = 2: must be in \[0, 1\]"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight = -1.0: must be >= 0"),
        ({"unlabelled_weight": math.inf}, "unlabelled_weight = inf: must be >= 0 and finite"),
        ({"annealing": "cosine"}, "annealing = cosine: must be one of none, linear, exp, log"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UDAConfig(**changes)
