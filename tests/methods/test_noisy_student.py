"""The noised student's loss, by hand."""

import math

import pytest
import torch

from methods.losses.cross_entropy import cross_entropy
from methods.noisy_student import NoisyStudentConfig, joint_loss


def logits_with_loss(nats, rows):
    """Two-class logits whose cross-entropy with class 0 is `nats`."""
    p = math.exp(-nats)
    return torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64).repeat(rows, 1)


@pytest.mark.parametrize("soft", [True, False])
def test_the_joint_loss_is_the_mean_over_the_concatenated_batch(soft):
    target = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    losses = joint_loss(
        logits_with_loss(0.9, 2),
        logits_with_loss(0.5, 6),
        label=torch.zeros(2, dtype=torch.long),
        target=target,
        soft=soft,
        smoothing=0.0,
    )
    assert losses["loss"].item() == pytest.approx(0.6)
    assert losses["labelled_loss"].item() == pytest.approx(0.9) and losses["unlabelled_loss"].item() == pytest.approx(
        0.5
    )


def test_hard_targets_are_the_most_probable_classes_however_they_are_given():
    rng = torch.Generator().manual_seed(0)
    labelled, unlabelled, target = (torch.randn(n, 3, generator=rng) for n in (2, 5, 5))
    given = dict(label=torch.tensor([0, 2]), soft=False, smoothing=0.1)
    one = joint_loss(labelled, unlabelled, target=target.softmax(dim=1), **given)
    other = joint_loss(labelled, unlabelled, target=target.argmax(dim=1), **given)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_labelled_part_does_not_change_when_unlabelled_images_are_added():
    torch.manual_seed(0)
    labelled, label = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    parts = [
        joint_loss(
            labelled, torch.randn(n, 3), label=label, target=torch.randn(n, 3).softmax(1), soft=True, smoothing=0.1
        )["labelled_loss"]
        for n in (1, 8, 40)
    ]
    assert torch.equal(parts[0], parts[1]) and torch.equal(parts[1], parts[2])


def test_soft_labels_are_not_smoothed_again():
    logits, target = torch.randn(5, 3), torch.randn(5, 3).softmax(dim=1)
    losses = joint_loss(
        logits[:1], logits, label=torch.zeros(1, dtype=torch.long), target=target, soft=True, smoothing=0.3
    )
    torch.testing.assert_close(losses["unlabelled_loss"], -(target * logits.log_softmax(dim=1)).sum(dim=1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_logits_cost_log_k_for_every_target(smoothing):
    target = torch.tensor([[0.2, 0.3, 0.5]])
    assert cross_entropy(torch.zeros(1, 3), target, smoothing=smoothing).item() == pytest.approx(math.log(3))
    assert cross_entropy(torch.zeros(1, 3), torch.tensor([2]), smoothing=smoothing).item() == pytest.approx(math.log(3))


def test_a_zero_weight_on_unlabelled_images_is_refused_with_advice():
    with pytest.raises(ValueError, match="unlabelled_weight = 0.0: must be > 0 and finite; use Supervised"):
        NoisyStudentConfig(unlabelled_weight=0.0)
