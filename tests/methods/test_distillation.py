"""Distillation by hand: the softened divergence and its gradient, the virtual teacher, and a teacher left alone."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.distillation import (
    Distillation,
    DistillationConfig,
    ForeignModel,
    ForeignModelConfig,
    VirtualTeacher,
    VirtualTeacherConfig,
    grouped,
    virtual_loss,
    virtual_teacher,
)
from methods.ema import averaged_copy
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.losses.cross_entropy import cross_entropy
from methods.losses.distillation import distillation
from methods.supervised import Supervised, SupervisedConfig
from tests.methods.contract import CLASSES, batch_of, build

STUDENT = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([0])
SOFTENED = {1: 1.150421, 2: 0.320157, 4: 0.082477, 20: 0.003332}  # KL(p of teacher ‖ p of student), both at T
HARD = 2.407606  # the student's cross-entropy with class 0


class Told(torch.nn.Module):
    """A network that says the same whatever it sees, in the place of an encoder and a head."""

    def __init__(self, logits):
        super().__init__()
        self.said = logits

    def logits(self, images):
        return self.said


def step_of(cls, config, logits=STUDENT, teacher=TEACHER, label=LABEL):
    """The losses of a method whose logits are given."""
    method = cls(SmallCNN(SmallCNNConfig(width=0.25)), config, classes=logits.shape[1], images=0)
    method.logits = lambda images: logits
    method.attach(teacher=Told(teacher))
    return method({"labelled": torch.zeros(len(logits), 3, 16, 16), "label": label}, 0.0)


def train(method, steps):
    """Some steps from the same batches and the same dropout; its state."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        method(batch_of(method, number), number / steps)["loss"].backward()
        optimizer.step()
    return method.state_dict()


class TestSoftenedDivergence:
    @pytest.mark.parametrize("temperature", SOFTENED)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
    def test_it_is_the_divergence_from_teacher_to_student_times_the_squared_temperature(
        self, temperature, dtype, tolerance
    ):
        found = distillation(STUDENT.to(dtype), TEACHER.to(dtype), temperature=temperature).item()
        assert found / temperature**2 == pytest.approx(SOFTENED[temperature], abs=tolerance)
        expected = {1: 1.150421, 2: 1.280627, 4: 1.319630, 20: 1.332778}[temperature]
        assert found == pytest.approx(expected, abs=tolerance if dtype == torch.float64 else 1e-4)

    def test_the_limit_of_large_temperatures_is_half_the_variance_of_the_differences(self):
        assert distillation(STUDENT, TEACHER, temperature=1e4).item() == pytest.approx(4 / 3, abs=1e-6)

    def test_teacher_and_student_cannot_be_exchanged(self):
        one, other = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.9, 0.05, 0.05], [0.4, 0.3, 0.3]))
        forward = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.05 / 0.3)
        backward = 0.4 * math.log(0.4 / 0.9) + 0.6 * math.log(0.3 / 0.05)
        assert distillation(other, one, temperature=1).item() == pytest.approx(forward)
        assert distillation(one, other, temperature=1).item() == pytest.approx(backward) != forward

    def test_it_is_a_mean_over_rows_and_not_over_classes(self):
        rows = [tensor.repeat(5, 1) for tensor in (STUDENT, TEACHER)]
        found = distillation(*rows, temperature=4).item() / 16
        assert found == pytest.approx(0.082477, abs=1e-6) and found / 3 == pytest.approx(0.027492, abs=1e-6)
        mixed = distillation(torch.cat([STUDENT, TEACHER]), torch.cat([TEACHER, TEACHER]), temperature=4).item() / 16
        assert mixed == pytest.approx(0.082477 / 2, abs=1e-6)

    def test_its_gradient_is_the_temperature_times_the_difference_of_the_probabilities(self):
        student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
        distillation(student, teacher, temperature=2).backward()
        assert student.grad.tolist() == [pytest.approx([-0.640313, 0, 0.640313], abs=1e-6)]
        assert teacher.grad is None

    def test_the_gradient_does_not_vanish_at_a_high_temperature(self):
        sizes = []
        for temperature in (2.0, 20.0, 200.0):
            student = STUDENT.clone().requires_grad_()
            distillation(student, TEACHER, temperature=temperature).backward()
            sizes.append(student.grad.abs().max().item())
        assert sizes == pytest.approx([2 / 3] * 3, rel=0.05)

    def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(self):
        student = TEACHER.clone().requires_grad_()
        loss = distillation(student, TEACHER, temperature=4)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12

    @given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50), temperature=st.floats(0.5, 40))
    def test_a_constant_added_to_all_logits_of_a_row_changes_nothing(self, seed, shift, temperature):
        rng = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
        expected = distillation(student, teacher, temperature=temperature)
        torch.testing.assert_close(distillation(student, teacher + shift, temperature=temperature), expected)
        torch.testing.assert_close(distillation(student + shift, teacher, temperature=temperature), expected)
        assert expected > 0

    def test_logits_are_softened_once(self):
        """A softmax of a softmax would make the largest possible difference between the two small."""
        certain = 20 * torch.eye(3, dtype=torch.float64)
        assert distillation(certain.roll(1, 0), certain, temperature=1).item() == pytest.approx(20, abs=1e-4)


