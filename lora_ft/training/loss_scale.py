"""The loss scale of training in float16, whose largest number is 65,504, and the steps that overflow.

    (loss sum * scale) -> backward in float16 -> gradients in float32 -> divide by weight * scale

The loss is a sum over tokens, each with a gradient of at most 1 to its logits: large enough for float16, where the
gradient of a mean would underflow. What adds up over the tokens of a micro-batch, such as the gradient of a key that
all of them attend to, may overflow. Therefore the scale starts at the largest power of two, at most 1, with
scale * tokens <= 65,504. A step with a gradient that is not finite is skipped, and halves the scale for the next 1,000
steps: growing back, it does not underflow after rare overflows of a long run. Powers of two change no digit.
"""

import math
from dataclasses import dataclass, field

import torch

_STEPS = 1000
_LARGEST = torch.finfo(torch.float16).max

# As many halvings divide the scale by 1,024: what still overflows then does so at any scale.
MOST_IN_A_ROW = 10


@dataclass
class LossScale:
    """The scale of each step, a function of the steps that were skipped; a checkpoint stores them.

    start: the highest scale. skipped: numbers of the steps without an update. overflows: those of them whose loss was
    finite, so that a lower scale helps; an overflow in the forward pass does not depend on the scale.
    """

    start: float
    skipped: list[int] = field(default_factory=list)
    overflows: list[int] = field(default_factory=list)

    def at(self, step: int) -> float:
        """Return the scale of a step."""
        recent = sum(0 < step - number <= _STEPS for number in self.overflows)
        return self.start * 0.5 ** min(recent, MOST_IN_A_ROW)

    def skips(self, step: int, loss: float, grad_norm: float) -> bool:
        """Return True if a step must be skipped, and count it; False if it is finite, or after too many in a row."""
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite or self.skipped[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW, step)):
            return False
        self.skipped.append(step)
        if math.isfinite(loss):
            self.overflows.append(step)
        return True


def for_tokens(tokens: int) -> LossScale:
    """Return the loss scale of a run whose micro-batches have at most so many tokens."""
    return LossScale(2.0 ** min(0, math.floor(math.log2(_LARGEST / tokens))))
