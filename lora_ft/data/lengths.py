"""Bring documents to at most `data.max_length` tokens, according to `data.too_long`.

error            refuse longer rows
drop             leave out longer rows; they are counted
truncate_prompt  cut the start of the prompt; answers are never cut
split            cut plain text into windows that overlap by one token
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.config import TooLong
from lora_ft.data.examples import Examples, Replacements
from lora_ft.data.read import Rows
from lora_ft.data.rows import Example
from lora_ft.errors import DataError


def fit(examples: Examples, found: Rows, data: config.Data, tokenizer: Any) -> tuple[Examples, int]:
    """Return examples of at most `data.max_length` tokens, and the number of those that were cut.

    Raises DataError for rows that are too long and that `data.too_long` does not apply to.
    """
    limit = data.max_length
    places = np.flatnonzero(examples.lengths > limit)
    if not len(places):
        return examples, 0
    long = examples.select(places)
    fitted, stuck, why = examples, long, ""
    if data.too_long is TooLong.drop:
        # All documents of the row are dropped: the others would be half a conversation.
        dropped = np.unique(long.rows)
        found.ledger.left_out["longer than data.max_length"] += len(dropped)
        return examples.select(np.flatnonzero(~np.isin(examples.rows, dropped))), 0
    if data.too_long is TooLong.split:
        stuck = long.select(np.flatnonzero(found.rows.is_chat[long.rows]))
        why = ", and data.too_long=split applies to plain text only"
        if not len(stuck):
            fitted = _replaced(examples, places, lambda example: _windows(example, limit))
    elif data.too_long is TooLong.truncate_prompt:
        fitted = _replaced(examples, places, lambda example: [_truncated(example, limit, tokenizer)])
        stuck = fitted.select(np.flatnonzero(fitted.lengths > limit))
        why = " even without their prompts, and answers are never cut"
    if len(stuck):
        worst = stuck[int(stuck.lengths.argmax())]
        raise DataError(
            f"{len(np.unique(stuck.rows))} of {len(found.rows)} rows are longer than data.max_length={limit}, the "
            f"longest is {worst.source} with {len(worst.ids)} tokens{why}: raise it, or choose "
            f"data.too_long={_remedies(stuck, found, limit, tokenizer)}"
        )
    return fitted, len(long)


def _replaced(
    examples: Examples, places: NDArray[np.int64], parts_of: Callable[[Example], Iterable[Example]]
) -> Examples:
    """Return examples of which those at some places are replaced by their parts."""
    made = Replacements(examples)
    counts = np.ones(len(examples), np.int64)
    for place, example in zip(places.tolist(), examples.select(places), strict=True):
        counts[place] = made.append(parts_of(example))
    order = np.repeat(np.arange(len(examples)), counts)
    is_part = np.zeros(len(examples), np.bool_)
    is_part[places] = True
    order[np.repeat(is_part, counts)] = np.arange(int(counts[places].sum())) + len(examples)
    return made.finish(order)


def _remedies(long: Examples, found: Rows, limit: int, tokenizer: Any) -> str:
    """Name the choices of data.too_long that work for all of these documents."""
    choices = ["drop"]
    if all(len(_truncated(example, limit, tokenizer).ids) <= limit for example in long):
        choices.append("truncate_prompt")
    if not found.rows.is_chat[long.rows].any():
        choices.append("split")
    return " or ".join(choices)


def _windows(document: Example, max_length: int) -> Iterator[Example]:
    """Cut a text into windows that have every target of the text exactly once; only the last has the end token.

        max_length=4    a b c d e f g .      targets of the whole:  b c d e f g .
                        a b c d                                     b c d
                              d e f g                                     e f g
                                    g .                                         .

    A window begins with the last token of the one before, from which its second token is predicted.
    """
    for start in range(0, len(document.ids) - 1, max_length - 1):
        supervised = document.supervised[start : start + max_length].copy()
        supervised[0] = False
        weights = None if document.weights is None else document.weights[start : start + max_length] * supervised
        yield replace(document, ids=document.ids[start : start + max_length], supervised=supervised, weights=weights)


def _truncated(document: Example, max_length: int, tokenizer: Any) -> Example:
    """Remove excess tokens from the start of the first prompt, after a beginning-of-text token.

    Returns the document unchanged if it is short enough, or if its first prompt is too short for that.
    """
    keep = int(document.ids[0] == tokenizer.bos_token_id)
    excess = len(document.ids) - max_length
    # One token must remain before the first answer, to predict its first token from.
    if excess <= 0 or document.prompt_end - excess < max(keep, 1):
        return document

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([values[:keep], values[keep + excess :]])

    supervised = cut(document.supervised)
    supervised[0] = False
    weights = None if document.weights is None else cut(document.weights) * supervised
    return replace(document, ids=cut(document.ids), supervised=supervised, prompt_end=document.prompt_end - excess,
                   answer_start=document.answer_start - excess, weights=weights)  # fmt: skip
