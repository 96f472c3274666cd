"""Devices and dtypes: resolve `device` and `model.dtype` on this machine, and make a CUDA device the current one.

device = resolve_device("auto")                  cuda:0
dtype = resolve_dtype(Dtype.auto, device)        torch.bfloat16
with selected(device): ...                       kernels of Triton start on the current device
"""

import contextlib
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from lora_ft import config
from lora_ft.errors import ConfigError
from lora_ft.models import gpus
from lora_ft.ops.device import Target

log = logging.getLogger("lora_ft")

_DRIVER = Path("/proc/driver/nvidia/version")


def resolve_device(device: str) -> torch.device:
    """Return the device for auto, cpu, cuda, cuda:N or mps; raises ConfigError if this machine does not have it.

    Of several ranks on this machine (training/ranks.py), each has a GPU of its own for auto and cuda.
    If auto finds only GPUs that this torch cannot use, the reason is logged as a warning, once in a process.
    """
    if device == "cpu":
        return torch.device("cpu")  # without a look at CUDA, which takes memory on the GPU once it has started
    numbers, problem = gpus.usable()
    cuda = [f"cuda:{number}" for number in numbers]
    present = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    own = int(os.environ.get("LOCAL_RANK") or 0)
    first = cuda[own] if own < len(cuda) else f"cuda:{own}"
    wanted = {"auto": first if cuda else present[0], "cuda": first}.get(device, device)
    if wanted not in present:
        names = ", ".join(present)
        reason = f" ({problem})" if problem and wanted.startswith("cuda") else ""
        raise ConfigError(f"device={device} is not available on this machine{reason}: choose one of {names}")
    if device == "auto" and problem and not cuda:
        _warn_once(
            f"this machine has a GPU that cannot be used, so {wanted} is: {problem} (device={wanted} hides this)"
        )
    return torch.device(wanted)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def resolve_dtype(dtype: config.Dtype, device: torch.device) -> torch.dtype:
    """Return the torch dtype; auto is the fastest one in which the device trains (`auto_dtype`).

    Raises ConfigError as `dtype_on`.
    """
    return auto_dtype(device)[0] if dtype is config.Dtype.auto else dtype_on(dtype, Target(device.type))


def dtype_on(dtype: config.Dtype, device: Target) -> torch.dtype:
    """Return the torch dtype of a setting on a kind of device, which need not be here; auto as in `auto_dtype`.

    Raises ConfigError for float16 on a CPU, where its products are slow and activations beyond 65,504 overflow.
    """
    if dtype is config.Dtype.float16 and device.kind == "cpu":
        raise ConfigError("float16 is not for CPUs, where it is slow and overflows easily: use bfloat16 or float32")
    if dtype is not config.Dtype.auto:
        return getattr(torch, dtype.value)
    if device.kind != "cuda" or device.capability < (7, 0):
        return torch.float32
    return torch.bfloat16 if device.capability >= (8, 0) else torch.float16


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str | None]:
    """Return the dtype that model.dtype=auto means on a device, and the reason if it is not bfloat16 on a GPU.

    GPUs compute in bfloat16 from compute capability 8.0 and have tensor cores for float16 from 7.0. Older ones have
    none: most of them compute in float16 at a small fraction of their speed in float32.
    """
    if device.type != "cuda":
        return torch.float32, None
    capability = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if torch.version.hip else dtype_on(config.Dtype.auto, Target("cuda", capability))
    if dtype is torch.bfloat16:
        return dtype, None
    of_gpu = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    if dtype is torch.float16:
        reason = f"{of_gpu}, and bfloat16 needs 8.0; steps whose gradient overflows are skipped"
        return dtype, f"model.dtype=auto is float16: {reason}"
    return dtype, f"model.dtype=auto is float32: {of_gpu}, and float16 is fast from 7.0"


def selected(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one until the block ends: Triton starts kernels there, not where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def describe(device: torch.device) -> dict[str, Any]:
    """Return the facts about a device that can change a result or its speed; memory in bytes."""
    facts: dict[str, Any] = {"device": str(device)}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _driver_version() -> str | None:
    """Return the version of NVIDIA's kernel module, None where Linux does not show it (WSL2, ROCm)."""
    found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text("utf-8")) if _DRIVER.is_file() else None
    return found[0] if found else None
