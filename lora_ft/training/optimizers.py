"""The optimizer of an adapter, over one flat tensor, and the learning rate as a function of the step.

    flat       [ lora_A ... | lora_B ... | vectors ]     every parameter is a view, and so is every gradient:
    gradient   [ lora_A ... | lora_B ... | vectors ]     one fused AdamW call per group, one norm, one copy

    lr  ^    ______________            warm-up, then the schedule; wsd (warm-up, stable, decay) falls
        |   /              \\ wsd      only in the last optim.decay_fraction of the run
        |  /                \\
        +-------------------------> step
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ft import config
from lora_ft.adapters.attach import is_lora_b
from lora_ft.models.quantize import import_bitsandbytes


@dataclass(frozen=True)
class Flat:
    """Trainable parameters as one tensor: values and gradients [P], and the sizes of its three groups."""

    values: Tensor
    gradients: Tensor
    sizes: tuple[int, int, int]


def flatten(parameters: dict[str, nn.Parameter]) -> Flat:
    """Move parameters into one tensor, ordered by group, and make each a view of it; dtype and device must be equal."""
    ordered = sorted(parameters.items(), key=_group)
    values = torch.cat([p.detach().reshape(-1) for _, p in ordered])
    gradients = torch.zeros_like(values)
    offset = 0
    for _, parameter in ordered:
        size = parameter.numel()
        parameter.data = values[offset : offset + size].view(parameter.shape)
        parameter.grad = gradients[offset : offset + size].view(parameter.shape)
        offset += size
    first, second, third = (sum(p.numel() for n, p in ordered if _group((n, p)) == group) for group in range(3))
    return Flat(values, gradients, (first, second, third))


def _group(named: tuple[str, nn.Parameter]) -> int:
    """0: lora_A and other matrices; 1: lora_B; 2: vectors (DoRA's magnitudes, norms, biases)."""
    name, parameter = named
    if is_lora_b(name):
        return 1
    return 0 if parameter.ndim > 1 else 2


def build(flat: Flat, optim: config.Optim) -> torch.optim.Optimizer:
    """Build the optimizer: lora_B may have a higher learning rate (LoRA+, arXiv 2402.12354), vectors do not decay.

    Each group has an `lr_ratio`, its learning rate divided by the schedule's.
    """
    groups = []
    options = ({"lr_ratio": 1.0}, {"lr_ratio": optim.lora_plus_ratio}, {"lr_ratio": 1.0, "weight_decay": 0.0})
    offset = 0
    for size, option in zip(flat.sizes, options, strict=True):
        if size:
            parameter = nn.Parameter(flat.values[offset : offset + size])
            parameter.grad = flat.gradients[offset : offset + size]
            groups.append({"params": [parameter], **option})
        offset += size
    settings = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.name is config.Optimizer.adamw:
        adamw = torch.optim.AdamW(groups, fused=True, **settings)
        if optim.offload:
            device = flat.values.device  # not `flat`: the optimizer would hold it in a cycle
            adamw.register_step_pre_hook(lambda optimizer, *_: _move_state(optimizer, device))
            adamw.register_step_post_hook(lambda optimizer, *_: _move_state(optimizer, torch.device("cpu")))
        return adamw
    bitsandbytes = import_bitsandbytes()

    of_name = {
        config.Optimizer.adamw_8bit: bitsandbytes.optim.AdamW8bit,
        config.Optimizer.paged_adamw: bitsandbytes.optim.PagedAdamW,
    }
    built: torch.optim.Optimizer = of_name[optim.name](groups, **settings)
    return built


def _move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the optimizer's state to a device. A step has no activations, so there is room for the state on a GPU."""
    for parameter in _parameters(optimizer):
        memory = optimizer.state[parameter]
        memory.update({name: value.to(device) for name, value in memory.items()})


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by group and name (`0.exp_avg`, `1.state1`), step counts as tensors."""
    return {
        f"{group}.{name}": _own(name, value)
        for group, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
    }


def _own(name: str, value: Tensor | int) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    # bitsandbytes' groups share one code table; tensors of a safetensors file must not share memory.
    return value.clone() if name.startswith("qmap") else value


def restore(optimizer: torch.optim.Optimizer, key: str, value: Tensor) -> None:
    """Set one of the tensors that `state` returned, in an optimizer that has taken no step."""
    number, _, name = key.partition(".")
    parameter = _parameters(optimizer)[int(number)]
    if parameter not in optimizer.state and hasattr(optimizer, "init_state"):
        # bitsandbytes: its buffers may be paged, so they are filled in place.
        optimizer.init_state(optimizer.param_groups[int(number)], parameter, int(number), 0)
    memory = optimizer.state[parameter]
    if name not in memory:
        memory[name] = value.to(parameter.device)
    elif isinstance(memory[name], Tensor):
        memory[name].copy_(value)
    else:
        memory[name] = value.item()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [group["params"][0] for group in optimizer.param_groups]


def state_bytes(num_parameters: int, name: config.Optimizer) -> int:
    """Return the size of an optimizer's state: two moments in fp32, or in 8 bits with a scale per 256 values."""
    if name is config.Optimizer.adamw_8bit:
        return 2 * num_parameters + 2 * 4 * math.ceil(num_parameters / 256)
    return 2 * 4 * num_parameters


def learning_rate(optim: config.Optim, step: int, num_steps: int) -> float:
    """Return the learning rate of 0-based `step` of `num_steps`.

    Warm-up gives lr (step + 1) / warmup_steps, so no step is taken with a learning rate of 0; afterwards
    progress = (step - warmup_steps) / (num_steps - warmup_steps) goes from 0 towards 1.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * _shape(optim, progress))


def _shape(optim: config.Optim, progress: float) -> float:
    """Return the schedule's factor, from 1 to 0, at a progress in [0, 1)."""
    match optim.schedule:
        case config.Schedule.constant:
            return 1.0
        case config.Schedule.linear:
            return 1 - progress
        case config.Schedule.cosine:
            return (1 + math.cos(math.pi * progress)) / 2
        case config.Schedule.wsd:
            return min(1.0, (1 - progress) / optim.decay_fraction)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_ratio"]


def clip(gradients: Tensor, max_norm: float) -> Tensor:
    """Return the gradient norm; scale the gradient to `max_norm` if its norm is larger and `max_norm` is above 0.

    As torch.nn.utils.clip_grad_norm_, with the same numbers: nothing is read from the device, and a gradient whose norm
    is not finite becomes NaN.
    """
    norm = torch.linalg.vector_norm(gradients)
    if max_norm > 0:
        gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
