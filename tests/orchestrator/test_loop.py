"""What the training loop asks of its process."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from orchestrator.training.loop import keep_freed_memory
if {keep}:
    keep_freed_memory()
torch.ones(16 * 2**20)  # 64 MiB, allocated, written and freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(8 * 2**20)  # 8,192 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    faults = [
        int(subprocess.run([sys.executable, "-c", PROBE.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    assert faults[0] > 8_000 and faults[1] < 100


ORDER = """
import torch
from orchestrator.training.loop import add_in_order
torch.set_num_threads(4)
add_in_order()
index = torch.arange(40_000) % 7
rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
weight = torch.randn(len(index), 64, generator=torch.Generator().manual_seed(1))
found = [torch.autograd.grad((rows[index] * weight).sum(), rows)[0] for _ in range(6)]
assert all(torch.equal(found[0], other) for other in found[1:])
"""


def test_gradients_of_indexed_rows_are_the_same_bits_every_time():
    subprocess.run([sys.executable, "-c", ORDER], check=True)
