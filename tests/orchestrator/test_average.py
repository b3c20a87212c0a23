"""The average of the weights in training: updated after the optimiser, and read by Mean Teacher before it."""

import copy

import torch

from methods.ema import averaged_copy, update_average
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from orchestrator.data.loader import Order
from orchestrator.training.loop import Stream, train_steps
from orchestrator.training.optim import Optim


class Noise:
    """Images in memory."""

    pixels = 16

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        self.all = torch.randint(256, (12, 3, 16, 16), generator=rng, dtype=torch.uint8)

    def batch(self, rows):
        return self.all[rows]


def test_the_average_takes_in_the_weights_after_the_optimisers_step_and_targets_are_older():
    torch.manual_seed(0)
    method = MeanTeacher(SmallCNN(SmallCNNConfig(width=0.25)), MeanTeacherConfig(ramp=0.0), classes=3, images=12)
    average = averaged_copy(method)
    method.attach(average=average)
    expected = copy.deepcopy(average)
    optim = Optim(lr=0.1, warmup=0.0)
    streams = (
        Stream("labelled", Noise(0), Order(12, 4, 0), label=torch.arange(12) % 3),
        Stream("unlabelled", Noise(1), Order(12, 8, 1)),
    )
    targets, logits = [], average.logits
    average.logits = lambda images: targets.append(copy.deepcopy(average.state_dict())) or logits(images)
    steps = train_steps(
        method, method, streams, optim.build(method), optim, pixels=16, start=0, total=3, seed=0, precision="float32",
        average=average, ema=0.999,
    )  # fmt: skip
    before = [copy.deepcopy(expected.state_dict())]
    for step in steps:
        update_average(expected, method, decay=0.999, step=step.number)  # the method has made its step
        before.append(copy.deepcopy(expected.state_dict()))
        for name, value in expected.state_dict().items():
            assert torch.equal(average.state_dict()[name], value), name
    assert average.encoder.blocks["c1"][1].num_batches_tracked == 3  # copied; an average would lag behind
    for seen, old in zip(targets, before, strict=False):
        assert all(torch.equal(seen[name], value) for name, value in old.items())
