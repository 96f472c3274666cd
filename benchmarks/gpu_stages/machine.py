"""Versions, GPU and driver, and what the GPU reaches: a large product, a large copy, launches of small kernels."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_stages.setting import Part, Setting, attempt

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel", "flash-attn",
            "trl", "unsloth")  # fmt: skip


def run(setting: Setting) -> Iterator[Part]:
    device = torch.device(setting.device)
    yield "versions", attempt(versions)
    if device.type == "cuda":
        yield "gpu", attempt(gpu, device)
    yield "ceilings", attempt(ceilings, setting, device)


def versions() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), **found}


def gpu(device: torch.device) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(device)
    # The driver's version is in no function of torch.
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"unknown: {error}"
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "architectures": torch.cuda.get_arch_list(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "total_bytes": total,
        "free_bytes": free,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }


def ceilings(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Measure bfloat16 products in FLOP/s, copies in bytes/s (read and written), and the time of a small kernel."""
    size, copied, launches = setting.sized((8192, 2**31, 2000), (128, 2**20, 20))
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * size**3 / best(lambda: a @ b, device)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / best(lambda: target.copy_(source), device)
    small = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(launches):
            small.add_(1)

    launch = best(many, device) / launches
    summary = f"{flops / 1e12:.1f} TFLOP/s, {bandwidth / 1e9:,.0f} GB/s, {launch * 1e6:.1f} us a launch"
    return {"flops": flops, "copied_bytes_per_second": bandwidth, "seconds_per_launch": launch, "summary": summary}


def best(function: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Return the shortest time of several calls in seconds, each to the end of the work that it gives to the device."""
    seconds = []
    for _ in range(times):
        started = now(device)
        function()
        seconds.append(now(device) - started)
    return min(seconds)


def peaks(device: torch.device) -> dict[str, int]:
    """Return the peaks of allocated and reserved bytes, and the bytes that the driver counts now; empty on a CPU.

    The driver counts those of all processes, with the CUDA context and what libraries allocate.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "driver_bytes": total - free,
    }


def now(device: torch.device) -> float:
    """Return the time when everything that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
