"""Two gloo workers are one process: the same loss and gradient at the same global batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from methods.collectives import all_gather
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.noisy_student import NoisyStudent, NoisyStudentConfig
from methods.simclr import SimCLR, SimCLRConfig
from methods.views.draws import Draws

ROWS, WORKERS = 8, 2


def build(name):
    """Double precision, group norm (each worker has its own batch statistics otherwise), and no dropout."""
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm="group"))
    if name == "simclr":
        method = SimCLR(encoder, SimCLRConfig(), classes=0, images=0)
        method.projector[1] = torch.nn.Identity()
    else:
        method = NoisyStudent(encoder, NoisyStudentConfig(dropout=0.0), classes=3, images=0)
    return method.double()


def batch_of(method, rows):
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(256, (ROWS, 3, 16, 16), generator=rng, dtype=torch.uint8)
    index = torch.arange(ROWS)
    batch = {
        v.name: v.transform(images, Draws.of(0, 0, index, n))[rows].double() for n, v in enumerate(method.views(16))
    }
    return {**batch, "label": index[rows] % 3, "target": torch.randn(ROWS, 3, generator=rng).softmax(1)[rows].double()}


def worker(rank, name, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    method = build(name)
    share = ROWS // WORKERS
    model = DistributedDataParallel(method)  # kept: its hooks live as long as it does
    loss = model(batch_of(method, slice(rank * share, (rank + 1) * share)), 0.0)["loss"]
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if rank == 0:
        torch.save({"loss": mean / WORKERS, "gradients": [p.grad for p in method.parameters()]}, results)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["simclr", "noisy_student"])
def test_two_workers_give_one_processs_loss_and_gradient(name, tmp_path):
    mp.spawn(worker, (name, tmp_path / "rendezvous", tmp_path / "results.pt"), nprocs=WORKERS)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    method = build(name)
    loss = method(batch_of(method, slice(None)), 0.0)["loss"]
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for ours, theirs in zip(method.parameters(), found["gradients"], strict=True):
        torch.testing.assert_close(ours.grad, theirs, atol=1e-6, rtol=1e-6)


def column_major_worker(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = all_gather(rows)
    weight = torch.arange(12.0).reshape(3, 4).T  # column-major, and so is the gradient that comes back
    gathered.backward(weight)
    if rank == 1:
        torch.save({"gathered": gathered.detach(), "gradient": rows.grad}, results)
    dist.destroy_process_group()


def test_gathering_sums_the_gradients_of_all_workers_in_any_memory_layout(tmp_path):
    mp.spawn(column_major_worker, (tmp_path / "rendezvous", tmp_path / "results.pt"), nprocs=WORKERS)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert found["gathered"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
    assert torch.equal(found["gradient"], 2 * torch.arange(12.0).reshape(3, 4).T[2:])


def test_alone_gathering_is_the_identity():
    rows = torch.rand(3, 2)
    assert all_gather(rows) is rows
