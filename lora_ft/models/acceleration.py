"""The one module that replaces forwards, in one order, and gives every one of them back.

    accelerate             1 storage      linear weights in bfloat16 where that keeps every bit (fast.storage)
      (a frozen base)      2 blocks       norms, MLPs, rotations that keep less (fast.norm, mlp, rope)
                           3 attention    within packed documents (fast.attention), paths of the loss (fast.loss)
    accelerated_lora       4 LoRA layers  a linear layer and its LoRA as one function (fast.lora)
      (one adapter)        5 int8 layers  keep no input
    dequantized_weights    6 generation   weights that are stored small are made once

Steps 1-3 are checked on the loaded base (models/self_check.py, models/accelerated_blocks.py). What would change a
number is switched off, and the reason is logged. No list of families decides.

    with accelerated(model, cfg.fast) as chosen:
        token_loss_sum(model, batch, chosen.paths)
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models import accelerated_blocks, path_choice, self_check, storage
from lora_ft.models import accelerated_lora as lora_layers
from lora_ft.ops.dequantized import dequantized_forwards
from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths

if TYPE_CHECKING:
    from peft import PeftModel

Undo = Callable[[], None]
Forward = Callable[..., Any]


@dataclass
class Accelerated:
    """The state of an accelerated base: the paths of its loss, lines for the log, and `restore`."""

    paths: Paths = PLAIN_PATHS
    reasons: list[str] = field(default_factory=list)
    undo: list[Undo] = field(default_factory=list)

    def restore(self) -> None:
        """Give back every forward, the attention implementation and the storage, last replaced first."""
        _undo_all(self.undo)


def accelerate(
    model: PreTrainedModel,
    fast: config.Fast,
    kernels: Kernels = OWN,
    modules_to_save: Collection[str] = (),
    *,
    check: bool = True,
) -> Accelerated:
    """Set up a frozen base as `fast` says, as far as no number changes by more than rounding.

    `kernels` comes from `choose_kernels`. `modules_to_save` is trained in full, and keeps its weights. `check=False`
    is for tensors without values (fake tensors): everything that `fast` asks for is then taken without a check.
    """
    made = Accelerated()
    try:
        with warnings.catch_warnings(action="ignore"):  # of attempts that are given up, and as errors they would decide
            _accelerate(made, model, fast, kernels, modules_to_save, check)
    except BaseException:
        made.restore()
        raise
    return made


@contextlib.contextmanager
def accelerated(
    model: PreTrainedModel, fast: config.Fast, kernels: Kernels = OWN, modules_to_save: Collection[str] = ()
) -> Iterator[Accelerated]:
    """`accelerate` until the block ends."""
    made = accelerate(model, fast, kernels, modules_to_save)
    try:
        yield made
    finally:
        made.restore()


@contextlib.contextmanager
def accelerated_lora(model: "PeftModel", name: str, fast: config.Fast) -> Iterator[list[str]]:
    """Replace the forwards of adapter `name` until the block ends; yields which layers stay plain, and why."""
    if not fast.lora:
        yield ["plain lora: fast.lora=false"]
        return
    found = lora_layers.fast_forwards(model, name)
    undo = [_replace(layer, forward) for layer, forward in (found.lora | found.int8).items()]
    undo += [_replace(layer, loss, "token_loss_sum") for layer, loss in found.head_losses.items()]
    try:
        yield found.reasons
    finally:
        _undo_all(undo)


@contextlib.contextmanager
def dequantized_weights(model: nn.Module) -> Iterator[None]:
    """Let layers on the CPU that store their weights small multiply with dequantized ones until the block ends."""
    with replaced_forwards(dequantized_forwards(model)):
        yield


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend as transformers does, for generation, until the block ends."""
    undo = path_choice.set_attention(model, path_choice.plain_name(model))
    try:
        yield
    finally:
        undo()


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of single modules until the block ends."""
    undo = [_replace(module, forward) for module, forward in forwards.items()]
    try:
        yield
    finally:
        _undo_all(undo)


def _replace(module: nn.Module, value: Forward, name: str = "forward") -> Undo:
    own = vars(module).get(name)
    setattr(module, name, value)

    def undo() -> None:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)

    return undo


def _undo_all(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


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
            made.reasons.append(f"plain paths, one row in a forward pass: {failure}")
            return
    if not fast.storage:
        made.reasons.append("plain storage: fast.storage=false")
    elif saved_bytes := _store(made, model, modules_to_save):
        if reference is not None and not _is_same(model, reference):
            made.restore()
            made.reasons.append("plain storage: this model computes otherwise when weights are stored in bfloat16")
        else:
            made.reasons.append(f"weights stored in bfloat16, which keeps every bit: {saved_bytes / 1e9:.2f} GB less")
    num_stored = len(made.undo)
    forwards, lines = accelerated_blocks.fast_forwards(model, fast, kernels, check=check)
    made.undo += [_replace(module, forward) for module, forward in forwards.items()]
    made.undo.append(path_choice.set_attention(model, model.config._attn_implementation))
    if reference is None:
        made.paths, chosen = path_choice.unchecked_paths(model, fast)
    else:
        made.paths, problem, chosen = path_choice.choose_paths(model, fast, reference)
        if problem and forwards:
            while len(made.undo) > num_stored + 1:
                made.undo.pop(num_stored)()
            lines = [f"all blocks compute as transformers does: {problem}"]
            made.paths, problem, chosen = path_choice.choose_paths(model, fast, reference)
        if problem:
            chosen = [f"plain paths, one row in a forward pass: {problem}"]
    made.reasons += [*chosen, *lines]
    if forwards and kernels is not OWN:
        made.reasons.append(f"norm, SwiGLU and RoPE by {'torch.compile' if fast.compile else 'Liger'}")


def _is_same(model: PreTrainedModel, reference: self_check.Reference) -> bool:
    with plain_attention(model):
        return self_check.is_same(model, reference)


def _store(made: Accelerated, model: PreTrainedModel, modules_to_save: Collection[str]) -> int:
    """Store weights in bfloat16 where that keeps every bit; returns the number of bytes saved."""
    saved = 0
    for module, narrow in storage.exact_bfloat16(model, modules_to_save):
        layer: Any = module
        saved += layer.weight.nbytes - narrow.nbytes
        layer.weight.data = narrow
        # bitsandbytes' name for it: PEFT reads it, and so makes the adapter's matrices in float32.
        layer.compute_dtype = torch.float32
        made.undo.append(
            functools.partial(_widen, layer, _replace(layer, functools.partial(storage.stored_forward, layer)))
        )
    if saved:
        storage.give_back_freed_memory()
    return saved


def _widen(layer: Any, give_back_forward: Undo) -> None:
    give_back_forward()
    layer.weight.data = layer.weight.detach().to(layer.compute_dtype)
    del layer.compute_dtype
