"""Switch off dropout: of a frozen base for good, of a whole model for an evaluation.

Noise in weights that do not train regularizes nothing.

With GPT-2's own dropout of 10 %, the result would also depend on how a step is divided into micro-batches, because
each micro-batch draws its own masks. The adapter's dropout (`adapter.lora_dropout`) is separate and stays on.
"""

import contextlib
from collections.abc import Iterator

from torch import nn


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a base to zero. Call it before an adapter is attached.

    Model classes also store probabilities as plain numbers that they apply in their forward, under names such as
    attention_dropout, attn_dropout and residual_dropout.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore the model's mode when the block ends, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
