"""The time of a training step, from the work of its operations and the rates of a device: a roofline.

    operation    max(FLOPs / rate of products, bytes / bandwidth), and a few microseconds of a kernel
    GPU          max(sum over operations, launches x time of the host) + transfers between host and device
    CPU          sum over operations + operations x their overhead

    0.6B, 1,024 tokens, H100    3,500 launches x 5 us      18 ms     whatever the number of tokens
                                2.5 TFLOP / 790 TFLOPS      3 ms     grows with the tokens

Specified rates are peaks, which no kernel reaches; the constants below say what is usual. Measured rates are what the
device gave, so they are taken as they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_ft.memory.costs import TRANSFER, Cost
from lora_ft.memory.machine import CACHE_BYTES, Machine
from lora_ft.memory.trace import StepTrace

# Part of a GPU's specified rate that its best products of 16 bits reach: 0.78 (B200) to 0.87 (A100), 0.80 (H100).
# https://github.com/stas00/ml-engineering/tree/master/compute/accelerator (maximum achievable matmul FLOPS)
PRODUCT_EFFICIENCY = 0.8
# Flash attention reaches 0.5 to 0.73 in the forward and 0.4 to 0.63 in the backward on an A100 (arXiv 2307.08691), and
# less on later GPUs (0.35 on an H100, arXiv 2407.08608).
ATTENTION_EFFICIENCY = 0.5
# Part of the specified bandwidth that elementwise kernels reach; a plain copy reaches 0.85 to 0.92.
BANDWIDTH_EFFICIENCY = 0.8
# A kernel's start and the idle end of its last wave of blocks. It makes a product that takes 12 us alone take 15.
KERNEL_SECONDS = 3e-6
# Part of the link's bandwidth that copies from pageable memory reach.
LINK_EFFICIENCY = 0.5

# Stated errors, of both see benchmarks/LOG.md. CPU: steps were predicted and measured. GPU: no step was measured; the
# best published speeds of other trainers on three GPUs lie within this of what is predicted for the same work.
ERROR = {"cpu": 0.3, "cuda": 0.4}

PARTS = ("products", "memory traffic", "launches", "transfers")
LEFT_OUT = "start and loading of the base, generated answers, checkpoints"


@dataclass(frozen=True)
class StepTime:
    """Predicted time of an optimizer step.

    by_part: seconds of products, memory traffic, launches and transfers. On a GPU launches run at the same time as the
    first two, so the parts add up to more than `seconds`. bound_by: the part that decides. error: relative, as in 0.3.
    by_phase: seconds of forward, loss, backward and optimizer.
    """

    seconds: float
    by_part: dict[str, float]
    bound_by: str
    error: float
    by_phase: dict[str, float] = field(default_factory=dict)


def step_time(costs: Iterable[Cost], machine: Machine, micro_batches: float = 1) -> StepTime | None:
    """Return the time of a step whose trace of one micro-batch is given; None if the machine's rates are unknown.

    Forward, loss and backward are taken `micro_batches` times, the optimizer once.
    """
    if not machine.matmul or not machine.bandwidth:
        return None
    parts: dict[str, dict[str, float]] = {}
    for cost in costs:
        times = cost.count * (1 if cost.phase == "optimizer" else micro_batches)
        part, seconds = _device_seconds(cost, machine)
        found = parts.setdefault(cost.phase, dict.fromkeys(PARTS, 0.0))
        found[part] += times * seconds
        found["launches"] += times * cost.launches * machine.launch_seconds
    total = {part: sum(found[part] for found in parts.values()) for part in PARTS}
    # Host and device meet once a step, where the loss is read, so the slower of them decides over the whole step.
    is_gpu = machine.target.kind != "cpu"
    waits = total["launches"] > total["products"] + total["memory traffic"]
    hidden = () if not is_gpu else ("products", "memory traffic") if waits else ("launches",)
    counted = [part for part in PARTS if part not in hidden]
    return StepTime(
        seconds=sum(total[part] for part in counted),
        by_part=total,
        bound_by=max(counted, key=lambda part: total[part]),
        error=ERROR["cuda" if is_gpu else "cpu"],
        by_phase={phase: sum(found[part] for part in counted) for phase, found in parts.items()},
    )


def run_seconds(step: StepTime, steps: int, evaluated: float = 0) -> float:
    """Return the time of a run without LEFT_OUT; evaluated: tokens of all evaluations by those of a step."""
    forward = step.by_phase.get("forward", 0.0) + step.by_phase.get("loss", 0.0)
    return steps * step.seconds + evaluated * forward


def launch_bound(found: StepTrace, tokens: int, machine: Machine) -> str:
    """Return a sentence if a traced step of `tokens` tokens on a GPU is limited by its launches; "" if it is not."""
    dtype = max(("bfloat16", "float16", "float32"), key=lambda name: machine.matmul.get(name, 0))
    if machine.target.kind != "cuda" or dtype not in machine.matmul:
        return ""
    rate = machine.matmul[dtype] * _efficiency(machine, "matmul", PRODUCT_EFFICIENCY)
    launches = sum(found.dispatches.values())
    launching, computing = launches * machine.launch_seconds, found.flops / rate
    if computing >= launching:
        return ""
    return (
        f"a step of {tokens:,} tokens makes about {launches:,} kernel launches, {launching * 1e3:.0f} ms, but has only "
        f"{computing * 1e3:.0f} ms of products (estimates: {machine.launch_seconds * 1e6:.0f} us a launch, "
        f"{rate / 1e12:.0f} TFLOPS), so the GPU waits: from about "
        f"train.tokens_per_step={_rounded_up(tokens * launching / computing)} on it would not"
    )


def _device_seconds(cost: Cost, machine: Machine) -> tuple[str, float]:
    """Return the part that an operation belongs to, and the seconds of the device for one."""
    if cost.op == TRANSFER:
        link = (machine.link or float("inf")) * LINK_EFFICIENCY
        return "transfers", cost.bytes / link
    usual = ATTENTION_EFFICIENCY if "attention" in cost.op or "attn" in cost.op else PRODUCT_EFFICIENCY
    computing = cost.flops / (_rate(cost.dtype, machine.matmul) * _efficiency(machine, "matmul", usual))
    cached = machine.cached_bandwidth if cost.bytes <= CACHE_BYTES else None
    bandwidth = (cached or machine.bandwidth or 0.0) * _efficiency(machine, "bandwidth", BANDWIDTH_EFFICIENCY)
    moving = cost.bytes / bandwidth
    kernel = 0.0 if machine.target.kind == "cpu" else cost.launches * KERNEL_SECONDS
    return "products" if computing >= moving else "memory traffic", max(computing, moving) + kernel


def _rate(dtype: str, matmul: Mapping[str, float]) -> float:
    """Return the rate of products; a dtype that the device has no instructions for is computed in float32."""
    return matmul.get(dtype) or matmul.get("float32") or max(matmul.values())


def _efficiency(machine: Machine, name: str, usual: float) -> float:
    # What was measured here has it already. "assumed: as here" is measured, on another machine.
    return 1.0 if machine.target.kind == "cpu" or machine.is_measured(name) else usual


def _rounded_up(tokens: float) -> int:
    """Round up to 1,024 times a power of two: the estimate is no better than that."""
    found = 1024
    while found < tokens:
        found *= 2
    return found
