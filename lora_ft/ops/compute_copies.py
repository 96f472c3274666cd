"""Copies of float32 parameters in the 16-bit dtype of computation, made once per optimizer step.

    with compute_copies(parameters, values, torch.bfloat16):    one cast of the flat tensor of all parameters
        compute_copy(a, torch.bfloat16)                         a view of it
    compute_copy(a, torch.bfloat16)                             outside of the block: a cast of this parameter

A step reads every matrix in the forward, in each recomputed forward and in the backward, of each micro-batch. Casting
at each use would add 1,300 kernel launches to a step of Llama-3.1-8B.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_lora_ft_compute_copy"


@contextlib.contextmanager
def compute_copies(parameters: Iterable[nn.Parameter], values: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Give each parameter, a view of the flat tensor `values`, a copy in `dtype` until the block ends.

    The parameters must not change inside the block.
    """
    if dtype == values.dtype:
        yield
        return
    found, copies = list(parameters), values.to(dtype)
    for parameter in found:
        copy = copies.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
        setattr(parameter, _ATTRIBUTE, copy)
    try:
        yield
    finally:
        for parameter in found:
            delattr(parameter, _ATTRIBUTE)


def compute_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter in `dtype`, without a gradient: its copy, the parameter itself, or a new cast."""
    if parameter.dtype == dtype:
        return parameter.detach()
    copy = getattr(parameter, _ATTRIBUTE, None)
    return copy if copy is not None and copy.dtype == dtype else parameter.detach().to(dtype)
