"""Say when a step on a GPU takes longer to launch than to compute, from the traced step.

    launches   6,600 x 5 us            33 ms     the host needs this long, whatever the number of tokens
    products   42 TFLOP / 100 TFLOPS  420 ms     grows with the tokens

Both rates are assumptions, good to a factor of two: a CPU launches a kernel in 4 to 10 us, and products of 16 bits
reach about 30 (a laptop) to 600 TFLOPS (H200).
"""

from lora_ft.memory.trace import StepTrace

LAUNCH_SECONDS = 5e-6
FLOPS_PER_SECOND = 1e14  # between an RTX 4080 and an RTX 4090


def launch_bound(found: StepTrace, tokens: int) -> str:
    """Return a sentence if a traced step of `tokens` tokens is limited by its launches; "" if it is not."""
    launches = sum(found.dispatches.values())
    launching, computing = launches * LAUNCH_SECONDS, found.flops / FLOPS_PER_SECOND
    if computing >= launching:
        return ""
    enough = _rounded_up(tokens * launching / computing)
    return (
        f"a step of {tokens:,} tokens makes about {launches:,} kernel launches, {launching * 1e3:.0f} ms at 5 us each, "
        f"but computes for only {computing * 1e3:.0f} ms (an estimate, for a GPU of 100 TFLOPS): the GPU waits. From "
        f"train.tokens_per_step={enough} on it would not"
    )


def _rounded_up(tokens: float) -> int:
    """Round up to a power of two times 1,024: the estimate is no better than that."""
    found = 1024
    while found < tokens:
        found *= 2
    return found
