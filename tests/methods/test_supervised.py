"""Supervised training on labels, and on a teacher's distributions."""

import pytest
import torch

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.supervised import Supervised, SupervisedConfig


def build(**options):
    torch.manual_seed(0)
    return Supervised(SmallCNN(SmallCNNConfig(width=0.25)), SupervisedConfig(**options), classes=3, images=0).eval()


def batch(label, target=None):
    images = torch.rand(len(label), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"labelled": images, "label": label, **({} if target is None else {"target": target})}


def test_a_certain_teacher_is_a_label():
    label = torch.tensor([0, 2, 1])
    hard = build()(batch(label), 0.0)["loss"]
    soft = build(soft=True)(batch(label, torch.eye(3)[label]), 0.0)["loss"]
    assert soft.item() == pytest.approx(hard.item(), abs=1e-6)


def test_a_soft_loss_is_the_cross_entropy_with_the_whole_distribution():
    target = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    model = build(soft=True)
    found = batch(target.argmax(dim=1), target)
    expected = -(target * model.logits(found["labelled"]).log_softmax(dim=1)).sum(dim=1).mean()
    assert model(found, 0.0)["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_soft_label_is_not_smoothed_again():
    with pytest.raises(ValueError, match="label_smoothing = 0.1: must be 0 with soft"):
        SupervisedConfig(soft=True, label_smoothing=0.1)
