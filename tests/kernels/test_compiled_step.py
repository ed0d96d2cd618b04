"""What Inductor makes of a step for a GPU compiles, which does not take a GPU to see."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_of_a_compiled_step_compile_for_cuda() -> None:
    """One kernel of an earlier version was too much for Triton 3.6, at a size that varies and with draws per query."""
    module = "tests.kernels.compile_for_cuda"
    ran = subprocess.run(
        [sys.executable, "-m", module, "queries", "float32"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]
