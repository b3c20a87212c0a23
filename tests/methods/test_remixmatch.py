"""ReMixMatch: alignment, rotation and loss by hand, what it remembers, and that two workers remember the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from methods.consistency import sharpen
from methods.mixup import mix_up, pool_draws
from methods.remixmatch import HISTORY, PROBE, TURN, Alignment, ReMixMatch, ReMixMatchConfig, align, quarter_turns
from methods.views.ctaugment import CTAugment, CTAugmentConfig
from methods.views.draws import Draws
from methods.views.tiles import turn
from tests.methods.contract import BATCH, CLASSES, batch_of, build, double, double_batch, pictures

UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
GUESS = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
OFTEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_alignment_and_sharpening_by_hand():
    aligned = align(GUESS, marginal=UNIFORM, predicted=OFTEN)
    assert aligned[0].tolist() == pytest.approx([0.444444, 0.370370, 0.185185], abs=1e-6)
    assert sharpen(aligned, 0.5)[0].tolist() == pytest.approx([0.535316, 0.371747, 0.092937], abs=2e-6)


@given(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3))
def test_equal_frequencies_change_nothing(weights):
    frequency = torch.tensor(weights, dtype=torch.float64)
    frequency /= frequency.sum()
    torch.testing.assert_close(align(GUESS, marginal=frequency, predicted=frequency), GUESS)


def test_a_class_that_is_never_predicted_divides_nothing_by_zero():
    found = align(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), marginal=torch.tensor([1.0, 0]), predicted=torch.zeros(2))
    assert found.isfinite().all() and found.sum(dim=1).tolist() == [1, 1]


def test_a_wrong_marginal_moves_guesses_that_were_right_and_the_known_one_leaves_them():
    """Eight of ten images are of the first class and so are the guesses; the labels are of all classes alike."""
    truth = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    unsure = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64)
    assert align(unsure, marginal=UNIFORM, predicted=truth).argmax() == 1
    assert align(unsure, marginal=truth, predicted=truth).argmax() == 0


def certain(rows, cls=0):
    return torch.full((rows, 3), -60.0).index_fill_(1, torch.tensor([cls]), 60.0)


def test_a_step_is_aligned_by_the_batches_before_it_and_then_counted_once():
    alignment = Alignment(3, None)
    first = alignment(GUESS.float().log(), torch.tensor([0]))
    torch.testing.assert_close(first, GUESS.float())  # both frequencies start uniform
    again = alignment(GUESS.float().log(), torch.tensor([0]))
    assert torch.equal(first, again)  # what it has seen waits for the end of the step
    alignment.update()
    expected = (127 / 3 + GUESS[0]) / 128
    torch.testing.assert_close(alignment.predicted.mean(dim=0), expected.float())
    alignment.update()  # nothing new
    torch.testing.assert_close(alignment.predicted.mean(dim=0), expected.float())


def test_the_first_batch_is_forgotten_after_as_many_as_are_remembered():
    alignment = Alignment(3, None)
    for number in range(HISTORY + 1):
        alignment(certain(2, cls=1 if number == 0 else 0), torch.tensor([0]))
        alignment.update()
        if number == HISTORY - 1:
            assert alignment.predicted.mean(dim=0)[1].item() == pytest.approx(1 / HISTORY)
    assert alignment.predicted.mean(dim=0).tolist() == [1, 0, 0]


def test_the_marginal_is_a_running_mean_of_the_labels_that_starts_uniform():
    alignment = Alignment(3, None)
    alignment(certain(2), torch.tensor([0, 0, 1, 0]))
    alignment.update()
    expected = 0.999 / 3 + 0.001 * torch.tensor([0.75, 0.25, 0.0])
    torch.testing.assert_close(alignment.marginal, expected)
    known = Alignment(3, (0.5, 0.3, 0.2))
    known(certain(2), torch.tensor([0, 0]))
    known.update()
    assert known.marginal.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_micro_batches_of_a_step_are_one_batch():
    whole, parts = Alignment(3, None), Alignment(3, None)
    logits, label = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    whole(logits, label)
    for part in (slice(0, 3), slice(3, 6)):
        parts(logits[part], label[part])
    for alignment in (whole, parts):
        alignment.update()
    assert whole.place == parts.place == 1
    torch.testing.assert_close(whole.predicted, parts.predicted)
    torch.testing.assert_close(whole.marginal, parts.marginal)


def test_a_quarter_of_the_batch_has_each_angle_and_draws_say_which():
    draws = Draws.of(0, 0, torch.arange(64))
    assert quarter_turns(draws).bincount().tolist() == [16] * 4
    other = quarter_turns(Draws.of(0, 1, torch.arange(64)))
    assert other.bincount().tolist() == [16] * 4 and not torch.equal(other, quarter_turns(draws))
    single = [quarter_turns(Draws.of(seed, 0, torch.tensor([0]))).item() for seed in range(40)]
    assert set(single) == {0, 1, 2, 3}


def reference(method, batch, progress):
    """The losses, written out; cross-entropies throughout."""
    c = method.config
    strong = [batch[name] for name in method.strong_names]
    with torch.no_grad():
        guess = method.logits(batch["weak"]).softmax(dim=1)
        ratio = (method.alignment.marginal + 1e-6) / (method.alignment.predicted.mean(dim=0) + 1e-6)
        guess = F.normalize(guess * ratio, p=1, dim=1) ** (1 / c.temperature)
        guess = guess / guess.sum(dim=1, keepdim=True)
    known = F.one_hot(batch["label"], CLASSES).to(guess.dtype)
    images = torch.cat([batch["labelled"], batch["weak"], *strong])
    target = torch.cat([known, *[guess] * (1 + len(strong))])
    images, target = mix_up(images, target, pool_draws(batch, views=1 + len(strong)), alpha=c.alpha)
    rows = len(known)
    each = -(target * method.logits(images).log_softmax(dim=1)).sum(dim=1)
    strong_loss = -(guess * method.logits(strong[0]).log_softmax(dim=1)).sum(dim=1).mean()
    quarters = quarter_turns(Draws(batch["unlabelled.key"]).fork(TURN))
    turned = method.rotation_head(method.encoder(turn(strong[0], quarters))).log_softmax(dim=1)
    rotation_loss = -turned.gather(1, quarters[:, None]).mean()
    ramp = min(1.0, progress * 64)
    loss = each[:rows].mean() + ramp * (1.5 * each[rows:].mean() + 0.5 * strong_loss) + 0.5 * rotation_loss
    return {
        "labelled_loss": each[:rows].mean(), "unlabelled_loss": each[rows:].mean(), "strong_loss": strong_loss,
        "rotation_loss": rotation_loss, "loss": loss,
    }  # fmt: skip


def grouped(**changes):
    method = double(ReMixMatch, norm="group")
    method.config = ReMixMatchConfig(**changes)
    method.strong_names = ReMixMatch(copy.deepcopy(method.encoder), method.config, classes=3, images=4).strong_names
    with torch.no_grad():
        method.alignment.predicted.copy_(torch.randn(HISTORY, 3).softmax(dim=1))
        method.alignment.marginal.copy_(torch.tensor([0.5, 0.3, 0.2]))
    return method


@pytest.mark.parametrize("strong_views", [1, 3])
@pytest.mark.parametrize("progress", [0.0, 1 / 128, 0.5])
def test_a_step_and_its_gradient_are_those_of_an_independent_writing(progress, strong_views):
    method = grouped(strong_views=strong_views)
    batch = double_batch(method)
    found = method(batch, progress)
    found["loss"].backward()
    gradients = [parameter.grad.clone() for parameter in method.parameters()]
    method.zero_grad()
    expected = reference(method, batch, progress)
    expected["loss"].backward()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-6), name
    for one, parameter in zip(gradients, method.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-8, rtol=1e-6)


def test_the_rotation_head_learns_at_half_weight():
    method = grouped()
    batch = double_batch(method)
    method(batch, 0.5)["loss"].backward()
    half = method.rotation_head.weight.grad.clone()
    method.zero_grad()
    reference(method, batch, 0.5)["rotation_loss"].backward()
    torch.testing.assert_close(half, 0.5 * method.rotation_head.weight.grad)


def test_no_gradient_reaches_what_is_remembered():
    method = build(ReMixMatch)
    method(batch_of(method), 0.5)["loss"].backward()
    assert all(not seen.requires_grad for seen in method.alignment._seen)
    method.on_step_end(0.5)
    assert not any(buffer.requires_grad for buffer in method.buffers())


def test_only_the_mixtures_move_running_statistics():
    method = build(ReMixMatch)
    norm = method.encoder.blocks["c1"][1]
    sizes, means = [], []

    def look(module, inputs, _):
        sizes.append(len(inputs[0]))
        means.append(inputs[0].mean(dim=(0, 2, 3)).detach())

    norm.register_forward_hook(look)
    method(batch_of(method), 0.5)["loss"].backward()
    assert sizes == [
        BATCH,
        3 * BATCH,
        2 * BATCH,
    ]  # the guess; labelled, weak and strong mixed; strong, as it is and turned
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * means[1])


def test_each_strong_view_is_another():
    method = build(ReMixMatch, strong_views=3)
    assert [view.name for view in method.views(16)] == ["labelled", "weak", "strong", "strong2", "strong3"]
    batch = batch_of(method)
    names = ["weak", "strong", "strong2", "strong3"]
    assert not any(torch.equal(batch[a], batch[b]) for a in names for b in names if a < b)


def test_alignment_and_policy_are_part_of_the_state():
    method, other = build(ReMixMatch), build(ReMixMatch)
    method(batch_of(method), 0.5)
    method.on_step_end(0.5)
    changed = ("alignment.predicted", "alignment.place", "alignment.marginal", "policy.weights")
    assert not any(torch.equal(method.state_dict()[name], other.state_dict()[name]) for name in changed)
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(method.state_dict()[name], other.state_dict()[name]) for name in changed)
    assert other.alignment.place == 1


def test_the_policy_learns_from_what_the_average_recognises_of_probes_after_the_step():
    method = build(ReMixMatch)
    batch = batch_of(method)
    asked = []
    method.average.encoder.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    method(batch, 0.5)
    assert method.policy.weights.eq(1).all()  # views are drawn by the old weights until the step is done
    expected = CTAugment(CTAugmentConfig())
    probes, record = expected.probe(batch["labelled"], Draws(batch["labelled.key"]).fork(PROBE))
    assert len(asked) == 1 and torch.equal(asked[0], probes)
    probability = method.average.logits(probes).softmax(dim=1)
    expected.update(record, probability[torch.arange(BATCH), batch["label"]])
    method.on_step_end(0.5)
    torch.testing.assert_close(method.policy.weights, expected.weights)
    assert method.policy.weights.lt(1).any()
    method.on_step_end(0.5)  # nothing new
    torch.testing.assert_close(method.policy.weights, expected.weights)


def test_asking_the_average_leaves_it_as_it_is():
    method = build(ReMixMatch)
    before = {name: value.clone() for name, value in method.average.state_dict().items()}
    method(batch_of(method), 0.5)["loss"].backward()
    method.on_step_end(0.5)
    assert all(torch.equal(before[name], value) for name, value in method.average.state_dict().items())
    assert not any(parameter.grad is not None for parameter in method.average.parameters())


def test_strong_views_are_drawn_by_the_policys_weights_of_the_moment():
    method = build(ReMixMatch)
    strong = method.views(16)[2].transform
    images, draws = pictures(rows=32)["unlabelled"], Draws.of(0, 0, torch.arange(32))
    before = strong(images, draws)
    with torch.no_grad():
        method.policy.weights[::2] = 0.1
    after = strong(images, draws)
    assert not torch.equal(before, after)
    with torch.no_grad():
        method.policy.weights.fill_(1)
    assert torch.equal(before, strong(images, draws))


def test_without_an_average_a_step_says_what_is_missing():
    method = build(ReMixMatch)
    method.attach()
    with pytest.raises(AssertionError, match="the average was not lent"):
        method(batch_of(method), 0.5)


def test_one_labelled_and_one_unlabelled_image_are_enough():
    method = build(ReMixMatch)
    losses = method(batch_of(method, rows=1), 0.5)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strong_views": 0}, "strong_views = 0: must be >= 1"),
        ({"marginal": (0.5, 0.6)}, r"marginal = \(0.5, 0.6\): must be frequencies > 0 that sum to 1"),
        ({"marginal": (1.0, 0.0)}, r"marginal = \(1.0, 0.0\): must be frequencies > 0 that sum to 1"),
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"alpha": 0.0}, "alpha = 0.0: must be > 0"),
        ({"rotation_weight": -1.0}, "rotation_weight = -1.0: must be >= 0"),
        ({"ramp": -0.5}, r"ramp = -0.5: must be in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReMixMatchConfig(**changes)


def test_a_marginal_of_other_classes_is_refused_when_the_method_is_built():
    with pytest.raises(ValueError, match="has 2 frequencies, and there are 3 classes"):
        build(ReMixMatch, marginal=(0.4, 0.6))
