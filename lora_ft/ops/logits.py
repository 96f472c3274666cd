"""Parts of a language model's head besides its weight: a LoRA on it, and the function from its product to the logits.

    product = W h + b + s B (A h)        logits = scale * product                         most models: the product
                                         logits = cap * tanh(scale * product / cap)       Gemma: soft-capped

Shapes: E width of the hidden state, V words, r rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadLora(NamedTuple):
    """A LoRA on the head: a [r, E], b [V, r], and the factor of b @ a."""

    a: Tensor
    b: Tensor
    scaling: float


class LogitMap(NamedTuple):
    """The function from the product with the head to the logits, element by element. scale > 0; cap > 0 or None."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Return the logits: the definition, in the dtype of `product`."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def apply_(self, product: Tensor, slope: Tensor | None) -> None:
        """Turn `product` into the logits in place; write d logits / d product to `slope`, which only a cap needs."""
        if self.scale != 1:
            product *= self.scale
        if self.cap is not None:
            product.div_(self.cap).tanh_()
            if slope is not None:
                one = product.new_full((), self.scale)
                torch.addcmul(one, product, product, value=-self.scale, out=slope)
            product *= self.cap


PRODUCT = LogitMap()  # the logits are the product itself


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half precision as float32, and other tensors unchanged: losses are summed in at least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
