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
