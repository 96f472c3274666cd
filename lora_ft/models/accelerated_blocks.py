"""Make forwards of norms, MLPs and rotary attentions that keep less for the backward.

module.forward(x)    gradients enabled, weights frozen -> ops.norm, ops.mlp, ops.rope: same value and gradients
                     anything else (evaluation, generation, a norm that trains) -> transformers' forward

The structure of a block decides whether it is a candidate. The fast form of each candidate class is then compared
with the class's own forward: value and input gradient, on a small copy with random weights, in float32 and in the
model's dtype if that is half precision. So the size and quantization of the loaded weights cannot hide a difference.
Forms are tried in order: the chosen kernels, then the eager ones. A class that none of them equals stays plain.

This module only makes forwards. models/acceleration.py installs them.
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

from lora_ft import config
from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.mlp import gelu
from lora_ft.ops.norm import layer_norm

Forward = Callable[..., Any]
Form = Callable[[Any, Kernels], Forward]

_ROTATION = "apply_rotary_pos_emb"


class Gated(NamedTuple):
    """Names of the parts of a gated MLP; without `up`, the first layer has the rows of both, gate first."""

    gate: str
    up: str | None
    down: str
    act: str | None  # None: SiLU, as a function in the forward


_GATED = (
    Gated("gate_proj", "up_proj", "down_proj", "act_fn"),
    Gated("gate_up_proj", None, "down_proj", "activation_fn"),  # Phi 3, GLM
    Gated("input_linear", None, "output_linear", "activation"),  # shared experts of Granite
    Gated("w1", "w3", "w2", None),  # LFM2
)
# For values and gradients, relative to their norms. A rounding to half precision is a third of its tolerance at most.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}
_HEAD_WIDTH = 16


def fast_forwards(
    model: nn.Module, fast: config.Fast, kernels: Kernels, *, check: bool = True
) -> tuple[dict[nn.Module, Forward], list[str]]:
    """Return the fast forward of every block that has one, and log lines.

    Skips blocks whose forward is replaced already. Without `check`, candidates are not compared.
    """
    wanted = {"norm": fast.norm, "mlp": fast.mlp, "rope": fast.rope}
    forwards: dict[nn.Module, Forward] = {}
    replaced, plain, eager = Counter[str](), Counter[str](), Counter[str]()
    chosen: dict[Any, tuple[Form, Kernels] | None] = {}
    dtype = getattr(model, "dtype", torch.float32)
    for module in model.modules():
        setting, forms = _candidate(module)
        if not setting or not wanted[setting] or "forward" in vars(module):
            continue
        key = _rotation_of(module) if setting == "rope" and forms else (type(module), _activation(module), len(forms))
        if key not in chosen:
            options = [(form, each) for each in dict.fromkeys((kernels, OWN)) for form in forms]
            equal = (option for option in options if not check or _is_equal(setting, module, *option, dtype))
            chosen[key] = next(equal, None)
        found = chosen[key]
        if found is None:
            plain[type(module).__name__] += 1
            continue
        form, used = found
        replaced[setting] += 1
        eager[type(module).__name__] += used is not kernels
        # Only partial objects: a deep copy of the module (PEFT's modules_to_save) computes with its own weights.
        forwards[module] = partial(_forward, module, module.forward, form(module, used))
    lines = [f"plain {setting}: fast.{setting}=false" for setting, on in wanted.items() if not on]
    if counts := [f"{replaced[setting]} {setting}" for setting in wanted if replaced[setting]]:
        lines.append(f"accelerated blocks: {', '.join(counts)}")
    lines += [f"{n} blocks with eager kernels, since {kernels.name} differs: {name}" for name, n in eager.items() if n]
    return forwards, lines + [f"{count} blocks compute as transformers does: {name}" for name, count in plain.items()]


def _forward(module: Any, plain: Forward, fast: Forward, *arguments: Any, **options: Any) -> Any:
    # Only norms have parameters of their own. Projections inside of a block handle their own training.
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return (fast if torch.is_grad_enabled() and not trains else plain)(*arguments, **options)


def _candidate(module: Any) -> tuple[str, list[Form]]:
    """Return the setting that controls a block ("" if none), and functions that make its fast forward."""
    cls = type(module)
    if cls is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "norm", [lambda layer, _: partial(_layer_norm, layer)]
    if _is_rms_norm(module):
        # Weights of norms are multiplied as they are, or after adding 1 in families such as Gemma.
        # Cohere's are layer norms without a bias.
        return "norm", [*(partial(_rms_norm_form, offset=offset) for offset in (0.0, 1.0)), _centered_form]
    if activation := _activation(module):
        return "mlp", [_gated_form if _parts(module) else lambda *_: partial(gelu, activation=activation)]
    if _ROTATION in _names_in(cls.forward):
        return "rope", [_rotating]
    if cls.__name__.endswith("Norm"):
        return "norm", []
    if cls.__name__.endswith("MLP") and not any(_activation(child) for child in module.children()):
        return "mlp", []
    return "", []


def _activation(module: Any) -> str:
    """Return the name in ops/mlp of the activation of a gated MLP, or of a GELU itself; "" for another module."""
    if parts := _parts(module):
        act = getattr(module, parts.act) if parts.act else None
        return "silu" if act is None or isinstance(act, nn.SiLU | activations.SiLUActivation) else _activation(act)
    if type(module) is activations.NewGELUActivation:
        return "gelu_tanh"
    act = getattr(module, "act", None)
    if type(module) is activations.GELUTanh and isinstance(act, partial) and act.func is nn.functional.gelu:
        return "gelu_tanh"
    return "gelu" if type(module) is activations.GELUActivation and act is nn.functional.gelu else ""


def _parts(module: Any) -> Gated | None:
    """Return the parts of a gated MLP, None for another module."""
    names = module._modules.keys()
    return next((parts for parts in _GATED if names == {name for name in parts if name}), None)


def _is_rms_norm(module: Any) -> bool:
    own = module._parameters
    return (
        type(module).__name__.endswith("Norm")
        and own.keys() == {"weight"}
        and not module._modules
        and not module._buffers
        and own["weight"].ndim == 1
        and isinstance(_epsilon(module), float)
    )


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _rms_norm_form(layer: Any, kernels: Kernels, offset: float) -> Forward:
    return partial(_rms_norm, layer, kernels, offset)


def _rms_norm(module: Any, kernels: Kernels, offset: float, x: Tensor) -> Tensor:
    # transformers rounds to float32 even in float64, and model families cast mixed dtypes at different points.
    if x.dtype == torch.float64 or x.dtype != module.weight.dtype:
        plain: Tensor = type(module).forward(module, x)
        return plain
    return kernels.rms_norm(x, module.weight, _epsilon(module), offset)


def _centered_form(layer: Any, _: Kernels) -> Forward:
    return partial(_centered_norm, layer)


def _centered_norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or x.dtype != module.weight.dtype:
        plain: Tensor = type(module).forward(module, x)
        return plain
    return layer_norm(x, module.weight, None, _epsilon(module))


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module.eps)


def _gated_form(layer: Any, kernels: Kernels) -> Forward:
    return partial(_gated_mlp, layer, kernels, _activation(layer), _parts(layer))


def _gated_mlp(module: Any, kernels: Kernels, activation: str, parts: Any, x: Tensor) -> Tensor:
    first = getattr(module, parts.gate)(x)
    gate, up = (first, getattr(module, parts.up)(x)) if parts.up else first.chunk(2, dim=-1)
    product: Tensor = getattr(module, parts.down)(kernels.gated(gate, up, activation))
    return product


def _names_in(function: Any) -> tuple[str, ...]:
    """Return the names that a function's code looks up; empty if it is not a plain Python function."""
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _rotation_of(attention: nn.Module) -> Any:
    own: Any = type(attention).forward
    return own.__globals__[_ROTATION]


