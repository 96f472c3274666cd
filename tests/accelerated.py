"""Helpers for tests of fast paths: packed documents, an adapter with random matrices, and relative errors."""

from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from tiny import VOCABULARY
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerated_lora
from lora_ft.ops.batch import IGNORED, Batch


def packed(*lengths: int) -> Batch:
    """Return random documents of these lengths, supervised except for the first token of each."""
    ids = torch.randint(4, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    targets = ids.roll(-1)
    targets[[end - 1 for end in starts[1:]]] = IGNORED
    return Batch(ids, torch.cat([torch.arange(end - start) for start, end in pairwise(starts)]), targets, starts)


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
