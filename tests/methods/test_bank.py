"""The memory bank: its update, who is compared with whom, and two workers against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from methods.bank import BankContrast, MemoryBank
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.losses.nce import nonparametric_softmax
from methods.patch_contrast import InstanceDiscrimination, InstanceDiscriminationConfig
from methods.pirl import PIRL, PIRLConfig
from methods.views.draws import Draws


def contrast(images=20, dim=5, **changes):
    torch.manual_seed(0)
    settings = {
        "form": "info_nce", "temperature": 0.1, "negatives": "shared", "count": 7, "momentum": 0.5
    }  # fmt: skip
    return BankContrast(images, dim, **(settings | changes)).double()


def embeddings(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestUpdate:
    def test_a_row_moves_half_way_to_the_embedding_and_back_to_the_sphere(self):
        bank = MemoryBank(3, 2)
        bank.rows[1] = torch.tensor([1.0, 0.0])
        bank.update(torch.tensor([1]), torch.tensor([[6.0, 8.0]]))  # of any length
        assert bank.rows[1].tolist() == pytest.approx([0.894427, 0.447214], abs=1e-6)

    def test_without_momentum_the_row_is_the_embedding(self):
        bank = MemoryBank(2, 2, momentum=0.0)
        bank.update(torch.tensor([0]), torch.tensor([[0.0, -3.0]]))
        assert bank.rows[0].tolist() == [0.0, -1.0]

    @given(seed=st.integers(0, 2**31), momentum=st.floats(0, 0.999))
    @settings(max_examples=25, deadline=None)
    def test_rows_keep_unit_length_and_others_their_bits_over_many_updates(self, seed, momentum):
        rng = torch.Generator().manual_seed(seed)
        bank = MemoryBank(9, 4, momentum=momentum)
        before = bank.rows.clone()
        for _ in range(30):
            bank.update(torch.randint(7, (5,), generator=rng), torch.randn(5, 4, generator=rng))
        torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(9), atol=1e-6, rtol=0)
        assert torch.equal(bank.rows[7:], before[7:])

    def test_of_an_image_met_twice_in_a_batch_the_last_one_counts(self):
        twice, once = MemoryBank(4, 3), MemoryBank(4, 3)
        once.load_state_dict(twice.state_dict())
        embedding = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        twice.update(torch.tensor([2, 0, 2]), embedding)
        once.update(torch.tensor([2, 0]), embedding[[2, 1]])
        assert torch.equal(twice.rows, once.rows)

    def test_the_order_of_a_batch_changes_nothing(self):
        here, there = MemoryBank(6, 3), MemoryBank(6, 3)
        there.load_state_dict(here.state_dict())
        embedding = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        here.update(torch.arange(6), embedding)
        there.update(order, embedding[order])
        assert torch.equal(here.rows, there.rows)

    def test_no_gradient_reaches_the_rows_and_an_update_is_not_differentiated(self):
        module = contrast()
        embedding = embeddings(1, 1, 3, 5).requires_grad_()
        module(embedding, torch.arange(3), Draws.of(0, 0, torch.arange(3))).sum().backward()
        module.remember(torch.arange(3), embedding[0])
        module.update()
        rows = module.bank.rows
        assert not rows.requires_grad and rows.grad is None and embedding.grad.abs().sum() > 0
        assert "bank.rows" in module.state_dict() and not list(module.parameters())

    def test_what_is_remembered_is_written_after_the_step_and_once(self):
        module, expected = contrast(), contrast()
        embedding = embeddings(1, 4, 5)
        module.remember(torch.tensor([1, 2]), embedding[:2])
        module.remember(torch.tensor([3, 2]), embedding[2:])  # the second micro-batch
        assert torch.equal(module.bank.rows, expected.bank.rows)
        module.update()
        module.update()
        expected.bank.update(torch.tensor([1, 2, 3, 2]), embedding)
        assert torch.equal(module.bank.rows, expected.bank.rows)


@pytest.mark.parametrize("negatives", ["shared", "own"])
class TestNegatives:
    def candidates(self, module, index, draws):
        """Which rows each image's scores are of, found by the scores themselves."""
        unit = embeddings(3, 1, len(index), 5)
        scores, positive = module.scores(unit, index, draws)
        every = F.normalize(unit[0], dim=1) @ module.bank.rows.T / module.temperature
        gap = (scores[0][:, :, None] - every[:, None]).abs()
        assert (gap.amin(dim=2) < 1e-9).all()
        return gap.argmin(dim=2), positive

    @given(seed=st.integers(0, 2**31), count=st.integers(1, 25))
    @settings(max_examples=25, deadline=None)
    def test_an_image_has_itself_as_its_positive_and_never_as_a_negative(self, negatives, seed, count):
        module = contrast(negatives=negatives, count=count)
        index = torch.randint(20, (6,), generator=torch.Generator().manual_seed(seed))
        rows, positive = self.candidates(module, index, Draws.of(seed, 0, index))
        assert rows.shape[1] == 1 + min(count, 19)
        own = rows == index[:, None]
        assert torch.equal(own.nonzero()[:, 1], positive)

    def test_where_all_others_are_asked_for_the_sampled_softmax_is_the_full_one(self, negatives):
        for count in (19, 1000):
            module = contrast(negatives=negatives, count=count)
            index, embedding = torch.tensor([3, 0, 19]), embeddings(1, 3, 5)
            found = module(embedding[None], index, Draws.of(0, 0, index))
            full = nonparametric_softmax(embedding, module.bank.rows, index, temperature=0.1)
            torch.testing.assert_close(found[0], full)

    def test_negatives_are_uniform_over_the_other_images(self, negatives):
        module = contrast(negatives=negatives, images=6, count=2)
        found = torch.zeros(6)
        index = torch.tensor([0, 4])
        for step in range(600):
            rows, positive = self.candidates(module, index, Draws.of(7, step, index))
            mine = rows[1][torch.arange(3) != positive[1]]
            found += torch.bincount(mine, minlength=6)
        assert found[4] == 0
        expected = 1200 / 5
        assert ((found[[0, 1, 2, 3, 5]] - expected) ** 2 / expected).sum() < 23.5  # chi², 4 degrees: p = 1e-4

    def test_all_embeddings_of_an_image_meet_the_same_negatives(self, negatives):
        module = contrast(negatives=negatives, form="softmax_nce")
        index, embedding = torch.arange(4), embeddings(1, 1, 4, 5)
        losses = module(torch.cat([embedding, 3 * embedding]), index, Draws.of(0, 0, index))
        torch.testing.assert_close(losses[0], losses[1])


