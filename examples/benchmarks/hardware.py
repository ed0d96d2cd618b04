"""On what was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from negcache_fn._kernels.cpu.build import library

__all__ = ["available_bytes", "describe", "others_cpu_seconds"]

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")


def describe(device: str) -> dict[str, Any]:
    """CPU, the vector and tile instructions that matter here, threads, versions, load."""
    cpu_info = _cpu_info()
    flags = cpu_info.get("flags", "").split()
    described: dict[str, Any] = {
        "cpu": cpu_info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cpu_kernels": library() is not None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def available_bytes(device: str) -> int:
    """What is free now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory_info = Path("/proc/meminfo")
    if memory_info.exists():
        for line in memory_info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * 2**30


def others_cpu_seconds() -> float:
    """What all other processes have used since the start of the machine; only differences mean something."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system = (int(field) for field in path.read_text().split("\n")[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _cpu_info() -> dict[str, str]:
    """Of the first core."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
