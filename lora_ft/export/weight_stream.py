"""Run a model without holding its weights: each layer gets them from a function before it runs and drops them after.

model = AutoModelForCausalLM.from_config(config)     # built on the meta device
use_placeholders(model, "cuda")                      # tensors of one element, expanded to the right shape
with streamed(model, merged.__getitem__):            # merged["model.norm.weight"] returns that weight
    model(ids)

Code outside of a layer may use its weight: Lfm2 does so with the filter of a convolution, Gemma 3n with embeddings. A
placeholder that an operation gets is therefore read for this operation.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel


def use_placeholders(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Move a model from the meta device to `device` without its weights: each is one zero, expanded to its shape.

    Unlike on the meta device, PEFT can create and load adapters. Buffers that are not saved, such as rotary
    frequencies, are computed. Ties are kept.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = torch.empty_like(buffer, device=device)
    with torch.device(device):
        model.initialize_weights()  # does nothing for weights on the meta device
    seen: dict[int, Any] = {}
    for module in model.modules():
        for held, key, tensor in _own_tensors(module):
            empty = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            placeholder = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
            held[key] = seen.setdefault(id(tensor), placeholder)


def _own_tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return a module's own parameters and saved buffers: the dictionary that holds each, its key, the tensor."""
    skipped = module._non_persistent_buffers_set
    held: list[tuple[dict[str, Any], str, Any]] = [(module._parameters, k, p) for k, p in module._parameters.items()]
    held += [(module._buffers, k, b) for k, b in module._buffers.items() if k not in skipped]
    return [(where, key, tensor) for where, key, tensor in held if tensor is not None]


# What code asks a tensor for without its values.
_OF_SHAPE = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.element_size,
    Tensor.untyped_storage, Tensor.__len__, Tensor.__hash__,
}  # fmt: skip


class _Unread(Tensor):
    """A placeholder that is read when an operation uses its values."""

    read: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _OF_SHAPE:
                args, kwargs = tree_map_only(_Unread, lambda tensor: tensor.read(), (args, kwargs or {}))
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def streamed(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Fill each layer of a model of placeholders with the tensors that `read` returns by name, while the layer runs."""
    hooks: list[Any] = []
    own = [(held, key, t, f"{n}.{key}") for n, module in model.named_modules() for held, key, t in _own_tensors(module)]

    def full(name: str, like: Tensor) -> Tensor:
        return read(name).to(device=like.device, dtype=like.dtype)

    def stream(layer: nn.Module) -> None:
        inside = {id(module._parameters) for module in layer.modules()} | {id(m._buffers) for m in layer.modules()}
        tensors = [entry for entry in own if id(entry[0]) in inside]

        def fill(*_: Any) -> None:
            for held, key, tensor, name in tensors:
                value = full(name, tensor)
                held[key] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

        def clear(*_: Any) -> None:
            for held, key, tensor, name in tensors:
                held[key] = _unread(tensor, functools.partial(full, name, tensor))

        hooks.append(layer.register_forward_pre_hook(fill))
        hooks.append(layer.register_forward_hook(clear, always_call=True))
        clear()

    for layer in _layers(model):
        stream(layer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for held, key, tensor, _ in own:
            held[key] = tensor


def _unread(tensor: Tensor, read: Callable[[], Tensor]) -> Tensor:
    made = torch.Tensor._make_subclass(_Unread, tensor.detach())
    made.read = read
    return made


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that have tensors of their own."""
    if _own_tensors(module):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)