def test_shared_negatives_are_different_images_set_by_the_first_image():
    module = contrast(count=7)
    index = torch.tensor([2, 9, 11])
    rows, positive = TestNegatives().candidates(module, index, Draws.of(0, 0, index))
    for row in rows:
        assert len(row.unique()) == 8
    other = Draws(torch.cat([Draws.of(0, 0, index).key[:1], torch.tensor([5, 6])]))
    assert torch.equal(TestNegatives().candidates(module, index, other)[0], rows)


def test_own_negatives_of_an_image_do_not_depend_on_the_batch():
    module = contrast(negatives="own")
    index = torch.tensor([2, 9, 11])
    draws, embedding = Draws.of(0, 0, index), embeddings(1, 1, 3, 5)
    together, _ = module.scores(embedding, index, draws)
    alone, _ = module.scores(embedding[:, 1:2], index[1:2], draws[1:2])
    torch.testing.assert_close(together[:, 1:2], alone)


class TestConstantZ:
    def test_z_is_of_the_first_batch_and_then_kept(self):
        module = contrast(form="constant_z", images=8, count=7)
        index = torch.arange(3)
        draws = Draws.of(0, 0, index)
        embedding = embeddings(1, 1, 3, 5)
        module(embedding, index, draws)
        similarity = F.normalize(embedding[0], dim=1) @ module.bank.rows.T
        expected = (8 * (similarity / 0.1).exp().mean()).log()
        torch.testing.assert_close(module.log_normaliser, expected)
        module(embeddings(2, 1, 3, 5), index, draws)
        torch.testing.assert_close(module.log_normaliser, expected)

    def test_z_travels_with_the_state(self):
        module, other = contrast(form="constant_z"), contrast(form="constant_z")
        index = torch.arange(3)
        draws = Draws.of(0, 0, index)
        module(embeddings(1, 1, 3, 5), index, draws)
        other.load_state_dict(copy.deepcopy(module.state_dict()))
        second = embeddings(2, 1, 3, 5)
        assert torch.equal(module(second, index, draws), other(second, index, draws))
        assert not torch.equal(module(second, index, draws), contrast(form="constant_z")(second, index, draws))

    def test_at_a_temperature_where_float32_exp_is_infinite_the_loss_is_finite(self):
        module = contrast(form="constant_z", temperature=0.005).float()
        index = torch.arange(3)
        loss = module(module.bank.rows[None, :3] + 0.0, index, Draws.of(0, 0, index))
        assert loss.isfinite().all() and module.log_normaliser.isfinite()


