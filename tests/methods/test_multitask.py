"""Several puzzles, one encoder: heads that idle stand still, and the sum is the sum."""

import copy

import pytest
import torch

from methods.colorization import ColorizationConfig
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.inpainting import InpaintingConfig
from methods.jigsaw import JigsawConfig
from methods.multitask import MultiTask, MultiTaskConfig
from methods.relative_patch import RelativePatchConfig
from methods.rotation import Rotation, RotationConfig
from methods.views.draws import Draws

EVERY = {
    "rotation": RotationConfig(), "relative_patch": RelativePatchConfig(), "jigsaw": JigsawConfig(),
    "colorization": ColorizationConfig(), "inpainting": InpaintingConfig(),
}  # fmt: skip


def build(names=("rotation", "colorization"), **options):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25))
    config = MultiTaskConfig(**{name: EVERY[name] if name in names else None for name in EVERY}, **options)
    return MultiTask(encoder, config, classes=0, images=8)


def batch(rows=4, seed=0):
    images = torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "unlabelled.key": Draws.of(seed, 0, torch.arange(rows)).key}


def train(method, steps):
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for number in range(steps):
        losses = method(batch(seed=number), 0.0)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.on_step_end(0.0)
    return losses


def test_a_step_of_one_task_leaves_the_other_heads_bit_identical_with_momentum_and_decay():
    method = build()
    train(method, 2)  # both heads have momentum now
    before = copy.deepcopy(method.heads["colorization"].state_dict())
    train(method, 1)  # rotation's turn
    after = method.heads["colorization"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tasks_take_turns_in_equal_shares():
    method = build(("rotation", "jigsaw", "inpainting"))
    turns = []
    for _ in range(6):
        losses = method(batch(), 0.0)
        turns += [name.removesuffix("_loss") for name in losses if name.endswith("_loss")]
        method.on_step_end(0.0)
    assert turns == ["rotation", "jigsaw", "inpainting"] * 2


def test_together_the_encoders_gradient_is_the_sum_of_the_tasks_own():
    names = ("rotation", "inpainting", "colorization")
    method = build(names, schedule="together").eval().double()
    data = batch()
    data["image"] = data["image"].double()
    method(data, 0.0)["loss"].backward()
    total = {name: p.grad.clone() for name, p in method.encoder.named_parameters()}
    summed = {name: torch.zeros_like(p) for name, p in method.encoder.named_parameters()}
    for name in names:
        method.zero_grad(set_to_none=True)
        loss = method.heads[name](method.encoder, data["image"], Draws(data["unlabelled.key"]))["loss"]
        (method.weight(name) * loss).backward()
        for key, p in method.encoder.named_parameters():
            summed[key] += 0 if p.grad is None else p.grad
    for name in total:
        torch.testing.assert_close(total[name], summed[name], atol=1e-6, rtol=1e-6)


def test_without_weight_on_the_others_a_task_learns_what_it_learns_alone():
    method = build(schedule="together", weights={"rotation": 1.0, "colorization": 0.0}).eval()
    torch.manual_seed(0)
    alone = Rotation(SmallCNN(SmallCNNConfig(width=0.25)), RotationConfig(), classes=0, images=8).eval()
    alone.load_state_dict({
        **{k: v for k, v in method.state_dict().items() if k.startswith("encoder.")},
        **{k.replace("heads.rotation", "task"): v for k, v in method.state_dict().items() if "heads.rotation" in k},
    })  # fmt: skip
    for model in (method, alone):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for number in range(3):
            model(batch(seed=number), 0.0)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in alone.encoder.state_dict().items():
        torch.testing.assert_close(method.encoder.state_dict()[name], value)


def test_each_task_starts_near_a_weighted_loss_of_one():
    method = build(("rotation", "relative_patch", "jigsaw", "colorization"), schedule="together")
    losses = method(batch(8), 0.0)
    for name in ("rotation", "relative_patch", "jigsaw", "colorization"):
        assert method.weight(name) * losses[f"{name}_loss"].item() == pytest.approx(1, abs=0.6), name


def test_grey_inputs_are_the_same_for_colours_that_differ_only_in_hue():
    method = build(("rotation", "jigsaw"), schedule="together", grey=True).eval()
    data = batch()
    luma = (data["image"] * torch.tensor((0.299, 0.587, 0.114))[:, None, None]).sum(dim=1, keepdim=True)
    other = {**data, "image": luma.expand(-1, 3, -1, -1)}
    torch.testing.assert_close(method(data, 0.0)["loss"], method(other, 0.0)["loss"], atol=1e-5, rtol=1e-5)


def test_the_state_holds_every_head_and_whose_turn_it_is():
    method = build(tuple(EVERY))
    names = {key.split(".")[1] for key in method.state_dict() if key.startswith("heads.")}
    assert names == set(EVERY)
    train(method, 3)
    other = build(tuple(EVERY))
    other.load_state_dict(method.state_dict())
    assert int(other.step) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"relative_patch": None}, "name at least two"),
        ({"relative_patch": None, "colorization": None}, "tasks = none"),
        ({"weights": {"colorization": -1.0}}, "must be >= 0"),
        ({"weights": {"color": 1.0}}, "must be >= 0, of one of"),
    ],
)
def test_fewer_than_two_tasks_or_a_weight_for_none_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        MultiTaskConfig(**options)
