"""FixMatch's loss by hand, and what no gradient, no statistic and no labelled loss may depend on."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from methods.ema import averaged_copy, update_average
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.fixmatch import FixMatch, FixMatchConfig, FixMatchCTA, FixMatchCTAConfig, fixmatch_losses
from methods.supervised import Supervised, SupervisedConfig
from methods.views.ctaugment import TOTAL, CTAugment, CTAugmentConfig, recognised
from methods.views.draws import Draws
from methods.views.strong import StrongAugment
from orchestrator.training.optim import Optim
from tests.methods.contract import batch_of, build, double, double_batch, pictures

LABELLED = torch.tensor([[2.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
LABEL = torch.tensor([0, 2])
WEAK = torch.tensor([[5.0, 0, 0], [1, 0, 0], [0, 6, 0], [0, 0, 4]], dtype=torch.float64)
STRONG = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 0, 3]], dtype=torch.float64)


def losses_of(labelled=LABELLED, weak=WEAK, strong=STRONG, min_confidence=0.95, unlabelled_weight=1.0):
    return fixmatch_losses(
        labelled, weak, strong, label=LABEL, min_confidence=min_confidence, unlabelled_weight=unlabelled_weight
    )


def test_the_losses_by_hand():
    losses = losses_of()
    assert losses["labelled_loss"].item() == pytest.approx(0.895495, abs=1e-6)
    assert losses["unlabelled_loss"].item() == pytest.approx(0.721478, abs=1e-6)  # of accepted ones alone: 0.961971
    assert losses["loss"].item() == pytest.approx(1.616973, abs=1e-6)
    assert losses["accepted"] == 0.75 and losses["train_accuracy"] == 0.5
    assert losses["confidence"].item() == pytest.approx((0.986703 + 0.576117 + 0.995067 + 0.964663) / 4, abs=1e-6)


def test_the_unlabelled_weight_multiplies_the_unlabelled_loss_alone():
    assert losses_of(unlabelled_weight=3.0)["loss"].item() == pytest.approx(0.895495 + 3 * 0.721478, abs=1e-5)


def test_the_same_losses_come_of_half_precision_logits():
    halves = losses_of(LABELLED.bfloat16(), WEAK.bfloat16(), STRONG.bfloat16())
    assert halves["loss"].dtype == torch.float32
    assert halves["loss"].item() == pytest.approx(1.616973, abs=1e-5)  # these logits are whole in bf16 too


def test_a_confidence_that_equals_the_threshold_is_accepted():
    weak = torch.tensor([[1.0, 1, -1000], [0, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    assert losses_of(weak=weak, min_confidence=0.5)["accepted"] == 0.25


def test_a_threshold_above_one_rejects_all_and_costs_exactly_nothing():
    strong = STRONG.clone().requires_grad_()
    losses = losses_of(strong=strong, min_confidence=1.01)
    losses["loss"].backward()
    assert losses["unlabelled_loss"] == 0 and losses["accepted"] == 0 and losses["largest_class"] == 0
    assert torch.equal(losses["loss"], losses["labelled_loss"]) and not strong.grad.any()


def test_a_threshold_of_zero_accepts_all():
    losses = losses_of(min_confidence=0.0)
    assert losses["accepted"] == 1
    expected = (0.551445 + 1.098612 + 2.239545 + 0.094923) / 4
    assert losses["unlabelled_loss"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("min_confidence", [0.0, 0.95])
def test_no_gradient_reaches_the_weak_logits(min_confidence):
    labelled, weak, strong = (x.clone().requires_grad_() for x in (LABELLED, WEAK, STRONG))
    losses_of(labelled, weak, strong, min_confidence)["loss"].backward()
    assert weak.grad is None and labelled.grad.any() and strong.grad.any()


def test_the_target_is_hard():
    """A sharper weak view with the same winner changes nothing."""
    sharper = WEAK * torch.tensor([2.0, 1, 3, 2])[:, None]
    assert torch.equal(losses_of(weak=sharper)["loss"], losses_of()["loss"])


def test_ties_go_to_the_lowest_class():
    tied = torch.zeros(4, 3, dtype=torch.float64)
    strong = torch.tensor([[5.0, 0, 0]] * 4, dtype=torch.float64)
    sure = losses_of(weak=tied, strong=strong, min_confidence=0.0)["unlabelled_loss"]
    assert sure.item() == pytest.approx(-torch.log_softmax(strong[0], 0)[0].item())


@pytest.mark.parametrize("no_grad", [False, True])
def test_the_weak_views_give_no_gradient_to_the_pixels(no_grad):
    method = build(FixMatch, min_confidence=0.0, weak_no_grad=no_grad, norm="group")
    batch = batch_of(method)
    for name in ("labelled", "weak", "strong"):
        batch[name] = batch[name].requires_grad_()
    method(batch, 0.0)["loss"].backward()
    assert batch["weak"].grad is None or not batch["weak"].grad.any()
    assert batch["labelled"].grad.any() and batch["strong"].grad.any()


class Counting(torch.nn.Module):
    """Notes the size of each pass, and whether it was in training mode."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dim, self.passes = encoder, encoder.dim, []

    def forward(self, images):
        self.passes.append((len(images), self.training, torch.is_grad_enabled()))
        return self.encoder(images)


