"""Pseudo-labelling, Π-model, Mean Teacher and VAT: what each adds to supervised training, and what it leaves alone."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.consistency import consistency
from methods.ema import averaged_copy, update_average
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.mean_teacher import MeanTeacher
from methods.pi_model import PiModel
from methods.pseudo_labelling import PseudoLabelling
from methods.supervised import Supervised
from methods.vat import VAT, VATConfig, adversarial_shift, entropy, unit
from methods.views.draws import Draws
from methods.views.policy import Augment
from tests.methods.contract import BATCH, CLASSES, PIXELS, batch_of, build, lend, pictures
from tests.methods.test_extremes import SOURCES, check_training

METHODS = [PseudoLabelling, PiModel, MeanTeacher, VAT]
LEARNS = {PseudoLabelling: {"min_confidence": 0.34}}  # of three classes the untrained network is that sure of any
ALONE = {VAT: {"entropy_weight": 0.0}}  # without what stands beside the consistency loss
each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
each_norm = pytest.mark.parametrize("norm_from", ["labelled", "all"])


REFUSED = [
    pytest.param(cls, option, values, message, id=f"{cls.__name__}-{option}")
    for option, values, message in (
        ("ramp", (-0.1, 1.5, math.nan), r"must be in \[0, 1\]"),
        ("label_smoothing", (-0.1, 1.0), r"must be in \[0, 1\)"),
        ("dropout", (-0.1, 1.0), r"must be in \[0, 1\)"),
        ("min_confidence", (-0.1, 2, math.nan), r"must be in \[0, 1\]"),
        ("unlabelled_weight", (-1.0, math.nan, math.inf), "must be >= 0"),
        ("epsilon", (-1.0, math.inf), "must be >= 0"),
        ("entropy_weight", (-1.0, math.nan), "must be >= 0"),
        ("xi", (0.0, math.nan, math.inf), "must be > 0"),
        ("iterations", (0,), "must be >= 1"),
    )
    for cls in METHODS
    if option in cls.Config.__dataclass_fields__
]


def ready(cls, norm="batch", **changes):
    """The method with an unlabelled loss that is not 0."""
    return build(cls, norm, **(LEARNS.get(cls, {}) | changes))


def double(method):
    return lend(method.double())


def doubled(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def gradients(method, loss):
    method.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in method.named_parameters()}


def train(method, steps=3, progress=0.5):
    """As the loop does: torch's generator is set for each step."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        method.zero_grad()
        method(batch_of(method, step), progress)["loss"].backward()
        optimizer.step()
    return method.state_dict()


