"""Run a model without holding its weights: each layer gets them from a function before it runs and drops them after.

model = AutoModelForCausalLM.from_config(config)     # built on the meta device
use_placeholders(model, "cuda")                      # tensors of one element, expanded to the right shape
with streamed(model, merged.__getitem__):            # merged["model.norm.weight"] returns that weight
    model(ids)
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
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


@contextlib.contextmanager
def streamed(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Fill each layer of a model of placeholders with the tensors that `read` returns by name, while the layer runs."""
    hooks: list[Any] = []

    def stream(prefix: str, layer: nn.Module) -> None:
        empty: list[tuple[dict[str, Any], str, Tensor]] = []

        def fill(*_: Any) -> None:
            for name, module in layer.named_modules(prefix=prefix):
                for held, key, tensor in _own_tensors(module):
                    empty.append((held, key, tensor))
                    full = read(f"{name}.{key}").to(device=tensor.device, dtype=tensor.dtype)
                    held[key] = nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full

        def clear(*_: Any) -> None:
            while empty:
                held, key, tensor = empty.pop()
                held[key] = tensor

        hooks.append(layer.register_forward_pre_hook(fill))
        hooks.append(layer.register_forward_hook(clear, always_call=True))

    for name, layer in _layers(model):
        stream(name, layer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that have tensors of their own, by name."""
    if _own_tensors(module):
        yield name, module
    else:
        for key, child in module.named_children():
            yield from _layers(child, f"{name}.{key}" if name else key)