def _rotating(attention: nn.Module, kernels: Kernels) -> Forward:
    """Return the class's own forward with our rotation instead of transformers' `apply_rotary_pos_emb`.

    That function is a global of the class's module, which other models share. So it is not replaced there: the result
    is the same code with a copy of the module's globals.
    """
    own: Any = type(attention).forward
    names = {**own.__globals__, _ROTATION: partial(_rotate_both, kernels, own.__globals__[_ROTATION])}
    copied = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copied, attention)


def _rotate_both(kernels: Kernels, plain: Forward, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    # A call that differs from those compared (more arguments, other shapes) uses the family's own function.
    if not options and len(arguments) == 4 and all(isinstance(each, Tensor) for each in arguments):
        q, k, cos, sin = arguments
        one_dtype = q.dtype == k.dtype == cos.dtype == sin.dtype
        if one_dtype and q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape[1] == q.shape[2] == k.shape[2]:
            return kernels.rotate(q, k, cos, sin)
    rotated: tuple[Tensor, Tensor] = plain(*arguments, **options)
    return rotated


def _is_equal(setting: str, module: Any, form: Form, kernels: Kernels, dtype: torch.dtype) -> bool:
    """Compare a block's forward with its fast form on a small random copy, in float32 and a half-precision `dtype`."""
    if isinstance(module, nn.LayerNorm) or (_activation(module) and not _parts(module)):
        return True  # torch's own functions
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtypes = (torch.float32, dtype) if dtype in (torch.bfloat16, torch.float16) else (torch.float32,)
    drawn = (partial(drawn_tensor, torch.Generator().manual_seed(0), device, each) for each in dtypes)
    return all(_is_equal_for(setting, module, form, kernels, draw) for draw in drawn)


def _is_equal_for(setting: str, module: Any, form: Form, kernels: Kernels, drawn: Callable[..., Tensor]) -> bool:
    if setting == "rope":
        rotation = _rotation_of(module)
        return _is_same_rotation(rotation, kernels, drawn, _HEAD_WIDTH) and (
            not _rotates_in_part(rotation, drawn) or _is_same_rotation(rotation, kernels, drawn, _HEAD_WIDTH // 2)
        )
    small = copy.copy(module)
    if setting == "norm":
        width = len(module.weight)
        vars(small)["_parameters"] = {"weight": drawn(width)}
    else:
        width, parts = 8, _parts(module)
        assert parts is not None
        shapes = {parts.gate: (16, 8) if parts.up else (32, 8), parts.up: (16, 8), parts.down: (8, 16)}
        shapes.pop(None, None)
        layers = {name: _linear(drawn(*shape), drawn(shape[0])) for name, shape in shapes.items()}
        vars(small)["_modules"] = {name: layers.get(name, child) for name, child in module._modules.items()}
    plain = partial(type(module).forward, small)
    return agree(plain, form(small, kernels), (drawn(2, 3, width),))


def _rotates_in_part(rotation: Forward, drawn: Callable[..., Tensor]) -> bool:
    """Return False if a rotation cannot broadcast cos and sin of half a head: its models rotate whole heads."""
    q, k, cos, sin = _rotation_inputs(drawn, _HEAD_WIDTH // 2)
    try:
        rotation(q, k, cos, sin)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return not isinstance(error, RuntimeError)  # after any other error the comparison fails, and rope stays plain
    return True


def _is_same_rotation(rotation: Forward, kernels: Kernels, drawn: Callable[..., Tensor], width: int) -> bool:
    """Compare a family's rotation with ours, for cos and sin of `width` columns."""
    q, k, cos, sin = _rotation_inputs(drawn, width)
    # Clones: Liger's kernel overwrites its input.
    return agree(
        lambda q, k: rotation(q, k, cos, sin), lambda q, k: kernels.rotate(q.clone(), k.clone(), cos, sin), (q, k)
    )


def _rotation_inputs(drawn: Callable[..., Tensor], width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angles = drawn(1, 3, width // 2).repeat(1, 1, 2)
    return drawn(1, 4, 3, _HEAD_WIDTH), drawn(1, 2, 3, _HEAD_WIDTH), angles.cos(), angles.sin()


def drawn_tensor(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def _linear(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight.data, layer.bias.data = weight, bias
    return layer.requires_grad_(False)


@torch.enable_grad()
def agree(plain: Forward, fast: Forward, inputs: tuple[Tensor, ...]) -> bool:
    """Return True if two functions give the same tensors and the same gradients for their inputs."""
    found = []
    for function in (plain, fast):
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            results = function(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            total = sum(
                (r.float() * torch.linspace(-1, 2, r.numel(), device=r.device).view(r.shape)).sum() for r in results
            )
            found.append([*results, *torch.autograd.grad(total, leaves)])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # for example another signature: the two are not the same, whatever the error
            return False
    return len(found[0]) == len(found[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool((a - b).norm() <= _TOLERANCE[a.dtype] * a.norm())
        for a, b in zip(*found, strict=True)
    )
