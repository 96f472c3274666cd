"""Time the experts of one layer, forward and backward, as transformers computes them and as lora_ft does.

    python benchmarks/experts.py --tokens 1024 --hidden 1024 --inner 384 --experts 64 --chosen 8

By default the shape is that of Qwen3-30B-A3B (2,048; 768; 128; 8) divided by two. Kept: bytes that autograd keeps for
the backward. On a CPU the time is that of all threads, which other processes do not change much. On a GPU, `peak` is
the most that both passes allocate.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lora_ft import config
from lora_ft.io import allocator
from lora_ft.models import quantize, quantize_experts
from lora_ft.ops.experts import module_experts


def main() -> None:
    """Print a line for each storage and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "tokens": 1024,
        "hidden": 1024,
        "inner": 384,
        "experts": 64,
        "chosen": 8,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quant", default="none,nf4,int8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    allocator.configure()
    for kind in given.quant.split(","):
        module = made(given, kind)
        results = {name: measured(given, function) for name, function in functions(module)}
        for name, (seconds, kept, peak) in results.items():
            print(f"{kind:5} {name:12} {seconds * 1e3:8.1f} ms   kept {kept / 1e6:7.1f} MB   peak {peak / 1e6:7.1f} MB")


def made(given: Any, kind: str) -> Any:
    """Return a module of experts with random weights, in one storage format."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = AutoConfig.for_model(
        "qwen3_moe", hidden_size=given.hidden, moe_intermediate_size=given.inner, num_experts=given.experts
    )
    shape._experts_implementation_internal = "grouped_mm"
    dtype = getattr(torch, given.dtype)
    with torch.device(given.device):
        module = Qwen3MoeExperts(shape).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    settings = quantize.bitsandbytes_config(config.Quant(kind=config.QuantKind(kind)), dtype)
    if settings:
        quantize_experts.quantize(module, settings)
    return module


def functions(module: Any) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Yield the implementations."""
    plain = next(each for each in type(module).__mro__ if each.__module__.startswith("transformers.")).forward
    yield "transformers", lambda *given: plain(module, *given)
    yield "lora_ft", lambda *given: module_experts(module, *given)


def measured(given: Any, function: Callable[..., Tensor]) -> tuple[float, int, int]:
    """Return the median time of forward and backward, the bytes kept between them, and the peak on a GPU."""
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    x = torch.randn(given.tokens, given.hidden, device=given.device, dtype=dtype).requires_grad_()
    scores, index = torch.rand(given.tokens, given.experts, device=given.device).topk(given.chosen)
    scores = (scores / scores.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    times: list[float] = []
    on_gpu = x.is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(given.rounds + 1):
        start = clock()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(x, index, scores)
        bytes_kept = sum(kept.values())
        torch.autograd.grad(y, (x, scores), torch.ones_like(y))
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
        del y
        kept.clear()
    return statistics.median(times[1:]), bytes_kept, torch.cuda.max_memory_allocated() - before if on_gpu else 0


if __name__ == "__main__":
    main()
