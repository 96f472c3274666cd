"""Check that a run trains the adapter and only the adapter; each check costs less than a step and is always on.

A run can look healthy and train nothing: frozen matrices under checkpointing (transformers issue 42489),
fewer layers than intended (unsloth issue 9331), an adapter left in inference mode (peft issue 2765).
"""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ft.adapters.attach import starts_at_zero
from lora_ft.adapters.targets import short
from lora_ft.errors import MismatchError


def check_trainable(model: PeftModel, name: str, parameters: dict[str, nn.Parameter]) -> int:
    """Check that only this adapter trains, with r (in + out) parameters per adapted matrix; return their total number.

    Raises MismatchError, which means that this code and the installed PEFT disagree.
    """
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    if training != set(parameters):
        extra, missing = sorted(training - set(parameters)), sorted(set(parameters) - training)
        raise MismatchError(f"only the adapter may train; also trained: {extra[:5]}, not trained: {missing[:5]}")
    expected = sum(_expected_parameters(layer, name) for layer in model.modules() if isinstance(layer, LoraLayer))
    found = sum(p.numel() for n, p in parameters.items() if ".lora_" in n)
    if found != expected:
        raise MismatchError(
            f"the adapter's matrices have {found:,} parameters, but its layers and ranks require {expected:,}"
        )
    return sum(p.numel() for p in parameters.values())


def _expected_parameters(layer: LoraLayer, name: str) -> int:
    if name not in layer.r:
        return 0
    magnitude = layer.out_features if layer.use_dora.get(name) else 0
    matrices = getattr(layer, "num_experts", 1)
    return int(matrices * layer.r[name] * (layer.in_features + layer.out_features) + magnitude)


def check_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """Raise MismatchError if a matrix that starts at zero has no gradient after the first backward (A16).

    Such a matrix would learn nothing in the whole run: checkpointing cuts the graph, or the layer is never called.
    """
    idle = [n for n, p in parameters.items() if starts_at_zero(n) and (p.grad is None or not p.grad.any())]
    if idle:
        layers = ",".join(dict.fromkeys(short(name.partition(".lora_")[0]) for name in idle))
        raise MismatchError(
            f"{len(idle)} adapter matrices get no gradient, so their layers would learn nothing; "
            f"adapter.exclude=[{layers}] leaves them out: {', '.join(idle[:5])}"
        )


def check_moved(before: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Raise MismatchError if a matrix that starts at zero is the same after training (A16); `before` is on the CPU."""
    stuck = [n for n, p in parameters.items() if starts_at_zero(n) and torch.equal(before[n], p.detach().cpu())]
    if stuck:
        raise MismatchError(
            f"{len(stuck)} adapter matrices never moved, so their layers learned nothing: {', '.join(stuck[:5])}"
        )


def check_base_unchanged(before: str, after: str) -> None:
    """Raise MismatchError if training changed the frozen weights; compares hashes of models/fingerprint.py."""
    if before != after:
        raise MismatchError("the base model's weights changed during training; the adapter would not fit the base")
