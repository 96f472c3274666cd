"""Checks that a run learns what it says it learns; each costs less than a step and is always on.

A run can look healthy and train nothing: frozen matrices under checkpointing (transformers issue 42489),
fewer layers than meant (unsloth issue 9331), an adapter left in inference mode (peft issue 2765).
"""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ft.adapters.attach import starts_at_zero
from lora_ft.errors import MismatchError


def check_trainable(model: PeftModel, name: str, parameters: dict[str, nn.Parameter]) -> int:
    """Only this adapter trains, and its matrices count r (in + out) over the adapted layers; returns the count.

    Raises MismatchError, since either means that this code and the installed PEFT disagree.
    """
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    if training != set(parameters):
        extra, missing = sorted(training - set(parameters)), sorted(set(parameters) - training)
        raise MismatchError(f"only the adapter may train; also trained: {extra[:5]}, not trained: {missing[:5]}")
    expected = sum(_expected_parameters(layer, name) for layer in model.modules() if isinstance(layer, LoraLayer))
    found = sum(p.numel() for n, p in parameters.items() if ".lora_" in n)
    if found != expected:
        raise MismatchError(
            f"the adapter has {found:,} parameters in its matrices, its layers and ranks give {expected:,}"
        )
    return sum(p.numel() for p in parameters.values())


def _expected_parameters(layer: LoraLayer, name: str) -> int:
    if name not in layer.r:
        return 0
    magnitude = layer.out_features if layer.use_dora.get(name) else 0
    return int(layer.r[name] * (layer.in_features + layer.out_features) + magnitude)


def check_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """Raise MismatchError if a matrix that starts at zero has no gradient after the first backward (A16).

    They would learn nothing for the whole run: checkpointing that cuts the graph, or a layer that is never called.
    """
    idle = [n for n, p in parameters.items() if starts_at_zero(n) and (p.grad is None or not p.grad.any())]
    if idle:
        raise MismatchError(
            f"{len(idle)} adapter matrices get no gradient, so their layers would learn nothing: {', '.join(idle[:5])}"
        )


def check_moved(before: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Raise MismatchError if a matrix that starts at zero is what it was before training (A16)."""
    stuck = [n for n, p in parameters.items() if starts_at_zero(n) and torch.equal(before[n], p.detach())]
    if stuck:
        raise MismatchError(
            f"{len(stuck)} adapter matrices never moved, so their layers learned nothing: {', '.join(stuck[:5])}"
        )


def check_base_unchanged(before: str, after: str) -> None:
    """The frozen weights have the bytes they had before training (fingerprints of models/fingerprint.py)."""
    if before != after:
        raise MismatchError("the base model's weights changed during training; the adapter would not fit the base")
