"""Distillation of embeddings by hand: distances, a teacher left alone, and a student that comes to match it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.embedding_distillation import EmbeddingDistillation, EmbeddingDistillationConfig, embedding_distance
from tests.methods.contract import batch_of, build


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestDistance:
    def test_cosine_is_0_for_one_direction_1_for_orthogonal_and_2_for_opposite_features(self):
        teacher = rows([2.0, 0.0])
        for student, expected in (([5.0, 0.0], 0.0), ([0.0, 3.0], 1.0), ([-1.0, 0.0], 2.0)):
            assert embedding_distance(rows(student), teacher, distance="cosine").item() == pytest.approx(expected)

    @given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100))
    def test_cosine_is_half_the_squared_distance_of_unit_vectors_and_knows_no_length(self, seed, scale):
        rng = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, 5, 4, generator=rng, dtype=torch.float64)
        units = [part / part.norm(dim=1, keepdim=True) for part in (student, teacher)]
        expected = (units[0] - units[1]).square().sum(dim=1).mean() / 2
        torch.testing.assert_close(embedding_distance(scale * student, teacher, distance="cosine"), expected)

    def test_mse_is_of_the_standardised_teacher_so_that_zeros_cost_1(self):
        teacher = rows([1.0, 3.0], [10.0, 20.0])  # (-1, 1) both, after their mean and deviation
        for student, expected in (([0.0, 0.0], 1.0), ([-1.0, 1.0], 0.0), ([1.0, -1.0], 4.0), ([0.0, 1.0], 0.5)):
            found = embedding_distance(rows(student, student), teacher, distance="mse").item()
            assert found == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("distance", ["cosine", "mse"])
    def test_no_gradient_reaches_the_teacher(self, distance):
        student, teacher = (torch.rand(3, 4, requires_grad=True) for _ in range(2))
        embedding_distance(student, teacher, distance=distance).backward()
        assert student.grad.any() and teacher.grad is None

    @pytest.mark.parametrize("distance", ["cosine", "mse"])
    def test_a_teacher_of_zeros_leaves_loss_and_gradient_finite(self, distance):
        student = torch.zeros(3, 4, requires_grad=True)
        loss = embedding_distance(student, torch.zeros(3, 4), distance=distance)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"projector": "linear"}, {"distance": "mse"}], ids=str)
class TestMethod:
    def trained(self, options, steps=25):
        method = build(EmbeddingDistillation, **options)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
        batch, found = batch_of(method, rows=8), []
        for _ in range(steps):
            optimizer.zero_grad()
            losses = method(batch, 0.0)
            losses["loss"].backward()
            optimizer.step()
            found.append(losses)
        return method, found

    def test_a_student_comes_to_match_its_teacher_on_images_without_labels(self, options):
        _, found = self.trained(options)
        assert found[-1]["loss"] < 0.5 * found[0]["loss"]
        assert found[-1]["teacher_similarity"] > found[0]["teacher_similarity"]

    def test_training_leaves_every_bit_of_the_teacher_as_it_was(self, options):
        method = build(EmbeddingDistillation, **options)
        before = copy.deepcopy(method.teacher.state_dict())
        method, _ = self.trained(options, steps=2)
        after = method.teacher.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())

    def test_it_reads_no_label_and_the_teacher_sees_the_same_view(self, options):
        method, seen = build(EmbeddingDistillation, **options), []
        batch = batch_of(method)
        assert {view.stream for view in method.views(16)} == {"unlabelled"}
        for encoder in (method.encoder, method.teacher.encoder):
            encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        method({"weak": batch["weak"]}, 0.0)
        assert len(seen) == 2 and all(images is batch["weak"] for images in seen)


def test_a_length_that_is_none_is_refused():
    with pytest.raises(ValueError, match="teacher_dim = 0: must be > 0"):
        EmbeddingDistillationConfig(teacher_dim=0)
