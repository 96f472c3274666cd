"""Measure a device in a fraction of a second: rate of products, bandwidth, time of an operation.

    rates_of(torch.device("cpu"))  ->  Rates(matmul={"float32": 1.8e11}, bandwidth=2.1e10, ...)

The sizes are those of a training step of a small model. Other work on the machine makes the figures worse.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens, input and output features of the products, as in a micro-batch of a small model and of a large one.
_PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (4096, 4096, 4096), "mps": (2048, 2048, 2048)}
_LARGE = {"cpu": 64 << 20, "cuda": 1 << 28, "mps": 1 << 28}  # bytes of an array that no cache holds
_SMALL = 1 << 20  # bytes of an array that the caches of a CPU hold
_WEIGHTS = 6
_REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """matmul: FLOP per second by dtype. bandwidth: bytes per second that an elementwise operation reads and writes.

    cached_bandwidth: the same for arrays that fit into a CPU's caches. launch_seconds: of an operation besides its
    arithmetic; None for a GPU, whose host is not measured.
    """

    matmul: dict[str, float]
    bandwidth: float
    cached_bandwidth: float
    launch_seconds: float | None


@functools.cache
def rates_of(device: torch.device) -> Rates:
    """Measure a device, once in a process. Takes 0.5 s on a CPU of two cores."""
    with torch.no_grad():
        matmul = {str(dtype).removeprefix("torch."): _product(device, dtype) for dtype in _dtypes(device)}
        bandwidth, cached = _copy(device, _LARGE[device.type]), _copy(device, _SMALL)
    with torch.enable_grad():
        return Rates(matmul, bandwidth, cached, _overhead(matmul["float32"]) if device.type == "cpu" else None)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes whose products a device has instructions for."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return [torch.float32, *[torch.float16] * (capability >= (7, 0)), *[torch.bfloat16] * (capability >= (8, 0))]
    has_bfloat16 = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return [torch.float32, *[torch.bfloat16] * has_bfloat16]


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of products with several weights in turn, none of which the caches hold from the time before."""
    tokens, inner, outer = _PRODUCT[device.type]
    given = torch.ones(tokens, inner, dtype=dtype, device=device)
    weights = [torch.ones(outer, inner, dtype=dtype, device=device) for _ in range(_WEIGHTS)]
    result = torch.empty(tokens, outer, dtype=dtype, device=device)

    def work() -> None:
        for weight in weights:
            torch.mm(given, weight.T, out=result)

    return _WEIGHTS * 2 * tokens * inner * outer / _seconds(device, work)


def _copy(device: torch.device, size: int) -> float:
    given, result = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _seconds(device, lambda: torch.neg(given, out=result))


def _overhead(rate: float) -> float:
    """Return the seconds that an operation of an eager training step takes on a CPU beyond its arithmetic.

    Measured on a few small LoRA layers, forward and backward: Python, autograd, the start of threads, and what products
    of low rank take more than their FLOPs at the rate of a large one.
    """
    tokens, features, rank, layers = 128, 512, 16, 3
    weight = torch.ones(features, features) / features
    lora_a = (torch.ones(rank, features) / features).requires_grad_()
    lora_b = (torch.ones(features, rank) / rank).requires_grad_()
    given = torch.ones(tokens, features, requires_grad=True)

    def step() -> None:
        values = given
        for _ in range(layers):
            values = _Layer.apply(values, weight, lora_a, lora_b)
        values.sum().backward()

    products = layers * 2 * tokens * features * (2 * features + 6 * rank)
    operations = layers * _Layer.OPERATIONS
    return max(1e-6, (_seconds(torch.device("cpu"), step, 2 * _REPEATS) - products / rate) / operations)


class _Layer(torch.autograd.Function):
    """A layer with its LoRA, as ops/lora_linear.py computes it."""

    OPERATIONS = 11

    @staticmethod
    def forward(context: Any, values: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        context.save_for_backward(values, weight, lora_a, lora_b)
        return (values @ weight.T).addmm_(values @ lora_a.T, lora_b.T).relu_()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, lora_a, lora_b = context.saved_tensors
        gradient = gradients[0] * 2
        below = gradient @ lora_b
        return (
            (gradient @ weight).addmm_(below, lora_a),
            None,
            below.T @ values,
            gradient.T @ (values @ lora_a.T),
        )


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Return the time of some work, after one that warms up: the lower quartile, to see past other processes."""
    taken = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken[1:])[repeats // 4]
