"""Switch off the dropout of a frozen base: noise in weights that do not train regularizes nothing.

With GPT-2's own dropout of 10 %, the result would also depend on how a step is divided into micro-batches, because
each micro-batch draws its own masks. The adapter's dropout (`adapter.lora_dropout`) is separate and stays on.
"""

from torch import nn

# Probabilities that model classes store as plain numbers and apply in their forward.
_ATTRIBUTES = ("attention_dropout", "hidden_dropout", "activation_dropout", "dropout")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a base to zero. Call it before an adapter is attached."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
