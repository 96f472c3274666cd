"""Helpers for tests of fast paths: an adapter with random matrices, and relative errors."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerated_lora


def adapted(model: Any, **settings: object) -> PeftModel:
    """Attach an adapter named "first" to a model, which is frozen, and change all its parameters."""
    peft_model = attach.attach(model.requires_grad_(False), config.Adapter(**{"r": 3, **settings}), "first", 1, [])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attach.trainable(peft_model, "first").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return peft_model


def accelerate_adapter(model: PeftModel, name: str) -> list[str]:
    """Enter `accelerated_lora` for the lifetime of the base; return its reasons."""
    context = accelerated_lora(model, name, config.Fast())
    vars(model.get_base_model()).setdefault("held_by_the_test", []).append(context)
    return context.__enter__()


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm of `expected`."""
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())
