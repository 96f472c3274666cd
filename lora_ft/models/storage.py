"""Keep less of a loaded base in memory; nothing that is computed changes, not by a bit.

    exact_bfloat16   float32 weights whose values are bfloat16's (a bfloat16 checkpoint, computed in float32)
                     -> half the bytes, made float32 again by each product
    leave_file       weights that are still parts of the mapped file
                     -> copies, so that the file's other pages leave the process

The embedding, the head and the norms stay as they are: other code than their own forward reads them.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.ops.weights import frozen_linear, frozen_weight


def exact_bfloat16(model: PreTrainedModel, modules_to_save: Collection[str] = ()) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield the frozen linear layers whose weights bfloat16 holds exactly, each with that weight.

    An attached adapter's layers stay, and so does every layer that `modules_to_save` names, or inside of one: it
    will be trained in full. The caller replaces weight after weight, so that only one copy exists beside the model.
    """
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    head = model.get_output_embeddings()
    in_head = set(head.modules()) if head is not None else set()  # with an adapter, the head is a part of its layer
    for name, module in list(model.named_modules()):
        layer: Any = module
        if type(layer) not in (nn.Linear, Conv1D) or layer in in_head:
            continue
        if any(part.startswith(("lora_", "modules_to_save")) for part in name.split(".")):
            continue
        shared = holders[id(layer.weight)] > 1
        if shared or layer.weight.requires_grad or any(f".{part}." in f".{name}." for part in modules_to_save):
            continue
        narrow = _narrow(layer.weight.detach())
        if narrow is not None:
            yield layer, narrow


def _narrow(weight: Tensor) -> Tensor | None:
    """Return the weight in bfloat16, or None if that would lose a bit."""
    if weight.dtype != torch.float32:
        return None
    # Most bases are either bfloat16 throughout or not at all: one row tells, for nothing.
    for part in (weight[:1], weight):
        narrow = part.to(torch.bfloat16)
        if not torch.equal(narrow.float().view(torch.int32), part.view(torch.int32)):
            return None
    return narrow


def stored_forward(layer: Any, inputs: Tensor) -> Tensor:
    """Multiply with the weight upcast to `layer.compute_dtype`."""
    weight = frozen_weight(layer, layer.compute_dtype)
    assert weight is not None  # compute_dtype is what it asks for
    return frozen_linear(inputs, weight, layer.bias)


def give_back_freed_memory() -> None:
    """Let glibc return the holes between the new weights, too small for activations; a no-op elsewhere.

    Without it SmolLM2-135M peaks 0.2 GB above the model with full weights, with it 0.16 GB below.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def leave_file(model: PreTrainedModel) -> None:
    """Copy what a quantized model on the CPU still reads from the mapped file, its embedding and norms.

    Those few keep the whole file mapped, and the pages that were read to be quantized in the process: for
    SmolLM2-135M 538 MB, where the copy takes 114. An unquantized model is its file: leave it there.
    """
    for parameter in model.parameters():
        if parameter.is_cpu and parameter.is_floating_point():
            parameter.data = parameter.data.clone()
