"""Search for the micro-batch, and the recomputation with it, of the fastest step that fits.

    bytes                 .  off            Bytes grow nearly linearly with the tokens of a micro-batch, and fall
            .          .                    nearly linearly with the recomputed layers. So four corners, traced,
        .        .           .  every_1     estimate every pair, and few more traces find the best one.
    . ________________________ tokens

`needed` and `seconds` trace a step; the results that are returned were traced, and fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TRIES = 8
_PRECISION = 0.01  # of the memory: a larger micro-batch by less is not looked for


@dataclass(frozen=True)
class Sizes:
    """Sizes of micro-batches to choose from in tokens: the longest row, the largest step; and a step of median size."""

    least: int
    most: int
    step: int

    def rounded(self, tokens: float) -> int:
        """Round down by at most 3 %, within the bounds."""
        return min(self.most, max(self.least, int(tokens) // spacing(tokens) * spacing(tokens)))

    def micro_batches(self, tokens: int) -> float:
        """Return the number of micro-batches of the step of median size; the last one is smaller than the others."""
        return max(1.0, self.step / tokens)


def spacing(tokens: float) -> int:
    """Return the distance of the sizes that are looked at: a power of two, at most 1/32 of the tokens."""
    return 1 << max(0, int(tokens).bit_length() - 6)


def largest_that_fits(sizes: Sizes, needed: Callable[[int], int], budget: int) -> int:
    """Return the most tokens that need at most `budget` bytes; `sizes.least` if none do."""
    if sizes.least >= sizes.most or needed(sizes.most) <= budget:
        return sizes.most
    if needed(sizes.least) > budget:
        return sizes.least
    fits, exceeds = sizes.least, sizes.most
    for _ in range(_TRIES):
        share = (budget - needed(fits)) / (needed(exceeds) - needed(fits))
        between = sizes.rounded(fits + share * (exceeds - fits))
        if between == fits:  # the bytes are linear so far: one size more decides
            between = sizes.rounded(fits + spacing(fits))
        if not fits < between < exceeds:
            break
        if needed(between) <= budget:
            fits = between
        else:
            exceeds = between
        if budget - needed(fits) <= _PRECISION * budget:
            break
    return fits


def fastest(
    settings: Sequence[str],
    sizes: Sizes,
    needed: Callable[[str, int], int],
    seconds: Callable[[str, int], float],
    budget: int,
) -> tuple[str, int]:
    """Return the setting and the tokens of the fastest step that needs at most `budget` bytes.

    `settings` recompute more and more layers. `seconds` is the time of one micro-batch. Returns the last setting with
    the least tokens if nothing fits.
    """
    first, last = settings[0], settings[-1]
    if needed(first, sizes.most) <= budget:
        return first, sizes.most
    if needed(last, sizes.least) > budget:
        return last, sizes.least

    def time(setting: str, tokens: int) -> float:
        return sizes.micro_batches(tokens) * seconds(setting, tokens)

    best: tuple[float, str, int] | None = None
    for _, setting in sorted(_estimated(settings, sizes, needed, seconds, budget)):
        tokens = largest_that_fits(sizes, lambda tokens, each=setting: needed(each, tokens), budget)  # type: ignore[misc]
        if needed(setting, tokens) <= budget:
            found = time(setting, tokens), setting, tokens
            if best is not None:
                return min(best, found)[1:]
            best = found
    return best[1:] if best else (last, sizes.least)


def _estimated(
    settings: Sequence[str],
    sizes: Sizes,
    needed: Callable[[str, int], int],
    seconds: Callable[[str, int], float],
    budget: int,
) -> list[tuple[float, str]]:
    """Return the estimated time of a step by setting, of those that may fit, from the corners."""
    found = []
    first, last, span = settings[0], settings[-1], max(1, sizes.most - sizes.least)
    for setting in settings:
        share = _recomputed(setting)

        def between(of: Callable[[str, int], float], tokens: int, share: float = share) -> float:
            return of(first, tokens) * (1 - share) + of(last, tokens) * share

        low, high = between(needed, sizes.least), between(needed, sizes.most)
        if low > budget:
            continue
        tokens = sizes.most if high <= budget else sizes.rounded(sizes.least + (budget - low) / (high - low) * span)
        at = (tokens - sizes.least) / span
        one = between(seconds, sizes.least) * (1 - at) + between(seconds, sizes.most) * at
        found.append((sizes.micro_batches(tokens) * one, setting))
    return found


def _recomputed(setting: str) -> float:
    """Return the share of layers that a setting recomputes."""
    return 0.0 if setting == "off" else 1 / int(setting.removeprefix("every_"))
