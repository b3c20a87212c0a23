"""Two gloo workers are one process: the same loss and gradient at the same global batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from methods.bank import MemoryBank
from methods.collectives import all_gather
from tests.methods.contract import METHODS, double, double_batch, pictures, steps

ROWS, WORKERS = 8, 2
SHARE = ROWS // WORKERS
# these also compare their banks over several steps, in test_bank.py, or their draws, in test_patch_contrast.py
ELSEWHERE = {"PIRL", "InstanceDiscrimination", "NearbyPatches", "PredictivePatches"}
# jigsaw++ takes strangers' tiles from the next image, MixUp mixes with any: each a worker's own, in one process others
OWN_SHARE = {"JigsawPlus", "MixMatch", "ReMixMatch"}
COMPARED = [cls for cls in METHODS if cls.__name__ not in ELSEWHERE]


def images():
    """Noise, of which the first worker's share has a grey image: colorization leaves it out."""
    found = pictures(rows=ROWS)
    found["unlabelled"][1] = found["unlabelled"][1, :1].clone()
    return found


def method_of(cls):
    """Group norm everywhere: on a CPU each worker has its own statistics of batch norm."""
    method = double(cls, norm="group", images=ROWS)
    method.on_start(images()["unlabelled"].double() / 255)
    return method


def share_of(method, rows=slice(None), seed=0):
    return {name: value[rows] for name, value in double_batch(method, seed, images()).items()}


def train(method, model, rows=slice(None)):
    """Loss and gradients of each step that it takes until every weight had a gradient."""
    found = []
    for number in range(steps(type(method))):
        method.zero_grad()
        loss = model(share_of(method, rows, number), 0.0)["loss"]
        loss.backward()
        method.on_step_end(0.0)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.parameters()]
        found.append({"loss": loss.detach(), "gradients": gradients})
    return found


def gather_column_major(rank):
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = all_gather(rows)
    weight = torch.arange(12.0).reshape(3, 4).T  # column-major, and so is the gradient that comes back
    gathered.backward(weight)
    return {"gathered": gathered.detach(), "gradient": rows.grad}


def worker(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    found = {"column-major": gather_column_major(rank)}
    for cls in COMPARED:
        method = method_of(cls)
        banks = [f"{name}.rows" for name, module in method.named_modules() if isinstance(module, MemoryBank)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, banks)
        model = DistributedDataParallel(method, find_unused_parameters=cls.skips_weights)  # as `cluster.fit` has it
        found[cls.__name__] = train(method, model, slice(rank * SHARE, (rank + 1) * SHARE))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two workers found; starting them takes longer than all they do, so they are started once."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (folder / "rendezvous", folder), nprocs=WORKERS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


def mean_of_shares(method):
    """One process that takes each worker's images on their own."""
    parts = [share_of(method, slice(rank * SHARE, (rank + 1) * SHARE)) for rank in range(WORKERS)]
    method.zero_grad()
    loss = sum(method(part, 0.0)["loss"] for part in parts) / WORKERS
    loss.backward()
    return [{"loss": loss.detach(), "gradients": [p.grad for p in method.parameters()]}]


@pytest.mark.parametrize("cls", COMPARED, ids=lambda cls: cls.__name__)
def test_two_workers_give_one_processs_loss_and_gradient(cls, workers):
    method = method_of(cls)
    alone = mean_of_shares(method) if cls.__name__ in OWN_SHARE else train(method, method)
    first, second = (found[cls.__name__] for found in workers)
    for ours, here, there in zip(alone, first, second, strict=True):
        assert ours["loss"].dtype == torch.float64
        torch.testing.assert_close((here["loss"] + there["loss"]) / WORKERS, ours["loss"], atol=1e-6, rtol=0)
        assert any(gradient.any() for gradient in ours["gradients"])
        for expected, one, other in zip(ours["gradients"], here["gradients"], there["gradients"], strict=True):
            torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(one, other)


def test_gathering_sums_the_gradients_of_all_workers_in_any_memory_layout(workers):
    found = workers[1]["column-major"]
    assert found["gathered"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
    assert torch.equal(found["gradient"], 2 * torch.arange(12.0).reshape(3, 4).T[2:])


def test_alone_gathering_is_the_identity():
    rows = torch.rand(3, 2)
    assert all_gather(rows) is rows
