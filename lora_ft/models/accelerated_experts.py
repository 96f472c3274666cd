"""Make forwards of frozen experts that keep less for the backward (ops/experts.py).

experts.forward(x, index, scores)    gradients enabled, weights frozen, on a CPU -> ops/experts.py
                                     anything else                              -> transformers' forward

On a GPU, experts in 16 bits stay with transformers' grouped products, for which the host need not know how many tokens
each expert has. Quantized experts are computed by ops/experts.py on every device (models/quantize_experts.py).

A class is compared with its own forward on a small copy with random weights, as in models/accelerated_blocks.py.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.models.accelerated_blocks import Forward, agree, drawn_tensor
from lora_ft.ops import expert_codes
from lora_ft.ops.device import target
from lora_ft.ops.experts import is_experts, module_experts, parameter_names

_OUTER, _INNER, _EXPERTS = 8, 16, 4  # sizes of the copy that is compared


def fast_forwards(model: nn.Module, *, check: bool = True) -> tuple[dict[nn.Module, Forward], list[str]]:
    """Return the fast forward of all experts that are not quantized and have one, and log lines."""
    forwards: dict[nn.Module, Forward] = {}
    equal: dict[type, bool] = {}
    for module in filter(_is_candidate, model.modules()):
        if not check or computes_as_its_class(module, equal):
            forwards[module] = partial(_forward, module, module.forward)
    lines = [f"accelerated experts: {len(forwards)}"] if forwards else []
    plain = [each.__name__ for each, is_equal in equal.items() if not is_equal]
    return forwards, lines + [f"experts compute as transformers does: {name}" for name in plain]


def _is_candidate(module: Any) -> bool:
    if not is_experts(module) or "forward" in vars(module):
        return False
    parameter = module._parameters.get(parameter_names(module)[0])
    if parameter is None or expert_codes.is_quantized(parameter):
        return False
    return target(parameter.device).kind == "cpu"


def _forward(module: Any, plain: Forward, *given: Any) -> Any:
    # PEFT's wrapper takes a parameter away while it adds its update to it.
    is_frozen = all(name in module._parameters for name in parameter_names(module)) and not any(
        parameter.requires_grad for parameter in module.parameters(recurse=False)
    )
    return module_experts(module, *given) if is_frozen and torch.is_grad_enabled() else plain(*given)


def computes_as_its_class(module: Any, known: dict[type, bool]) -> bool:
    """Compare `module_experts` with the forward of the module's class, on a small copy with random weights.

    `known` holds the results by class. A module without values is not compared.
    """
    if type(module) not in known:
        known[type(module)] = module._parameters[parameter_names(module)[0]].is_meta or _is_equal(module)
    return known[type(module)]


def _is_equal(module: Any) -> bool:
    parameter = module._parameters[parameter_names(module)[0]]
    dtype = expert_codes.dtype_of(parameter) if expert_codes.is_quantized(parameter) else parameter.dtype
    dtypes = (torch.float32, dtype) if dtype in (torch.bfloat16, torch.float16) else (torch.float32,)
    generator = torch.Generator().manual_seed(0)
    return all(_is_equal_for(module, partial(drawn_tensor, generator, parameter.device, each)) for each in dtypes)


def _is_equal_for(module: Any, drawn: Callable[..., Tensor]) -> bool:
    small, (first, second) = copy.copy(module), parameter_names(module)
    inner = 2 * _INNER if module.has_gate else _INNER
    parameters = {first: drawn(_EXPERTS, inner, _OUTER), second: drawn(_EXPERTS, _OUTER, _INNER)}
    if module.is_transposed:
        parameters = {name: weight.transpose(1, 2).contiguous() for name, weight in parameters.items()}
    if module.has_bias:
        parameters |= {f"{first}_bias": drawn(_EXPERTS, inner), f"{second}_bias": drawn(_EXPERTS, _OUTER)}
    vars(small).update(_parameters=parameters, num_experts=_EXPERTS)
    index = torch.tensor([[0, 2], [2, 1], [1, 0]], device=parameters[first].device)  # and none for the last expert
    return agree(
        lambda x, scores: type(module).forward(small, x, index, scores),
        lambda x, scores: module_experts(small, x, index, scores),
        (drawn(3, _OUTER), drawn(3, 2)),
    )
