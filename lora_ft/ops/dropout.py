"""The dropout of a frozen base, switched off: noise in weights that do not learn regularizes nothing.

With it GPT-2's own 10 % would make what is learned depend on how a step is cut into micro-batches, which
draw other masks. The adapter's dropout (`adapter.lora_dropout`) is its own and stays.
"""

from torch import nn

# Probabilities that architectures keep as plain numbers and apply in their forward.
_ATTRIBUTES = ("attention_dropout", "hidden_dropout", "activation_dropout", "dropout")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a base to zero; call it before adapters bring their own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