def assert_equal_state(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class TestAll:
    @pytest.mark.parametrize("progress", [0.0, 0.2, 0.9])
    @each_method
    def test_a_weight_of_0_reproduces_supervised_training_bit_for_bit(self, cls, progress):
        changes = ALONE.get(cls, {}) | {"unlabelled_weight": 0.0, "label_smoothing": 0.1}
        noise = {} if cls is VAT else {"dropout": 0.3}
        found = train(ready(cls, **changes, **noise), progress=progress)
        assert_equal_state(found, train(build(Supervised, label_smoothing=0.1, **noise), progress=progress))

    @each_method
    def test_a_weight_above_0_does_not(self, cls):
        found = train(ready(cls, **ALONE.get(cls, {}), label_smoothing=0.1))
        expected = train(build(Supervised, label_smoothing=0.1))
        assert not torch.equal(found["head.1.weight"], expected["head.1.weight"])

    @each_method
    def test_the_labelled_loss_does_not_change_when_unlabelled_images_are_added(self, cls):
        method = ready(cls)
        batch = batch_of(method)
        more = {name: value if name in ("labelled", "label") else value.repeat(3, *[1] * (value.ndim - 1))
                for name, value in batch.items()}  # fmt: skip
        few, many = (method(found, 0.5) for found in (batch, more))
        assert torch.equal(few["labelled_loss"], many["labelled_loss"])
        assert torch.equal(few["train_accuracy"], many["train_accuracy"])

    @each_method
    def test_the_weight_rises_over_the_first_two_fifths(self, cls):
        method = double(ready(cls, norm="group", **ALONE.get(cls, {})))
        batch, found = doubled(batch_of(method)), []
        for progress in (0.0, 0.1, 0.2, 0.4, 0.9):
            losses = method(batch, progress)
            found.append(((losses["loss"] - losses["labelled_loss"]) / losses["unlabelled_loss"]).item())
        weight = {PseudoLabelling: 1.0, PiModel: 10.0, MeanTeacher: 50.0, VAT: 0.3}[cls]
        assert found == pytest.approx([0.0, weight / 4, weight / 2, weight, weight], abs=1e-6)

    @pytest.mark.parametrize("cls", [PiModel, MeanTeacher])
    def test_the_papers_ramp_by_hand(self, cls):
        method = double(ready(cls, norm="group", ramp_form="exponential", unlabelled_weight=1.0))
        batch, found = doubled(batch_of(method)), []
        for quarter in range(5):
            losses = method(batch, 0.4 * quarter / 4)
            found.append(((losses["loss"] - losses["labelled_loss"]) / losses["unlabelled_loss"]).item())
        assert found == pytest.approx([0.006738, 0.060055, 0.286505, 0.731616, 1.0], abs=1e-6)

    @each_method
    def test_only_labelled_images_move_the_running_statistics(self, cls):
        method, supervised = ready(cls), build(Supervised)
        batch = batch_of(method)
        method(batch, 0.5)
        supervised(batch, 0.5)
        assert_equal_state(method.state_dict(), supervised.state_dict())

    @each_method
    def test_with_all_both_streams_move_them_once_in_one_pass(self, cls):
        method, supervised = ready(cls, norm_from="all"), build(Supervised)
        batch = batch_of(method)
        method(batch, 0.5)
        names = {PiModel: ("labelled", "first", "second"), MeanTeacher: ("labelled", "second")}
        seen = torch.cat([batch[name] for name in names.get(cls, ("labelled", "weak"))])
        supervised({"labelled": seen, "label": torch.zeros(len(seen), dtype=torch.int64)}, 0.5)
        for name, value in supervised.state_dict().items():
            torch.testing.assert_close(method.state_dict()[name], value, msg=name)
        assert method.encoder.blocks["c1"][1].num_batches_tracked == 1

    @each_norm
    @each_method
    def test_the_running_statistics_are_the_methods_own_again_after_the_step(self, cls, norm_from):
        method = ready(cls, norm_from=norm_from)
        norms = [module for module in method.modules() if isinstance(module, nn.BatchNorm2d)]
        method(batch_of(method), 0.5)
        assert [(norm.momentum, norm.num_batches_tracked.item()) for norm in norms] == [(0.1, 1)] * len(norms)

    @each_norm
    @each_method
    def test_a_batch_of_one_and_one_labelled_image_a_class_work(self, cls, norm_from):
        method = ready(cls, norm_from=norm_from)
        for labelled, unlabelled in ((1, 1), (CLASSES, 1), (1, 5), (CLASSES, 3 * CLASSES)):
            batch = {name: value[: labelled if name.startswith("label") else unlabelled]
                     for name, value in batch_of(method, rows=3 * CLASSES).items()}  # fmt: skip
            losses = method(batch, 0.5)
            found = gradients(method, losses["loss"])
            assert all(value.isfinite() for value in losses.values())
            assert all(gradient.isfinite().all() for gradient in found.values())

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    @each_method
    def test_under_autocast_every_weight_gets_about_its_gradient_of_float32(self, cls, precision):
        method = ready(cls, norm="group")
        batch = batch_of(method)
        exact = gradients(method, method(batch, 0.5)["loss"])
        with torch.autocast("cpu", precision):
            loss = method(batch, 0.5)["loss"]
        rough = gradients(method, loss)
        for name, gradient in exact.items():
            assert F.cosine_similarity(rough[name].flatten(), gradient.flatten(), dim=0) > 0.95, name

    @each_method
    def test_a_method_is_built_without_memory(self, cls):
        with torch.device("meta"):
            method = cls(SmallCNN(SmallCNNConfig()), cls.Config(), classes=10, images=0)
        assert all(weight.is_meta for weight in method.parameters())

    @each_norm
    @each_method
    def test_nothing_is_drawn_from_torchs_generator(self, cls, norm_from):
        method = ready(cls, norm_from=norm_from)
        batch, before = batch_of(method), torch.get_rng_state()
        method(batch, 0.5)
        assert torch.equal(before, torch.get_rng_state())

    @each_method
    def test_both_streams_are_only_weakly_augmented(self, cls):
        images = pictures()["unlabelled"]
        still = Augment(padding=0, flip=False)
        for view in build(cls, weak=still).views(PIXELS):
            assert torch.equal(view.transform(images, Draws.of(0, 0, torch.arange(BATCH))), images.float() / 255)

    @pytest.mark.parametrize(("cls", "option", "values", "message"), REFUSED)
    def test_an_option_out_of_range_is_refused_by_name_and_value(self, cls, option, values, message):
        for value in values:
            with pytest.raises(ValueError, match=f"^{option} = {value}: {message}"):
                cls.Config(**{option: value})

    @pytest.mark.parametrize("source", ["equal images", "black", "17 pixels"])
    @each_method
    def test_with_batch_norm_over_both_streams_losses_gradients_and_state_are_finite(self, cls, source):
        images, pixels = SOURCES[source][0](), SOURCES[source][1]
        method = ready(cls, norm_from="all")
        check_training(method, [batch_of(method, seed, pixels=pixels, images=images) for seed in range(2)], "float32")


class Fixed(nn.Module):
    """An encoder whose feature is what the first pixels say, so that logits can be chosen through the images."""

    dim = CLASSES

    def forward(self, images):
        return images.flatten(1)[:, :CLASSES]


def labeller(logits, **changes):
    """Pseudo-labelling whose logits for the unlabelled images are these, and its batch; labelled images cost ln 3."""
    method = PseudoLabelling(Fixed(), PseudoLabelling.Config(**changes), classes=CLASSES, images=0)
    nn.init.eye_(method.head[1].weight)
    nn.init.zeros_(method.head[1].bias)
    images = torch.zeros(len(logits), 3, 4, 4)
    images.flatten(1)[:, :CLASSES] = logits
    return method, {"labelled": torch.zeros(2, 3, 4, 4), "label": torch.tensor([0, 1]), "weak": images}


class TestPseudoLabelling:
    def test_rejected_images_divide_too(self):
        logits = torch.tensor([[5.0, 0, 0], [1, 1, 1], [0.5, 0, 0], [0, 0, 1.0]])
        method, batch = labeller(logits)
        losses = method(batch, 1.0)
        certain = math.log(1 + 2 * math.exp(-5))  # the one row above 0.95, of four
        assert losses["unlabelled_loss"].item() == pytest.approx(certain / 4, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(math.log(3) + certain / 4, rel=1e-5)
        assert losses["accepted"] == 0.25 and losses["largest_class"] == 1.0

    def test_the_loss_fades_as_the_network_doubts(self):
        rows = [torch.tensor([[5.0, 0, 0]] * sure + [[0.1, 0, 0]] * (8 - sure)) for sure in range(9)]
        found = [method(batch, 1.0)["unlabelled_loss"].item() for method, batch in map(labeller, rows)]
        assert found == pytest.approx([sure / 8 * found[-1] for sure in range(9)], abs=1e-7) and found[0] == 0.0

    def test_of_equal_probabilities_the_first_class_is_the_label(self):
        method, batch = labeller(torch.zeros(2, CLASSES), min_confidence=0.3)
        method(batch, 1.0)["loss"].backward()
        pushed = method.head[1].bias.grad
        assert pushed[0] < 0 and pushed[0] < pushed[1] and pushed[1] < pushed[2]  # labels 0 and 1, pseudo-labels 0

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    @each_norm
    def test_where_no_image_passes_the_threshold_the_gradient_is_the_labelled_ones(self, norm_from, precision):
        method = build(PseudoLabelling, min_confidence=0.999, norm_from=norm_from)
        batch = batch_of(method)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = method(batch, 1.0)
            images = torch.cat([batch["labelled"], batch["weak"]]) if norm_from == "all" else batch["labelled"]
            labelled = F.cross_entropy(method.logits(images)[:BATCH].float(), batch["label"])
        assert losses["unlabelled_loss"] == 0.0 and losses["accepted"] == 0.0 and losses["largest_class"] == 0.0
        expected, found = gradients(method, labelled), gradients(method, losses["loss"])
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name

    def test_the_threshold_holds_from_the_first_step_on(self):
        method, batch = labeller(torch.zeros(3, CLASSES))
        assert [method(batch, progress)["accepted"].item() for progress in (0.0, 0.5, 0.99)] == [0.0, 0.0, 0.0]

    def test_the_label_is_that_of_the_same_logits_and_has_no_gradient(self):
        logits = torch.tensor([[3.0, 0, 0], [0, 2.0, 0]])
        method, batch = labeller(logits, min_confidence=0.0, unlabelled_weight=1.0)
        batch["weak"].requires_grad_()
        method(batch, 1.0)["loss"].backward()
        expected = (logits.softmax(dim=1) - F.one_hot(logits.argmax(dim=1), CLASSES)) / 2
        torch.testing.assert_close(batch["weak"].grad.flatten(1)[:, :CLASSES], expected)

    def test_smoothing_of_a_tenth_would_hold_ten_classes_below_the_threshold(self):
        c = PseudoLabelling.Config()
        assert c.label_smoothing == 0.0 and 1 - 0.1 + 0.1 / 10 < c.min_confidence


class TestTwoViews:
    """Π-model and Mean Teacher: a target of the first view, a student on the second."""

    @each_norm
    @pytest.mark.parametrize("cls", [PiModel, MeanTeacher])
    def test_identical_views_in_eval_mode_cost_exactly_nothing_and_move_nothing(self, cls, norm_from):
        method = build(cls, norm_from=norm_from).eval()
        batch = batch_of(method)
        batch["second"] = batch["first"]
        losses = method(batch, 1.0)
        assert losses["unlabelled_loss"] == 0.0
        alone = build(Supervised, label_smoothing=method.config.label_smoothing).eval()
        expected = gradients(alone, alone(batch, 1.0)["loss"])
        for name, gradient in gradients(method, losses["loss"]).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)

    @each_norm
    @pytest.mark.parametrize("cls", [PiModel, MeanTeacher])
    def test_gradient_reaches_the_second_view_and_not_the_first(self, cls, norm_from):
        method = build(cls, norm="group", norm_from=norm_from)
        batch = batch_of(method)
        for view in ("first", "second"):
            batch[view].requires_grad_()
        method(batch, 1.0)["loss"].backward()
        assert batch["first"].grad is None or not batch["first"].grad.any()
        assert batch["second"].grad.any()

    @pytest.mark.parametrize("cls", [PiModel, MeanTeacher])
    def test_the_loss_is_the_mean_squared_difference_over_rows_and_classes(self, cls):
        method = build(cls, norm="group")
        batch = batch_of(method)
        teacher = method.average if cls is MeanTeacher else method
        first, second = (m.logits(batch[v]).softmax(1) for m, v in ((teacher, "first"), (method, "second")))
        found = method(batch, 1.0)["unlabelled_loss"].item()
        assert found == pytest.approx(((first - second) ** 2).sum().item() / (BATCH * CLASSES), rel=1e-4)

    def test_the_class_mean_is_a_kth_of_the_class_sum(self):
        p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
        mean = consistency(q[None], p.log()[None], distance="mse").item()
        assert mean == pytest.approx(0.02, abs=1e-6) and ((p - q) ** 2).sum().item() == pytest.approx(0.06, abs=1e-6)

    def test_the_two_looks_of_the_pi_model_have_dropout_of_their_own(self):
        method = build(PiModel, dropout=0.5)
        batch = batch_of(method)
        batch["second"] = batch["first"]
        assert method(batch, 1.0)["unlabelled_loss"] > 0

    def test_images_of_one_prediction_show_as_one_class(self):
        method = build(PiModel)
        with torch.no_grad():
            method.head[1].bias[2] = 100.0
        losses = method(batch_of(method), 1.0)
        assert losses["largest_class"] == 1.0 and losses["confidence"] > 0.99 and losses["accepted"] == 1.0


class TestMeanTeacher:
    def test_an_average_of_0999_from_1_over_2_and_3(self):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        average, found = averaged_copy(model), []
        for step, value in enumerate((2.0, 3.0), start=1_000_000):
            nn.init.constant_(model.weight, value)
            update_average(average, model, decay=0.999, step=step)
            found.append(average.weight.item())
        assert found == pytest.approx([1.001, 1.002999], abs=1e-9)

    def test_a_step_leaves_the_average_as_it_is_and_without_gradient(self):
        method = build(MeanTeacher)
        before = copy.deepcopy(method.average.state_dict())
        train(method)
        assert_equal_state(method.average.state_dict(), before)
        assert all(weight.grad is None and not weight.requires_grad for weight in method.average.parameters())
        assert not any(module.training for module in method.average.modules())
        assert not any(name.startswith("average") for name in method.state_dict())

    def test_the_target_is_the_averages_word_and_not_the_students(self):
        method = build(MeanTeacher)
        batch = batch_of(method)
        before = method(batch, 1.0)["unlabelled_loss"]
        with torch.no_grad():
            method.average.head[1].bias[0] += 3.0
        assert method(batch, 1.0)["unlabelled_loss"] != before

    def test_the_average_is_normalised_by_its_own_running_statistics(self):
        method = build(MeanTeacher)
        batch = batch_of(method)
        before = method(batch, 1.0)["unlabelled_loss"]
        with torch.no_grad():
            method.encoder.blocks["c1"][1].running_mean += 5.0
        assert torch.equal(method(batch, 1.0)["unlabelled_loss"], before)
        with torch.no_grad():
            method.average.encoder.blocks["c1"][1].running_mean += 5.0
        assert not torch.equal(method(batch, 1.0)["unlabelled_loss"], before)

    def test_the_average_has_no_dropout(self):
        method = build(MeanTeacher, dropout=0.9)
        images = batch_of(method)["first"]
        assert torch.equal(method.average.logits(images), method.average.logits(images))

    def test_without_an_average_it_says_what_is_missing(self):
        method = build(MeanTeacher)
        method.attach()
        with pytest.raises(AssertionError, match="the average was not lent"):
            method(batch_of(method), 0.0)


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(shift):
    return shift.flatten(1).norm(dim=1)


def shift_of(method, images, start, **changes):
    options = {"epsilon": 3.0, "xi": 1e-3} | changes
    return adversarial_shift(images, start, method.logits, **options)


def divergence(method, images, shift):
    """KL by hand, of every image."""
    with torch.no_grad():
        clean, moved = (method.logits(x).log_softmax(dim=1) for x in (images, images + shift))
        return (clean.exp() * (clean - moved)).sum(dim=1)


@pytest.fixture
def judge():
    """VAT of a small network in eval mode that has learned a little, and clean images."""
    method = build(VAT, unlabelled_weight=0.0, entropy_weight=0.0)
    train(method, steps=5)
    method.zero_grad()
    return method.eval(), pictures(9, 8)["unlabelled"].float() / 255


class TestVat:
    @given(seed=st.integers(0, 2**31), scale=st.floats(1e-30, 1e30))
    @settings(max_examples=25, deadline=None)
    def test_a_vector_of_any_length_becomes_one_of_length_1_in_its_direction(self, seed, scale):
        vectors = normals(seed, 3, 3, 4, 5)
        found = unit(scale * vectors)
        torch.testing.assert_close(lengths(found), torch.ones(3))
        torch.testing.assert_close(found, vectors / lengths(vectors)[:, None, None, None], rtol=1e-4, atol=1e-6)

    def test_nothing_stays_nothing(self):
        assert not unit(torch.zeros(2, 3, 4, 4)).any()

    @pytest.mark.parametrize("epsilon", [0.5, 3.0, 6.0])
    def test_every_images_shift_has_length_epsilon(self, judge, epsilon):
        method, images = judge
        for start in (normals(1, *images.shape), 1e-6 * normals(2, *images.shape)):
            shift = shift_of(method, images, start, epsilon=epsilon)
            torch.testing.assert_close(lengths(shift), torch.full((8,), epsilon))
            assert not shift.requires_grad

    @pytest.mark.parametrize("std", [0.1, 1.0])
    def test_epsilon_is_in_units_of_images_whatever_the_encoder_normalises_by(self, std):
        method = build(VAT, norm="group", epsilon=2.5)
        method.encoder.std.fill_(std)
        seen = []
        method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        batch = batch_of(method)
        method(batch, 1.0)
        assert torch.equal(seen[1], batch["weak"])
        torch.testing.assert_close(lengths(seen[-1] - batch["weak"]), torch.full((BATCH,), 2.5), rtol=1e-5, atol=1e-5)

    @each_norm
    @pytest.mark.parametrize("norm", ["batch", "group"])
    def test_epsilon_0_costs_nothing_also_while_training(self, norm, norm_from):
        method = build(VAT, norm, epsilon=0.0, norm_from=norm_from)
        batch = batch_of(method)
        assert method(batch, 1.0)["unlabelled_loss"].item() == pytest.approx(0.0, abs=1e-6)
        assert double(method)(doubled(batch), 1.0)["unlabelled_loss"].item() == pytest.approx(0.0, abs=1e-12)

    @each_norm
    def test_the_loss_is_not_negative_and_the_longer_the_shift_the_larger(self, norm_from):
        found = []
        for epsilon in (1e-3, 0.1, 0.5, 2.0):
            method = build(VAT, epsilon=epsilon, norm_from=norm_from)
            found.append(method(batch_of(method), 1.0)["unlabelled_loss"].item())
        assert found[0] > -1e-6 and found == sorted(found) and found[-1] > 1e-4

    def test_no_direction_of_a_hundred_random_ones_changes_the_prediction_as_much(self, judge):
        method, images = judge
        found = divergence(method, images, shift_of(method, images, normals(1, *images.shape), epsilon=0.5))
        for seed in range(100):
            random = 0.5 * unit(normals(100 + seed, *images.shape))
            assert (divergence(method, images, random) < found).all()

    def test_more_iterations_find_a_steeper_direction(self, judge):
        method, images = judge
        start = normals(1, *images.shape)
        once, often = (
            divergence(method, images, shift_of(method, images, start, epsilon=0.1, iterations=n)).mean()
            for n in (1, 8)
        )
        assert often > once

    def test_the_direction_is_that_of_the_divergences_second_derivative(self, judge):
        """The slow reference: H d with the Fisher matrix H = Jᵀ (diag(p) - p pᵀ) J, in float64, with no trial step."""
        method, images = judge
        method, images = method.double(), images[:2].double()
        start = normals(1, *images.shape).double()
        found = shift_of(method, images, start, epsilon=1.0, xi=1e-6)
        for row in range(2):
            jacobian = torch.autograd.functional.jacobian(method.logits, images[row : row + 1]).view(CLASSES, -1)
            p = method.logits(images[row : row + 1])[0].softmax(0).detach()
            hessian = jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
            expected = hessian @ start[row].flatten()
            cosine = F.cosine_similarity(found[row].flatten(), expected, dim=0)
            assert cosine.item() == pytest.approx(1.0, abs=1e-5)

    def test_the_trial_step_survives_float32_where_the_papers_drowns(self, judge):
        method, images = judge
        start = normals(1, *images.shape)
        exact = shift_of(copy.deepcopy(method).double(), images.double(), start.double(), epsilon=1.0, xi=1e-6)

        def cosine(xi):
            found = shift_of(method, images, start, epsilon=1.0, xi=xi).double()
            return (found * exact).flatten(1).sum(dim=1).mean().item()

        assert cosine(VATConfig().xi) > 0.99 and cosine(1e-6) < 0.9

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_autocast_does_not_turn_the_direction(self, judge, precision):
        method, images = judge
        start = normals(1, *images.shape)
        exact = shift_of(method, images, start)
        with torch.autocast("cpu", precision):
            assert torch.equal(shift_of(method, images, start), exact)
            assert method.logits(images).dtype == precision  # it is on again

    def test_a_gpus_short_products_are_off_inside_and_as_they_were_after(self, judge):
        method, images = judge
        backends = torch.backends.cudnn, torch.backends.cuda.matmul
        before, seen = [backend.allow_tf32 for backend in backends], []

        def network(x):
            seen.append([backend.allow_tf32 for backend in backends])
            return method.logits(x)

        try:
            for backend in backends:
                backend.allow_tf32 = True
            adversarial_shift(images, normals(1, *images.shape), network, epsilon=1.0, xi=1e-3)
            with pytest.raises(RuntimeError, match="fails"):
                adversarial_shift(images, images, lambda x: (_ for _ in ()).throw(RuntimeError("fails")),
                                  epsilon=1.0, xi=1e-3)  # fmt: skip
            assert seen == [[False, False]] * 2 and [backend.allow_tf32 for backend in backends] == [True, True]
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.allow_tf32 = value

    def test_the_search_leaves_no_gradient_on_weights_and_images(self, judge):
        method, images = judge
        images.requires_grad_()
        shift_of(method, images, normals(1, *images.shape), iterations=3)
        assert images.grad is None and all(weight.grad is None for weight in method.parameters())

    def test_the_search_works_where_gradients_are_off(self, judge):
        method, images = judge
        start = normals(1, *images.shape)
        with torch.no_grad():
            found = shift_of(method, images, start)
        assert torch.equal(found, shift_of(method, images, start))

    def test_where_nothing_changes_the_prediction_the_shift_is_nothing(self, judge):
        method, images = judge
        nn.init.zeros_(method.head[1].weight)
        assert not shift_of(method, images, normals(1, *images.shape)).any()

    def test_an_images_shift_does_not_depend_on_the_other_images(self, judge):
        method, images = judge[0].double(), judge[1].double()  # float32 leaves a few digits of so small a difference
        start = normals(1, *images.shape).double()
        together, alone = shift_of(method, images, start), shift_of(method, images[2:3], start[2:3])
        torch.testing.assert_close(together[2:3], alone, rtol=1e-6, atol=1e-9)

    def test_the_start_is_drawn_for_each_image(self):
        method = build(VAT, norm="group")
        seen = []
        method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        batch = batch_of(method)
        method(batch, 1.0)
        start = Draws(batch["unlabelled.key"]).fork(0).normal(3 * PIXELS * PIXELS).view(batch["weak"].shape)
        expected = (batch["weak"] + 1e-3 * unit(start)) - batch["weak"]
        torch.testing.assert_close(seen[3] - batch["weak"], expected)
        other = batch | {"unlabelled.key": Draws.of(7, 0, torch.arange(BATCH)).key}
        assert not torch.equal(method(other, 1.0)["unlabelled_loss"], method(batch, 1.0)["unlabelled_loss"])

    def test_no_gradient_reaches_the_clean_prediction_or_the_shift(self):
        method = double(build(VAT, norm="group", entropy_weight=0.0, unlabelled_weight=1.0))
        batch = doubled(batch_of(method))
        images = batch["weak"]
        start = Draws(batch["unlabelled.key"]).fork(0).normal(images[0].numel()).view(images.shape).double()
        shift = shift_of(method, images, start)
        clean = method.logits(images).softmax(dim=1).detach()
        moved = method.logits(images + shift).log_softmax(dim=1)
        labelled = F.cross_entropy(method.logits(batch["labelled"]), batch["label"], label_smoothing=0.1)
        expected = gradients(method, labelled + (clean * (clean.log() - moved)).sum(dim=1).mean())
        for name, gradient in gradients(method, method(batch, 1.0)["loss"]).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    def test_entropy_by_hand_and_of_certainty(self):
        assert entropy(torch.zeros(4, 3)).item() == pytest.approx(math.log(3))
        half = torch.tensor([[0.5, 0.25, 0.25]]).log()
        assert entropy(half).item() == pytest.approx(1.5 * math.log(2))
        logits = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
        entropy(logits).backward()
        assert entropy(logits) == 0.0 and not logits.grad.any()

    def test_entropy_counts_from_the_first_step_on_and_makes_predictions_surer(self):
        method = build(VAT)
        batch = batch_of(method)
        losses = method(batch, 0.0)
        expected = losses["labelled_loss"] + 0.06 * losses["entropy_loss"]
        torch.testing.assert_close(losses["loss"].detach(), expected)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            entropy(method.logits(batch["weak"])).backward()
            optimizer.step()
        assert method(batch, 0.0)["entropy_loss"] < losses["entropy_loss"]


ROWS, WORKERS = 8, 2


def two_worker_method(cls, norm):
    """In double precision, so that one process and two agree to rounding."""
    return double(ready(cls, norm))


def two_worker_batch(method, rows=slice(None)):
    return {name: value[rows] for name, value in doubled(batch_of(method, images=pictures(rows=ROWS))).items()}


def worker(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    share = slice(rank * ROWS // WORKERS, (rank + 1) * ROWS // WORKERS)
    found = {}
    for cls in METHODS:
        for norm in ("group", "batch"):
            method = two_worker_method(cls, norm)
            model = DistributedDataParallel(method)
            losses = model(two_worker_batch(method, share), 1.0)
            found[cls.__name__, norm] = (losses["loss"].detach(), gradients(method, losses["loss"]))
            model(two_worker_batch(method, share), 1.0)["loss"].backward()  # a second pass meets the wrapper in order
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (folder / "rendezvous", folder), nprocs=WORKERS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@each_method
def test_at_full_weight_two_workers_give_one_processs_loss_and_gradient(cls, workers):
    method = two_worker_method(cls, "group")
    losses = method(two_worker_batch(method), 1.0)
    assert losses["unlabelled_loss"] > 0
    expected = gradients(method, losses["loss"])
    (first, here), (second, there) = (found[cls.__name__, "group"] for found in workers)
    torch.testing.assert_close((first + second) / 2, losses["loss"].detach(), atol=1e-6, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(here[name], gradient, atol=1e-6, rtol=1e-6, msg=name)
        assert torch.equal(here[name], there[name])


@each_method
def test_with_batch_norm_two_workers_agree_on_the_gradient(cls, workers):
    (_, here), (_, there) = (found[cls.__name__, "batch"] for found in workers)
    assert all(torch.equal(gradient, there[name]) and gradient.isfinite().all() for name, gradient in here.items())
