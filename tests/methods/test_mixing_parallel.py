"""MixMatch, UDA and ReMixMatch on two gloo workers, past their ramps: what each computes and what both remember."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from methods.mixmatch import MixMatch
from methods.remixmatch import ReMixMatch
from methods.uda import UDA, UDAConfig
from tests.methods.contract import double, double_batch, pictures

pytestmark = pytest.mark.slow  # starting two processes
ROWS, WORKERS, STEPS = 8, 2, 2
SHARE = ROWS // WORKERS
METHODS = [MixMatch, UDA, ReMixMatch]


def method_of(cls):
    method = double(cls, norm="group", images=ROWS)
    if cls is UDA:  # some labels are known too well, and some images not well enough
        method.config = UDAConfig(annealing="exp", temperature=0.4, min_confidence=0.4)
    return method


def part_of(method, rank=None, seed=0):
    rows = slice(None) if rank is None else slice(rank * SHARE, (rank + 1) * SHARE)
    return {name: value[rows] for name, value in double_batch(method, seed, pictures(seed, ROWS)).items()}


def finish(method, loss):
    """Gradients of a step, and the buffers after it."""
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in method.parameters()]
    method.zero_grad()
    method.on_step_end(0.5)
    return {"loss": loss.detach(), "gradients": gradients, "buffers": [b.clone() for b in method.buffers()]}


def worker(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    found = {}
    for cls in METHODS:
        method = method_of(cls)
        model = DistributedDataParallel(method)
        found[cls.__name__] = [finish(method, model(part_of(method, rank, step), 0.5)["loss"]) for step in range(STEPS)]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (folder / "rendezvous", folder), nprocs=WORKERS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


def alone(method, step):
    """One process: UDA with the whole batch, the others with each worker's share on its own, where images mix."""
    if isinstance(method, UDA):
        return finish(method, method(part_of(method, None, step), 0.5)["loss"])
    return finish(method, sum(method(part_of(method, rank, step), 0.5)["loss"] for rank in range(WORKERS)) / WORKERS)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_two_workers_give_one_processs_loss_gradient_and_memory(cls, workers):
    method = method_of(cls)
    for step in range(STEPS):
        ours = alone(method, step)
        here, there = (found[cls.__name__][step] for found in workers)
        torch.testing.assert_close((here["loss"] + there["loss"]) / WORKERS, ours["loss"], atol=1e-6, rtol=0)
        for name in ("gradients", "buffers"):
            for expected, one, other in zip(ours[name], here[name], there[name], strict=True):
                torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-6)
                assert torch.equal(one, other)


def test_labels_and_images_were_left_out_on_one_worker_more_than_on_the_other():
    """Else means over the kept and over all would agree by chance."""
    method = method_of(UDA)
    first, second = (method(part_of(method, rank), 0.5) for rank in range(WORKERS))
    assert first["labelled_learned"] != second["labelled_learned"]
    assert 0 < first["labelled_learned"] + second["labelled_learned"] < 2
    assert 0 < first["accepted"] + second["accepted"] < 2
