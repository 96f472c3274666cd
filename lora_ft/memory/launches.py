"""Say when a step on a GPU takes longer to launch than to compute, from the traced step.

    0.6B, 1,024 tokens, H100    3,500 launches x 5 us      18 ms     whatever the number of tokens
                                2.5 TFLOP / 500 TFLOPS      5 ms     grows with the tokens

Both rates are estimates, good to a factor of two: hosts launch a kernel in 4 to 10 us, and the rate that products of
16 bits reach differs between GPUs of one generation.
"""

from lora_ft.memory.trace import StepTrace
from lora_ft.ops.device import Target

LAUNCH_SECONDS = 5e-6

# Products of 16 bits per second, about 60 % of the specified rate of a common GPU of the generation:
# T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_TFLOPS = {(7, 5): 30, (8, 0): 200, (8, 6): 50, (8, 9): 100, (9, 0): 500, (10, 0): 1200, (12, 0): 130}
_USUAL_TFLOPS = 100


def launch_bound(found: StepTrace, tokens: int, device: Target) -> str:
    """Return a sentence if a traced step of `tokens` tokens is limited by its launches; "" if it is not."""
    rate = tflops(device)
    launches = sum(found.dispatches.values())
    launching, computing = launches * LAUNCH_SECONDS, found.flops / (rate * 1e12)
    if computing >= launching:
        return ""
    return (
        f"a step of {tokens:,} tokens makes about {launches:,} kernel launches, {launching * 1e3:.0f} ms, but has only "
        f"{computing * 1e3:.0f} ms of products (estimates: {LAUNCH_SECONDS * 1e6:.0f} us a launch, {rate} TFLOPS), so "
        f"the GPU waits: from about train.tokens_per_step={_rounded_up(tokens * launching / computing)} on it would not"
    )


def tflops(device: Target) -> float:
    """Return the rate of products of 16 bits on a GPU."""
    return _TFLOPS.get(device.capability, _USUAL_TFLOPS)


def _rounded_up(tokens: float) -> int:
    """Round up to 1,024 times a power of two: the estimate is no better than that."""
    found = 1024
    while found < tokens:
        found *= 2
    return found
