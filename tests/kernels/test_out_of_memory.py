"""What the kernels keep is bounded, and a kernel that runs out of memory raises an error and ends no process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_cpu import needs_kernels

# In a process of its own: limits and peaks are those of a process.
CODE = """
import ctypes
import resource
from pathlib import Path

import torch

from negcache_fn._kernels.cpu import call, scans
from negcache_fn._kernels.problem import Problem


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def problem(rows, capacity):
    queries, embeddings = torch.randn(rows, 4), torch.randn(capacity, 4)
    return Problem(queries, embeddings, torch.zeros(capacity), torch.empty(rows, 0, dtype=torch.int64), None)


def run_short(megabytes, call):
    ctypes.CDLL(None).malloc_trim(0)  # else the call may take what the one before it has given back
    limit = status("VmSize") + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        call()
    except MemoryError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


torch.manual_seed(0)
torch.set_num_threads(32)  # candidates of each thread: 32 KiB for every row
many = problem(700, 4096)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
scores, slots = call.hardest(many, 1000)
print((status("VmHWM") - before) >> 20)
exact = (many.queries.double() @ many.embeddings.double().T).topk(1000).values
torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-5)

torch.set_num_threads(2)
large, ids = problem(10_000, 300), torch.arange(1 << 22)
run_short(300, lambda: call.hardest(large, 1024))
run_short(100, lambda: scans.lowest_slots(-ids, torch.zeros(len(ids), dtype=torch.bool), 1 << 21))
run_short(40, lambda: scans.find_slots(ids, ids, ids))
assert scans.find_slots(ids[:3], ids, ids).tolist() == [0, 1, 2]
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")
def test_memory_is_bounded_and_its_end_is_an_error() -> None:
    # Large blocks always go back to the system: otherwise it depends on threads what is left from the call before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", CODE]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr
    peak, *errors = finished.stdout.splitlines()
    assert 256 < int(peak) < 600  # MiB: 512 for candidates, which would be 704 without a bound
    assert [error.partition(" ran out of memory")[0] for error in errors] == [
        "negcache_hardest",
        "negcache_lowest",
        "negcache_find_slots",
    ]
