"""Memory that layers free stays the process's own: counted by the kernel's page faults."""

import platform
import subprocess
import sys

import pytest

BLOCK_AGAIN_AND_AGAIN = """
import resource, threading, torch
from dpdl_core.memory import keep_freed_memory

def faults():
    for _ in range(20):  # the heap grows to what is needed
        torch.ones(40 << 20, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(40 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
kept = faults()
there = []
thread = threading.Thread(target=lambda: there.append(faults()))
thread.start()
thread.join()
print(given_back, kept, *there)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_freed_block_is_not_cleared_by_the_kernel_again():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_AGAIN_AND_AGAIN], capture_output=True, text=True, check=True
    )
    given_back, kept, in_a_thread = map(int, done.stdout.split())
    assert given_back > 20 * 40 * 5  # 40 MB: ten thousand pages, or twenty where they are huge
    assert kept < 100
    assert in_a_thread < 100
