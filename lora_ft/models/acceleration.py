"""Replace forwards of a base and of an adapter by faster ones, in a fixed order, and restore all of them.

    accelerate             1 storage      linear weights in bfloat16 if that keeps every bit (fast.storage)
      (a frozen base)      2 blocks       norms, MLPs, experts, rotations that keep less (fast.norm, mlp, rope)
                           3 attention    within packed documents (fast.attention), paths of the loss (fast.loss)
    accelerated_lora       4 LoRA layers  a linear layer, or experts, and their LoRA as one function (fast.lora)
    dequantized_weights    5 generation   weights that are stored small are dequantized once

Steps 1-3 are checked on the loaded base (models/self_check.py, accelerated_blocks.py, accelerated_experts.py). A step
that would change a number is switched off, and the reason is logged. No list of model families is involved. No other
module assigns to a forward.

    with accelerated(model, cfg.fast) as chosen:
        token_loss_sum(model, batch, chosen.paths)
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.io.allocator import release_freed_memory
from lora_ft.models import accelerated_blocks, accelerated_experts, path_choice, self_check, storage
from lora_ft.models import accelerated_lora as lora_layers
from lora_ft.ops.compute_copies import copied_by_layer
from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths

if TYPE_CHECKING:
    from peft import PeftModel

Forward = Callable[..., Any]


@dataclass
class Accelerated:
    """The state of an accelerated base: the paths of its loss, and log lines that describe what was chosen."""

    paths: Paths = PLAIN_PATHS
    reasons: list[str] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)

    def restore(self) -> None:
        """Restore every forward, the attention implementation and the storage, in reverse order."""
        self._undo.close()


def accelerate(
    model: PreTrainedModel,
    fast: config.Fast,
    kernels: Kernels = OWN,
    modules_to_save: Collection[str] = (),
    *,
    check: bool = True,
) -> Accelerated:
    """Accelerate a frozen base as `fast` selects, as far as no number changes by more than rounding.

    `kernels` comes from `choose_kernels`. Modules in `modules_to_save` keep their storage: those that are trained
    in full, and layers that PEFT adapts as parameters, to which it adds the update in their dtype.
    `check=False` is for tensors without values (fake tensors): everything that `fast` selects is used unchecked.
    """
    made = Accelerated()
    try:
        # Rejected attempts may warn. With warnings as errors, the warning would decide instead of the numbers.
        with warnings.catch_warnings(action="ignore"):
            _accelerate(made, model, fast, kernels, modules_to_save, check)
    except BaseException:
        made.restore()
        raise
    return made


@contextlib.contextmanager
def accelerated(
    model: PreTrainedModel, fast: config.Fast, kernels: Kernels = OWN, modules_to_save: Collection[str] = ()
) -> Iterator[Accelerated]:
    """Accelerate a base until the block ends; see `accelerate`."""
    made = accelerate(model, fast, kernels, modules_to_save)
    try:
        yield made
    finally:
        made.restore()


@contextlib.contextmanager
def accelerated_lora(model: "PeftModel", name: str, fast: config.Fast) -> Iterator[list[str]]:
    """Replace the forwards of adapter `name` until the block ends; yield log lines about layers that stay plain."""
    if not fast.lora:
        yield ["plain lora: fast.lora=false"]
        return
    found = lora_layers.fast_forwards(model, name)
    copied = copied_by_layer(lora_layers.matrices_by_layer(model, name), found.dtype)
    with replaced_forwards(found.forwards), copied, ExitStack() as undo:
        for layer, loss in found.head_losses.items():
            _replace(undo, layer, loss, "token_loss_sum")
        yield found.reasons


@contextlib.contextmanager
def dequantized_weights(model: nn.Module) -> Iterator[None]:
    """Let layers on the CPU with small weights multiply by dequantized copies until the block ends."""
    with replaced_forwards(storage.dequantized_forwards(model)):
        yield


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model use transformers' attention, as generation needs, until the block ends."""
    undo = path_choice.set_attention(model, path_choice.plain_name(model))
    try:
        yield
    finally:
        undo()


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of single modules until the block ends."""
    with ExitStack() as undo:
        for module, forward in forwards.items():
            _replace(undo, module, forward)
        yield


def _replace(undo: ExitStack, module: nn.Module, value: Forward, name: str = "forward") -> None:
    """Set an attribute of a module, and add to `undo` a callback that restores it."""
    undo.callback(_restore_attribute, module, name, vars(module).get(name))
    setattr(module, name, value)


def _restore_attribute(module: nn.Module, name: str, before: Forward | None) -> None:
    delattr(module, name)
    if before is not None:
        setattr(module, name, before)


def _accelerate(
    made: Accelerated,
    model: PreTrainedModel,
    fast: config.Fast,
    kernels: Kernels,
    modules_to_save: Collection[str],
    check: bool,
) -> None:
    reference = None
    if check:
        with plain_attention(model):
            reference, failure = self_check.make_reference(model)
        if reference is None:
            made.reasons.append(f"plain paths, one row per forward pass: {failure}")
            return
    if not fast.storage:
        made.reasons.append("plain storage: fast.storage=false")
    elif saved_bytes := _store(made._undo, model, modules_to_save):
        with plain_attention(model):
            same = reference is None or self_check.is_same(model, reference)
        if same:
            made.reasons.append(f"weights stored in bfloat16, which keeps every bit: {saved_bytes / 1e9:.2f} GB less")
        else:
            made.restore()
            made.reasons.append("plain storage: this model computes other numbers with weights stored in bfloat16")
    forwards, lines = accelerated_blocks.fast_forwards(model, fast, kernels, check=check)
    if fast.mlp:
        of_experts, more = accelerated_experts.fast_forwards(model, check=check)
        forwards, lines = forwards | of_experts, lines + more
    blocks = ExitStack()
    made._undo.callback(blocks.close)
    for module, forward in forwards.items():
        _replace(blocks, module, forward)
    made._undo.callback(path_choice.set_attention(model, model.config._attn_implementation))
    made.paths, problem, chosen = path_choice.choose_paths(model, fast, reference)
    if problem and forwards:
        blocks.close()
        forwards, lines = {}, [f"all blocks compute as transformers does: {problem}"]
        made.paths, problem, chosen = path_choice.choose_paths(model, fast, reference)
    if problem:
        chosen = [f"plain paths, one row per forward pass: {problem}"]
    made.reasons += [*chosen, *lines]
    if forwards and kernels is not OWN:
        made.reasons.append(f"norm, gated activation and rotary embedding by {kernels.name}")


def _store(undo: ExitStack, model: PreTrainedModel, modules_to_save: Collection[str]) -> int:
    """Store weights in bfloat16 if that keeps every bit; return the number of bytes saved."""
    saved = 0
    for module, narrow in storage.exact_bfloat16(model, modules_to_save):
        layer: Any = module
        saved += layer.weight.nbytes - narrow.nbytes
        undo.callback(_widen, layer)
        layer.weight.data = narrow
        # The attribute's name is bitsandbytes': PEFT reads it, and so creates the adapter's matrices in float32.
        layer.compute_dtype = torch.float32
        _replace(undo, layer, functools.partial(storage.stored_forward, layer))
    if saved:
        release_freed_memory()
    return saved


def _widen(layer: Any) -> None:
    layer.weight.data = layer.weight.detach().to(torch.float32)
    vars(layer).pop("compute_dtype", None)
