"""The device that code computes for: that of a tensor or, for tensors without values, the one that they stand for.

    target(torch.device("cuda:0"))     Target("cuda", (8, 9), has_flash=True)
    with standing_for(GPU):            a trace (memory/trace.py) runs the code for a GPU on the meta device
        target(torch.device("meta"))   GPU

Code that takes another form on a GPU asks `target(x.device).kind`, not `x.device.type`.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """Kind of a device: cpu, cuda, mps or meta; of a CUDA device also its compute capability and flash attention."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    has_flash: bool = False


GPU = Target("cuda", (8, 0), has_flash=True)  # a GPU with bfloat16, for traces where there is none
CPU = Target("cpu")
_META = Target("meta")

_standing_for: ContextVar[Target] = ContextVar("standing_for", default=_META)


def target(device: torch.device) -> Target:
    """Return the target of a device; of the meta device the one that `standing_for` has set."""
    return _standing_for.get() if device.type == "meta" else _target_of(device)


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device. The host does not wait for a GPU: torch keeps pinned memory until then."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=target(device).kind == "cuda")


@contextlib.contextmanager
def standing_for(chosen: Target) -> Iterator[None]:
    """Let the meta device stand for another device until the block ends."""
    token = _standing_for.set(chosen)
    try:
        yield
    finally:
        _standing_for.reset(token)


@functools.cache
def _target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(device.type)
    return Target("cuda", torch.cuda.get_device_capability(device), torch.backends.cuda.is_flash_attention_available())
