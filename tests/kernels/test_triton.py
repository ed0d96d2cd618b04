"""The pass on CUDA: Triton's kernel, interpreted where there is no GPU, and compiled for one."""

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._kernels.triton import call as cuda
from negcache_fn._scores import stream
from negcache_fn._scores.definition import ScoreMatrix
from tests.kernels.test_cpu import problem

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MODULE = "negcache_fn._kernels.triton.block_logsumexp"


@needs_triton
@pytest.mark.parametrize("interpreted", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreted", "compiled"])
def test_triton_kernel(interpreted: str) -> None:
    """`triton_cases.py` in a process of its own, because Triton interprets all kernels of a process or none."""
    cases = Path(__file__).with_name("triton_cases.py")
    options = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=240"]
    command = [sys.executable, "-m", "pytest", *options, str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "NEGCACHE_FN_NATIVE": "1"}
    environment.setdefault("HYPOTHESIS_PROFILE", "device")  # an interpreted kernel takes long, too
    ran = subprocess.run(command, env=environment, cwd=cases.parents[2], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_triton
@pytest.mark.parametrize(
    ("capability", "storage", "precision", "dim", "weighted", "size"),
    [
        (80, "bf16", "tf32", 768, False, None),
        (90, "fp32", "tf32x3", 100, False, None),
        (80, "fp32", "tf32x3", 100, True, 1),
        (90, "bf16", "tf32", 768, True, None),
        (80, "i8", "tf32", 768, True, None),
        (90, "i8", "tf32", 100, False, None),
    ],
)
def test_kernel_compiles_without_a_gpu(
    capability: int, storage: str, precision: str, dim: int, weighted: bool, size: int | None
) -> None:
    """To machine code that multiplies on tensor cores; Triton takes a size of 1 for a constant, an int of Python."""
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    kernel = importlib.import_module(MODULE)._kernel
    constants = {
        "D": dim,
        "P": 1,
        "LIMITED": True,
        "LABELLED": True,
        "PARTS": 2,
        "PRECISION": precision,
        "WIDEN": False,
    }
    constants |= {"WEIGHTED": weighted, "SCALED": storage == "i8", "UNIT": 2.0**15}
    if size is not None:
        constants |= dict.fromkeys(("B", "C", "blocks"), size)
    constants |= {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 32}
    multiplied = "bf16" if storage == "i8" else storage
    pointers = {
        "queries": multiplied,
        "magnitude": "fp32",
        "embeddings": storage,
        "bias": "fp32",
        "excluded": "i64",
        "max_score": "fp32",
        "row_labels": "i32",
        "slot_labels": "i32",
        "row_scale": "fp32",
    }
    types = {name: f"*{kind}" for name, kind in {**pointers, "out": "fp32", "weights": multiplied}.items()}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 3})
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_noise_compiles_without_a_gpu(capability: int) -> None:
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    kernel = importlib.import_module("negcache_fn._kernels.triton.gumbel")._kernel
    constants = {"LEVEL": 1, "WIDTH": 256}
    types = dict.fromkeys(("seed", "step", "row", "quad"), "*i64") | {"out": "*fp32"}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    assert "mul.hi.u32" in triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]


@needs_triton
def test_some_tiles_suit_every_batch() -> None:
    module = importlib.import_module(MODULE)
    for bucket in (2**n for n in range(4, 15)):
        for size in (2, 4):
            kept = module.suitable(module.configs(size), {"bucket": bucket}, PRECISION="ieee")
            assert kept
            assert all(min(64, bucket) <= config.kwargs["BLOCK_M"] <= bucket for config in kept)


@given(
    size=st.floats(1e-30, 1e30),
    storage=st.sampled_from(cuda._STORAGE),
    precision=st.sampled_from(["highest", "high", "medium"]),
    seed=st.integers(0, 99),
)
def test_parts_are_the_queries(size: float, storage: torch.dtype, precision: str, seed: int) -> None:
    """To the error that the module promises, relative to the largest number of a row, and within float16's range."""
    queries = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * size
    queries[1] = 0.0
    parts, magnitude = cuda._split(queries, storage, precision)
    assert parts.dtype == (torch.bfloat16 if storage == torch.int8 else storage)
    assert bool(parts.isfinite().all())
    assert bool((torch.frexp(magnitude).mantissa == 0.5).all())
    one, two = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 2.0**-17), torch.float16: (2.0**-11, 2.0**-21)}[
        parts.dtype
    ]
    error = (parts.double().sum(0) * magnitude.double()[:, None] - queries.double()).abs().amax(1)
    assert bool((error <= queries.double().abs().amax(1) * (one if precision == "medium" else two)).all())


def plain_launch(
    queries: Tensor,
    magnitude: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    max_score: Tensor | None,
    precision: str,
    out: Tensor,
    weights: Tensor | None = None,
    unit: float = 1.0,
    row_labels: Tensor | None = None,
    slot_labels: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """What the kernel computes, in plain torch."""
    assert precision in ("ieee", "tf32x3", "tf32")
    whole = queries.float().sum(0) * magnitude[:, None]
    matrix = ScoreMatrix(whole, embeddings, bias, excluded, max_score, None, row_labels, slot_labels, row_scale)
    out.copy_(stream._reduce_blocks(matrix, "logsumexp"))
    if weights is not None:
        weights.copy_((matrix.scores().view(*out.shape, -1) - out[:, :, None]).exp().nan_to_num() * unit)


@pytest.fixture
def _on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernel", lambda: SimpleNamespace(launch=plain_launch))
    monkeypatch.setattr(cuda, "supports", lambda *_: True)
    monkeypatch.setattr(cpu, "supports", lambda *_: False)


@pytest.mark.usefixtures("_on_the_kernel")
@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_the_passes_ask_the_kernel(storage: torch.dtype) -> None:
    arguments = problem(5, 300, 24, storage, 2, 0)
    matrix = ScoreMatrix(*arguments, None, None)
    expected = stream._reduce_blocks(matrix, "logsumexp")
    options: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-4}
    torch.testing.assert_close(stream.reduce_blocks(matrix, "logsumexp"), expected, **options)
    torch.testing.assert_close(stream.summarize(matrix).log_normalizer, expected.logsumexp(1), **options)
    maxima = stream._reduce_blocks(matrix, "max")
    assert torch.equal(stream.reduce_blocks(matrix, "max"), maxima)
    assert math.isfinite(float(maxima.max()))


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One plain line says so, once."""
    cuda.kernel.cache_clear()
    try:
        monkeypatch.setenv("NEGCACHE_FN_NATIVE", "0")
        assert cuda.kernel() is None
        cuda.kernel.cache_clear()
        monkeypatch.setenv("NEGCACHE_FN_NATIVE", "1")
        monkeypatch.setitem(sys.modules, MODULE, None)  # as if it could not be imported
        with caplog.at_level(logging.INFO, logger=cuda.__name__):
            assert cuda.kernel() is None
            assert cuda.kernel() is None
        assert [record.message.split(":")[0] for record in caplog.records] == ["no Triton"]
        with pytest.raises(RuntimeError, match="ask `supports` first"):
            cuda.block_logsumexp(Problem(*problem(1, 1, 1, torch.float32, 0, 0), None))
    finally:
        monkeypatch.undo()
        cuda.kernel.cache_clear()


def test_cpu_tensors_are_not_for_cuda() -> None:
    assert not cuda.supports(Problem(*problem(1, 3, 2, torch.float32, 0, 0), None))
