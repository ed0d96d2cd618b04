"""Compiles a step for CUDA on a machine without a GPU: run by `test_compiled_step.py` in a process of its own.

The step is traced on the CPU, its graphs are moved to fake CUDA tensors, and Inductor makes kernels of them, which
Triton compiles to machine code. Nothing is run. What asks for a device is answered as an H100 would.
"""

import sys
import traceback
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch._dynamo.device_interface
import torch._inductor.async_compile
import torch._inductor.config
import torch._inductor.runtime.triton_helpers
import torch.utils._triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.async_compile import _load_triton_kernel_from_source
from torch._inductor.compile_fx import compile_fx_inner, select_decomp_table
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver

import negcache_fn
from negcache_fn import StepOptions
from negcache_fn._cache import ids

GPU = torch.device("cuda", 0)
TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
OPTIONS = {"batch": StepOptions(num_draws=64), "queries": StepOptions(draws_per_query=1)}
compiled: list[str] = []
failed: list[str] = []


class CannotRunError(Exception):
    """Ends a step whose kernels cannot run."""


def act_as_gpu() -> None:
    """Answers Inductor's questions about the device."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_triton_capable": True,
        "is_bf16_supported": True,
        "is_dtype_supported": True,
        "raise_if_triton_unavailable": None,
        "current_device": 0,
        "device_count": 1,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_raw_stream": 0,
        "get_compute_capability": 90,
        "get_device_properties": PROPERTIES,
    }
    interface = torch._dynamo.device_interface.CudaInterface
    for owner in (interface, interface.Worker):
        for name, answer in answers.items():
            setattr(owner, name, staticmethod(lambda *_, answer=answer, **__: answer))
    for name in ("current_device", "device_count"):
        setattr(torch.cuda, name, lambda *_, answer=answers[name]: answer)
    # A build without CUDA has none of these.
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    # Python's ~ and indexing ask the driver, which is not there.
    torch.Tensor.__invert__ = lambda values: torch.bitwise_not(values)
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    torch.utils._triton.triton_backend = lambda: make_backend(TARGET)
    torch.utils._triton.triton_hash_with_backend = lambda: "compile_for_cuda"
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGET,
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: GPU,
            get_current_stream=lambda *_: 0,
        )
    )
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.async_compile.AsyncCompile.triton = compile_kernel


def compile_kernel(_: Any, name: str, source: str, device_str: str = "cuda") -> None:
    """To machine code, which is not loaded."""
    compiled.append(name)
    try:
        _load_triton_kernel_from_source(name, source).precompile(warm_cache_only=True)
    except Exception:
        failed.append(name)
        traceback.print_exc()


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any], backward: bool) -> Any:
    """As it would be for tensors on a GPU."""
    mode = next(value.fake_mode for value in inputs if isinstance(value, Tensor))
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
    graph.recompile()

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    with mode:
        on_gpu = [moved(value) for value in inputs]
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*on_gpu)
    with V.set_fake_mode(mode):
        compile_fx_inner(graph, on_gpu, is_backward=backward)
    return stop


def stop(*_: Any) -> NoReturn:
    raise CannotRunError


def main(kind: str, storage: torch.dtype) -> int:
    act_as_gpu()
    ids._FEW_ON["cpu"] = ids._FEW_ON["cuda"]
    backend = aot_autograd(
        fw_compiler=partial(compile_graph, backward=False),
        bw_compiler=partial(compile_graph, backward=True),
        decompositions=select_decomp_table,
    )
    state = negcache_fn.init_cache(2**17, 128, torch.zeros(1, 128), embedding_dtype=storage)
    weights = torch.randn(128, 128, requires_grad=True)
    queries, documents = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)

    def step(numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = negcache_fn.step_(
            state, queries, documents, lambda rows: rows @ weights, options=OPTIONS[kind], scale=20.0, ids=numbers
        )
        return out.loss, out.metrics

    try:
        torch.compile(step, fullgraph=True, dynamic=True, backend=backend)(torch.arange(256))
    except CannotRunError:
        print(f"{len(compiled)} kernels, {len(failed)} of them failed: {failed}")
        return 0 if compiled and not failed else 1
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], getattr(torch, sys.argv[2])))
