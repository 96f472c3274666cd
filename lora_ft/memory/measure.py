"""Measure a device in a fraction of a second: rate of products, bandwidth, time of an operation.

    rates_of(torch.device("cpu"))  ->  Rates(matmul={"float32": 1.8e11}, bandwidth=2.1e10, ...)

The sizes are those of a training step of a small model. Other work on the machine lowers the figures.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Tokens, input and output features of the products, as in a micro-batch of a small model and of a large one.
_PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (4096, 4096, 4096), "mps": (2048, 2048, 2048)}
_LARGE = {"cpu": 64 << 20, "cuda": 1 << 28, "mps": 1 << 28}  # bytes of an array that no cache holds
_SMALL = 1 << 20  # bytes of an array that the caches of a CPU hold
_REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """matmul: FLOP per second by dtype. bandwidth: bytes per second that an elementwise operation reads and writes.

    cached_bandwidth: the same for arrays that fit into a CPU's caches. launch_seconds: of the host for an operation.
    """

    matmul: dict[str, float]
    bandwidth: float
    cached_bandwidth: float
    launch_seconds: float


@functools.cache
def rates_of(device: torch.device) -> Rates:
    """Measure a device, once in a process. Takes 0.3 s on a CPU of two cores."""
    with torch.inference_mode():
        return Rates(
            {str(dtype).removeprefix("torch."): _product(device, dtype) for dtype in _dtypes(device)},
            _copy(device, _LARGE[device.type]),
            _copy(device, _SMALL),
            _operation(device),
        )


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes whose products a device has instructions for."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return [torch.float32, *[torch.float16] * (capability >= (7, 0)), *[torch.bfloat16] * (capability >= (8, 0))]
    has_bfloat16 = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return [torch.float32, *[torch.bfloat16] * has_bfloat16]


def _product(device: torch.device, dtype: torch.dtype) -> float:
    tokens, inner, outer = _PRODUCT[device.type]
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((tokens, inner), (outer, inner)))
    result = torch.empty(tokens, outer, dtype=dtype, device=device)
    return 2 * tokens * inner * outer / _seconds(device, lambda: torch.mm(left, right.T, out=result))


def _copy(device: torch.device, size: int) -> float:
    given, result = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _seconds(device, lambda: torch.neg(given, out=result))


def _operation(device: torch.device) -> float:
    """Return the seconds that the host takes for an operation on a few numbers."""
    count = 300
    few = torch.ones(16, device=device)

    def several() -> None:
        for _ in range(count):
            few.neg()

    return _seconds(device, several) / count


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the median time of some work, after one that warms up."""
    taken = []
    for _ in range(_REPEATS + 1):
        begun = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken[1:])[_REPEATS // 2]
