"""Let a model's norms, MLPs and rotary attentions keep less while they train; everything else stays its own.

module.forward(x)    gradients wanted, weights frozen -> ops.norm, ops.mlp, ops.rope: same value and gradients
                     anything else (evaluation, generation, a norm that trains) -> transformers' forward

Only `forward` of single modules is replaced, of classes that are tested (layer norms and GELUs are torch's and
transformers' own, the same in every architecture): no class, no function and no state changes. Most of the memory
won is inputs of LoRA layers, which take their recipes (`ops.recipe`).
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.mlp import gelu
from lora_ft.ops.norm import layer_norm

Forward = Callable[..., Any]

_LLAMA_LIKE = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROTATION = "apply_rotary_pos_emb"


def _classes(suffix: str, families: dict[str, str]) -> set[str]:
    return {f"transformers.models.{f}.modeling_{f}.{name}{suffix}" for f, name in families.items()}


_RMS_NORMS = _classes("RMSNorm", _LLAMA_LIKE)
_GATED_MLPS = _classes("MLP", _LLAMA_LIKE)
_ATTENTIONS = _classes("Attention", _LLAMA_LIKE | {"gpt_neox": "GPTNeoX"})


def use_fast_blocks(model: nn.Module, *, norm: bool, mlp: bool, rope: bool, kernels: Kernels = OWN) -> list[str]:
    """Replace the forward of every block that can be; says how many, and which stay plain.

    `norm`, `mlp` and `rope` are the settings `fast.*`. A block replaced before, here or by others, is left alone.
    """
    wanted = {"norm": norm, "mlp": mlp, "rope": rope}
    replaced, unknown = Counter[str](), Counter[str]()
    for module in model.modules():
        kind, forward = _fast_forward(module, kernels)
        if not kind or not wanted[kind] or "forward" in vars(module):
            continue
        if forward is None:
            unknown[type(module).__name__] += 1
            continue
        replaced[kind] += 1
        # Partial objects all the way: a deep copy of the module (PEFT's modules_to_save) computes with its own weights.
        module.forward = partial(_forward, module, module.forward, forward)
    lines = [f"plain {kind}: fast.{kind}=false" for kind, on in wanted.items() if not on]
    if counts := [f"{replaced[kind]} {kind}" for kind in wanted if replaced[kind]]:
        lines.append(f"{', '.join(counts)} blocks keep less while training")
    return lines + [f"{count} blocks compute as transformers does: {name}" for name, count in unknown.items()]


def _forward(module: Any, plain: Forward, fast: Forward, *arguments: Any, **options: Any) -> Any:
    # Only norms have parameters of their own; whether projections below train is theirs to know.
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return (fast if torch.is_grad_enabled() and not trains else plain)(*arguments, **options)


def _fast_forward(module: Any, kernels: Kernels) -> tuple[str, Forward | None]:
    """The setting that a block belongs to, empty for no such block; its forward, None where the class is not tested."""
    kind, name = type(module), f"{type(module).__module__}.{type(module).__qualname__}"
    if name in _RMS_NORMS:
        return "norm", partial(_rms_norm, module, kernels)
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "norm", partial(_layer_norm, module)
    if name in _GATED_MLPS and isinstance(module.act_fn, nn.SiLU | activations.SiLUActivation):
        return "mlp", partial(_gated_mlp, module, kernels)
    if approximate := _approximation(module):
        return "mlp", partial(gelu, approximate=approximate)
    if _ROTATION in _names_in(kind.forward):
        return "rope", _rotating(module, kernels) if name in _ATTENTIONS else None
    if name.endswith("Norm"):
        return "norm", None
    if name.endswith("MLP") and not any(_approximation(child) for child in module.children()):
        return "mlp", None
    return "", None


def _rms_norm(module: Any, kernels: Kernels, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # transformers rounds to float32 inside even then, and would elsewhere than we do
        plain: Tensor = type(module).forward(module, x)
        return plain
    return kernels.rms_norm(x, module.weight, module.variance_epsilon)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module.eps)


def _gated_mlp(module: Any, kernels: Kernels, x: Tensor) -> Tensor:
    product: Tensor = module.down_proj(kernels.swiglu(module.gate_proj(x), module.up_proj(x)))
    return product


def _approximation(module: nn.Module) -> str:
    """Which of torch's GELUs an activation is; empty for another function."""
    if type(module) is activations.NewGELUActivation:
        return "tanh"
    if type(module) is activations.GELUActivation and module.act is nn.functional.gelu:
        return "none"
    return ""


def _names_in(function: Any) -> tuple[str, ...]:
    """The names that a function's code looks up; empty for what is no plain function."""
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _rotating(attention: nn.Module, kernels: Kernels) -> Forward:
    """The class's own forward, to which one name means our rotation.

    transformers rotates through a function of its module. Other models use it too, so it is not replaced
    there: this is the same code over a copy of the module's names.
    """
    own: Any = type(attention).forward
    names = {**own.__globals__, _ROTATION: partial(_rotate_both, kernels, own.__globals__[_ROTATION])}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copy, attention)


def _rotate_both(
    kernels: Kernels, plain: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    if not q.dtype == k.dtype == cos.dtype:
        turned: tuple[Tensor, Tensor] = plain(q, k, cos, sin)
        return turned
    return kernels.rotate(q, k, cos, sin)