def test_a_bank_of_one_image_has_nobody_to_tell_it_from():
    with pytest.raises(ValueError, match="at least 2"):
        contrast(images=1)


def test_a_bank_is_built_without_memory():
    with torch.device("meta"):
        module = BankContrast(
            10**9, 128, form="constant_z", temperature=0.1, negatives="shared", count=10, momentum=0.5
        )
    assert module.bank.rows.is_meta


ROWS, WORKERS, IMAGES = 8, 2, 12
CASES = {
    "both": (PIRL, {"transform": "both", "negative_count": 5}),
    "own": (PIRL, {"transform": "rotation", "negative_count": 5, "negatives": "own"}),
    "constant_z": (PIRL, {"form": "constant_z", "negative_count": 5}),
    "whole bank": (InstanceDiscrimination, {"proximal": 0.5}),
}


def build(name):
    """Double precision and group norm: each worker has its own batch statistics otherwise."""
    torch.manual_seed(0)
    cls, changes = CASES[name]
    config = (PIRLConfig if cls is PIRL else InstanceDiscriminationConfig)(**changes)
    return cls(SmallCNN(SmallCNNConfig(width=0.25, norm="group")), config, classes=0, images=IMAGES).double()


def batch_of(method, rows, step):
    rng = torch.Generator().manual_seed(step)
    images = torch.randint(256, (ROWS, 3, 16, 16), generator=rng, dtype=torch.uint8)
    index = torch.tensor([3, 1, 4, 11, 5, 9, 2, 1])  # image 1 on both workers: the last counts
    batch = {
        v.name: v.transform(images, Draws.of(0, step, index, n))[rows].double() for n, v in enumerate(method.views(16))
    }
    return {**batch, "unlabelled.index": index[rows], "unlabelled.key": Draws.of(0, step, index, -1).key[rows]}


def train(method, model, rows):
    """Two steps: the second reads what the first wrote."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = model(batch_of(method, rows, step), 0.0)["loss"]
        loss.backward()
        optimizer.step()
        method.on_step_end(0.0)
        losses.append(loss.detach())
    return {
        "losses": torch.stack(losses), "gradients": [p.grad for p in method.parameters()],
        "rows": method.contrast.bank.rows, "log_normaliser": method.contrast.log_normaliser,
    }  # fmt: skip


def worker(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    share = ROWS // WORKERS
    found = {}
    for name in CASES:
        method = build(name)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, ["contrast.bank.rows"])
        found[name] = train(method, DistributedDataParallel(method), slice(rank * share, (rank + 1) * share))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_banks_stay_equal_and_with_loss_and_gradient_are_one_processs(tmp_path):
    mp.spawn(worker, (tmp_path / "rendezvous", tmp_path), nprocs=WORKERS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORKERS))
    for name in CASES:
        method = build(name)
        alone = train(method, method, slice(None))
        assert torch.equal(first[name]["rows"], second[name]["rows"]), name
        torch.testing.assert_close(first[name]["rows"], alone["rows"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(first[name]["log_normaliser"], alone["log_normaliser"], atol=1e-6, rtol=1e-6)
        mean = (first[name]["losses"] + second[name]["losses"]) / WORKERS
        torch.testing.assert_close(mean, alone["losses"], atol=1e-6, rtol=1e-6)
        for ours, theirs in zip(alone["gradients"], first[name]["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