@pytest.mark.parametrize("no_grad", [False, True])
def test_the_live_network_in_training_mode_sees_the_three_views_in_one_pass(no_grad):
    method = build(FixMatch, weak_no_grad=no_grad)
    method.encoder = Counting(method.encoder)
    batch = batch_of(method, rows=6)
    batch |= {"labelled": batch["labelled"][:2], "label": batch["label"][:2]}
    method(batch, 0.0)
    one_pass = [(2 + 6 + 6, True, True)]
    assert method.encoder.passes == ([(6, True, False), (2 + 6, True, True)] if no_grad else one_pass)


def test_without_batch_norm_weak_views_without_gradient_change_no_loss_and_no_gradient():
    found = []
    for no_grad in (False, True):
        method = build(FixMatch, norm="group", min_confidence=0.0, weak_no_grad=no_grad).double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(method).items()}
        loss = method(batch, 0.0)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in method.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_of_batch_norm_come_of_labelled_and_strong_views_alone_without_gradient_of_weak_ones():
    method = build(FixMatch, weak_no_grad=True)
    batch = batch_of(method)
    other = copy.deepcopy(method)
    method(batch, 0.0)
    other(batch | {"weak": torch.zeros_like(batch["weak"])}, 0.0)
    for (name, one), two in zip(method.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert all(count == 1 for name, count in method.state_dict().items() if name.endswith("num_batches_tracked"))


def test_the_labelled_loss_does_not_change_when_unlabelled_images_are_added():
    """Batch norm aside, which is there to see all."""
    method = build(FixMatch, norm="group").double()
    found = []
    for rows in (4, 1, 9):
        batch = batch_of(method, rows=9)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        batch |= {name: batch[name][:4] for name in ("labelled", "label")}
        batch |= {name: batch[name][:rows] for name in ("weak", "strong")}
        found.append(method(batch, 0.0)["labelled_loss"])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_with_all_rejected_it_is_supervised_training():
    torch.manual_seed(0)
    plain = Supervised(SmallCNN(SmallCNNConfig(width=0.25, norm="group")), SupervisedConfig(), classes=3, images=0)
    method = build(FixMatch, norm="group", min_confidence=1.0)
    plain.load_state_dict(method.state_dict())
    batch = batch_of(method)
    method(batch, 0.0)["loss"].backward()
    plain(batch, 0.0)["loss"].backward()
    for one, two in zip(method.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_labelled_image_and_one_unlabelled_one_are_enough(norm):
    """Three views: batch norm has something to normalise."""
    method = build(FixMatch, norm=norm, min_confidence=0.0)
    losses = method(batch_of(method, rows=1), 0.0)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


def test_one_labelled_image_a_class_is_learned_and_labels_the_others():
    """Three colours, one labelled image each: with its own labels the method learns all."""
    torch.manual_seed(0)
    colours = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220]], dtype=torch.float32)
    noise = torch.randn(30, 3, 16, 16) * 12
    kind = torch.arange(30) % 3
    images = (colours[kind][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    method = build(FixMatch, min_confidence=0.8, strong=StrongAugment(ops=("identity", "rotate", "shear_x")))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    weak, strong = (view.transform for view in method.views(16)[1:])
    for step in range(30):
        draws = Draws.of(0, step, torch.arange(30))
        batch = {
            "labelled": weak(images[:3], draws[:3]), "label": kind[:3],
            "weak": weak(images, draws), "strong": strong(images, Draws.of(0, step, torch.arange(30), 1)),
        }  # fmt: skip
        optimizer.zero_grad()
        losses = method(batch, step / 30)
        losses["loss"].backward()
        optimizer.step()
    assert losses["accepted"] > 0.9 and losses["largest_class"] < 0.4
    assert (method.eval().logits(images / 255).argmax(dim=1) == kind).all()


def test_the_strong_view_has_its_own_crop_and_the_weak_views_are_those_of_the_labelled_images():
    method = build(FixMatch, strong=StrongAugment(count=0, cutout=0.0))
    labelled, weak, strong = method.views(16)
    images, draws = pictures()["unlabelled"], Draws.of(0, 0, torch.arange(4))
    assert torch.equal(labelled.transform(images, draws), weak.transform(images, draws))
    batch = batch_of(method)
    assert not torch.equal(batch["weak"], batch["strong"])
    assert [view.stream for view in (labelled, weak, strong)] == ["labelled", "unlabelled", "unlabelled"]


def test_the_papers_learning_rate_ends_at_a_cosine_of_seven_sixteenths_of_pi():
    optim = Optim(lr=0.03, schedule="fixmatch", warmup=0.0)
    rates = [optim.rate(step, 100) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([0.030000, 0.028246, 0.023190, 0.015423, 0.005853], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_confidence": 2.0}, r"min_confidence = 2.0: must be in \[0, 1\]"),
        ({"min_confidence": -0.1}, "min_confidence = -0.1"),
        ({"unlabelled_weight": 0.0}, "unlabelled_weight = 0.0: must be > 0 and finite; use Supervised"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("config", [FixMatchConfig, FixMatchCTAConfig])
def test_what_cannot_be_meant_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


# with CTAugment


def one_step(method, batch):
    """What a step and its end make of the policy's weights."""
    losses = method(batch, 0.0)
    losses["loss"].backward()
    assert (method.policy.weights == 1).all()  # not before the optimiser's step
    method.on_step_end(0.0)
    return method.policy.weights.clone()


def shifted(network):
    """The network with another opinion."""
    with torch.no_grad():
        network.head[-1].bias += torch.tensor([5.0, 0.0, 0.0])


def test_the_weights_follow_what_the_average_recognises_of_the_labelled_images():
    method = build(FixMatchCTA)
    batch = batch_of(method)
    probes, record = method.policy.probe(batch["labelled"], Draws(batch["labelled.key"]))
    match = recognised(method.average.logits(probes).softmax(dim=1), batch["label"])
    found = one_step(method, batch)
    by_hand = CTAugment(CTAugmentConfig())
    by_hand.update(record, match.detach())
    torch.testing.assert_close(found, by_hand.weights)
    touched = {place for place in record.flatten().tolist() if place < TOTAL}
    assert touched and {place for place in range(TOTAL) if found[place] != 1} == touched


def test_it_is_the_average_that_is_asked_without_a_gradient_and_not_the_live_network():
    usual, other_average, other_live = (build(FixMatchCTA) for _ in range(3))
    batch = batch_of(usual)
    shifted(other_average.average)
    shifted(other_live)
    found = [one_step(method, batch) for method in (usual, other_average, other_live)]
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert all(parameter.grad is None for parameter in usual.average.parameters()) and not usual.average.training


def test_unlabelled_images_and_training_views_do_not_move_the_weights():
    found = []
    for seed in (0, 7):
        method = build(FixMatchCTA)
        other = batch_of(method, seed)
        found.append(one_step(method, batch_of(method) | {name: other[name] for name in ("weak", "strong")}))
    assert torch.equal(*found)


def test_micro_batches_move_the_weights_as_one_batch():
    found = []
    for parts in ([slice(None)], [slice(0, 2), slice(2, 4)]):
        method = build(FixMatchCTA, norm="group")
        batch = batch_of(method)
        for part in parts:
            method({name: value[part] for name, value in batch.items()}, 0.0)
        method.on_step_end(0.0)
        found.append(method.policy.weights.clone())
    torch.testing.assert_close(*found)


def test_a_step_end_without_a_step_changes_nothing():
    method = build(FixMatchCTA)
    method.on_step_end(0.0)
    assert (method.policy.weights == 1).all()


def test_both_forms_have_the_same_loss_of_the_same_views():
    plain, learned = build(FixMatch, min_confidence=0.4), build(FixMatchCTA, min_confidence=0.4)
    batch = batch_of(plain)
    first, second = plain(batch, 0.0), learned(batch, 0.0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert second["bins_kept"] == 1 and 0 < second["probes_recognised"] < 1


class Training:
    """The method with its average and its optimiser, as training has them; double, with group norm."""

    def __init__(self):
        self.method = double(FixMatchCTA, norm="group")
        self.average = averaged_copy(self.method)
        self.method.attach(average=self.average)
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=0.05, momentum=0.9)

    def run(self, steps, rows=slice(None), model=None):
        for step in steps:
            batch = double_batch(self.method, step, pictures(step, 8))
            self.optimizer.zero_grad()
            (model or self.method)({name: value[rows] for name, value in batch.items()}, 0.0)["loss"].backward()
            self.optimizer.step()
            self.method.on_step_end(0.0)
            update_average(self.average, self.method, decay=0.9, step=step)
        return self

    def parts(self):
        return self.method, self.average, self.optimizer


def test_stopped_and_started_again_it_ends_bit_equal():
    whole, first, second = Training().run(range(6)), Training().run(range(3)), Training()
    for part, saved in zip(second.parts(), first.parts(), strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    second.run(range(3, 6))
    assert (whole.method.policy.weights != 1).sum() > 30
    for one, two in zip(whole.parts()[:2], second.parts()[:2], strict=True):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    training = Training()
    training.run(range(4), slice(4 * rank, 4 * rank + 4), DistributedDataParallel(training.method))
    torch.save(training.method.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_end_in_the_same_weights_as_one(tmp_path):
    mp.spawn(worker, (tmp_path,), nprocs=2)
    alone = Training().run(range(4)).method.state_dict()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (alone["policy.weights"] != 1).sum() > 20
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-6)
        assert torch.equal(first[name], second[name]), name