class TestDistillation:
    @pytest.mark.parametrize(("alpha", "expected"), [(0.9, 1.428428), (0.6, 1.754820), (0.0, HARD), (1.0, 1.319630)])
    def test_the_loss_weighs_labels_and_teacher_and_softens_the_teachers_part_alone(self, alpha, expected):
        found = step_of(Distillation, DistillationConfig(alpha=alpha))
        assert found["loss"].item() == pytest.approx(expected, abs=1e-6)
        assert found["labelled_loss"].item() == pytest.approx(HARD, abs=1e-6)
        assert found["soft_loss"].item() == pytest.approx(1.319630, abs=1e-6)
        assert [found[name].item() for name in ("train_accuracy", "teacher_accuracy", "teacher_agreement")] == [0, 1, 0]

    def test_a_gradient_reaches_the_student_through_both_parts(self):
        for alpha in (0.0, 1.0):
            logits = STUDENT.clone().requires_grad_()
            step_of(Distillation, DistillationConfig(alpha=alpha), logits)["loss"].backward()
            assert logits.grad.abs().max() > 0.2

    def test_smoothing_is_of_the_labels_part_alone(self):
        smooth = step_of(Distillation, DistillationConfig(label_smoothing=0.1))
        assert smooth["labelled_loss"].item() == pytest.approx(2.307606, abs=1e-6)
        assert smooth["soft_loss"].item() == pytest.approx(1.319630, abs=1e-6)

    def test_the_teacher_sees_the_view_that_the_student_sees_and_no_other(self):
        method, seen = build(Distillation), []
        batch = batch_of(method)
        method.teacher.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        method(batch, 0.0)
        assert len(seen) == 2 and all(images is batch["labelled"] for images in seen)
        assert [view.name for view in method.views(16)] == ["labelled"]

    def test_training_leaves_every_bit_of_the_teacher_as_it_was(self):
        method = build(Distillation)
        teacher = method.teacher
        before = copy.deepcopy(teacher.state_dict())
        train(method, steps=3)
        after = teacher.state_dict()
        assert any("running_mean" in name for name in before) and any("num_batches" in name for name in before)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())

    def test_the_teacher_is_neither_trained_nor_saved(self):
        method = build(Distillation)
        held = {id(parameter) for parameter in method.parameters()}
        assert not held & {id(parameter) for parameter in method.teacher.parameters()}
        assert not any("teacher" in name for name in method.state_dict())

    def test_a_teacher_with_dropout_says_the_same_twice(self):
        encoder = SmallCNN(SmallCNNConfig(width=0.25))
        noisy = averaged_copy(Supervised(encoder, SupervisedConfig(dropout=0.5), classes=CLASSES, images=0))
        method = build(Distillation, alpha=1.0)
        method.attach(teacher=noisy)
        batch = batch_of(method)
        assert torch.equal(method(batch, 0.0)["loss"], method(batch, 0.0)["loss"])

    def test_without_weight_on_the_teacher_it_is_supervised_training_bit_for_bit(self):
        options = {"dropout": 0.3, "label_smoothing": 0.1}
        alone, taught = build(Supervised, **options), build(Distillation, alpha=0.0, **options)
        train(alone, steps=4)
        train(taught, steps=4)
        for name, value in taught.state_dict().items():
            assert torch.equal(value, alone.state_dict()[name]), name

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 1.5}, r"alpha = 1.5: must be in \[0, 1\]"),
            ({"temperature": 0.0}, "temperature = 0.0: must be > 0, it divides logits"),
            ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options, message):
        for config in (DistillationConfig, VirtualTeacherConfig):
            with pytest.raises(ValueError, match=message):
                config(**options)


class TestSmoothing:
    def test_smoothed_labels_are_labels_and_the_divergence_from_the_uniform_distribution(self):
        smoothed = cross_entropy(STUDENT, LABEL, smoothing=0.1).item()
        assert smoothed == pytest.approx(2.307606, abs=1e-6)
        uniform = torch.zeros(1, 3, dtype=torch.float64)
        divergence = distillation(STUDENT, uniform, temperature=1).item()
        assert divergence == pytest.approx(0.308994, abs=1e-6)
        assert smoothed == pytest.approx(0.9 * HARD + 0.1 * (divergence + math.log(3)), abs=1e-6)

    def test_a_teacher_that_knows_nothing_smooths_labels(self):
        """So far a gain by a poor teacher is no more than that by smoothing with the same weight."""
        grads = []
        for ignorant in (True, False):
            logits = STUDENT.clone().requires_grad_()
            if ignorant:
                config = DistillationConfig(alpha=0.1, temperature=1.0)
                step_of(Distillation, config, logits, torch.zeros(1, 3, dtype=torch.float64))["loss"].backward()
            else:
                cross_entropy(logits, LABEL, smoothing=0.1).backward()
            grads.append(logits.grad)
        torch.testing.assert_close(*grads)

    def test_the_released_baselines_smoothing_is_another(self):
        told = virtual_teacher(LABEL, 3, correct=0.9).double()
        assert cross_entropy(STUDENT, told).item() == pytest.approx(2.257606, abs=1e-6)


VIRTUAL = {  # correct: (softened probabilities, divergence of the plain student, of the softened one), K = 3, T = 20
    0.9: ((0.342844, 0.328578, 0.328578), 0.323462, 0.001749),
    0.99: ((0.344366, 0.327817, 0.327817), 0.325815, 0.001933),
}


class TestVirtualTeacher:
    @pytest.mark.parametrize("correct", VIRTUAL)
    def test_its_distribution_is_made_by_hand_and_softened_like_logits(self, correct):
        told = virtual_teacher(torch.tensor([0, 2]), 3, correct=correct).double()
        wrong = (1 - correct) / 2
        assert told[0].tolist() == pytest.approx([correct, wrong, wrong]) and told[1, 2].item() == pytest.approx(
            correct
        )
        softened, plain, both = VIRTUAL[correct]
        assert (told[0] / 20).softmax(dim=0).tolist() == pytest.approx(softened, abs=1e-6)
        found = virtual_loss(STUDENT, told[:1], temperature=20, softened=False).item()
        assert found == pytest.approx(plain, abs=1e-6)
        found = virtual_loss(STUDENT, told[:1], temperature=20, softened=True).item()
        assert found / 400 == pytest.approx(both, abs=1e-6)

    @pytest.mark.parametrize("softened", [False, True])
    def test_the_loss_weighs_labels_and_virtual_teacher(self, softened):
        config = VirtualTeacherConfig(alpha=0.1, temperature=20, correct=0.9, softened=softened)
        found = step_of(VirtualTeacher, config)["loss"].item()
        expected = 0.9 * HARD + 0.1 * (400 * 0.001749096 if softened else 0.323462)
        assert found == pytest.approx(expected, abs=1e-5)

    def test_without_weight_on_it_training_is_supervised_bit_for_bit(self):
        alone, taught = build(Supervised), build(VirtualTeacher, alpha=0.0)
        train(alone, steps=3)
        train(taught, steps=3)
        for name, value in taught.state_dict().items():
            assert torch.equal(value, alone.state_dict()[name]), name

    def test_a_probability_outside_of_its_range_is_refused(self):
        with pytest.raises(ValueError, match=r"correct = 1.0: must be in \(0, 1\), a probability"):
            VirtualTeacherConfig(correct=1.0)


class TestForeignModel:
    def test_a_class_has_the_sum_of_its_outputs_probabilities_given_that_it_is_any_class(self):
        logits = torch.tensor([[0.4, 0.2, 0.1, 0.3]], dtype=torch.float64).log()
        assert grouped(logits, ((0, 1), (2,))).softmax(dim=1).tolist() == [pytest.approx([6 / 7, 1 / 7])]

    def test_every_output_for_itself_is_no_change(self):
        logits = torch.randn(4, 3)
        assert torch.equal(grouped(logits, ((0,), (1,), (2,))), logits)
        assert torch.equal(grouped(logits, ((2,), (0,), (1,))), logits.roll(1, dims=1))

    def test_it_teaches_in_the_datas_classes(self):
        encoder = SmallCNN(SmallCNNConfig(width=0.25))
        config = ForeignModelConfig(outputs=6, groups=((0, 5), (1,), (2, 3)))
        teacher = averaged_copy(ForeignModel(encoder, config, classes=3, images=0))
        method = build(Distillation)
        method.attach(teacher=teacher)
        found = method(batch_of(method), 0.0)
        assert found["loss"].isfinite()
        images = torch.rand(2, 3, 16, 16)
        own = teacher.head(teacher.encoder(images)).softmax(dim=1)
        share = own[:, [2, 3]].sum(dim=1) / (1 - own[:, 4])
        torch.testing.assert_close(teacher.logits(images).softmax(dim=1)[:, 2], share)

    def test_without_classes_it_has_features_and_says_so(self):
        model = ForeignModel(SmallCNN(SmallCNNConfig(width=0.25)), ForeignModelConfig(), classes=0, images=0)
        assert model.features(torch.rand(2, 3, 16, 16)).shape == (2, 64)
        with pytest.raises(ValueError, match="tells no classes apart"):
            model.logits(torch.rand(2, 3, 16, 16))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"outputs": 4, "groups": ((0,), (), (1,))}, "every class needs at least one output"),
            ({"outputs": 4, "groups": ((0,), (1, 0), (2,))}, "output 0 may mean one class only"),
            ({"outputs": 4, "groups": ((0,), (1,), (4,))}, "outputs are 0 to 3, found 0 to 4"),
            ({"outputs": 4, "groups": ((0,), (1,))}, "are of 2 classes, the data has 3"),
            ({"outputs": 4}, "the data has 3 classes; say by groups which means which"),
        ],
    )
    def test_groups_that_cannot_be_read_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            build(ForeignModel, **options)
