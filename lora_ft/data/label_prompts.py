"""Tokenize each label after each prompt of an eval set, as training and generation would.

    prompt_ids  <|im_start|> user \n great film <|im_end|> \n <|im_start|> assistant \n
    label_ids   [negative <|im_end|>]   [positive <|im_end|>]   [very positive <|im_end|>]

Each label ends with the end-of-turn token: a label that begins another one has a probability of its own. A template
writes the same text after most prompts; it is rendered once for each label, and compared with the rendering of each
row's own label. Where these differ, all labels of the row are rendered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.config import TrainOn
from lora_ft.data import chat_template, tokenize
from lora_ft.data.answers import Turn
from lora_ft.data.labels import with_answer
from lora_ft.data.rows import Ledger, Row


@dataclass(frozen=True)
class LabelPrompt:
    """A prompt, and the ids of each label after it, the end token included.

    prompt_ids: int [length]. source: file and line of the row.
    """

    prompt_ids: NDArray[np.int32]
    label_ids: Sequence[tuple[int, ...]]
    source: str

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest label."""
        return len(self.prompt_ids) + max(map(len, self.label_ids))


def make(
    rows: Sequence[Row], prompts: Sequence[NDArray[np.int32]], labels: Sequence[str], tokenizer: Any, data: config.Data
) -> list[LabelPrompt]:
    """Make the prompts of rows, given their ids (which may be truncated); the labels are tokenized after the whole.

    Raises DataError for a row that the template refuses with one of the labels.
    """
    ledger = Ledger()
    data = replace(data, train_on=TrainOn.last_answer)
    plain = [replace(row, context=frozenset(), excluded=frozenset()) for row in rows]
    turns = _Turns(plain, labels, tokenizer, data, ledger)
    examples = tokenize.encode(plain, turns.rendered(), tokenize.Vocabulary(tokenizer), data.train_on, ledger)
    found = [(example.row, tuple(example.ids[example.answer_start :].tolist())) for example in examples]
    ledger.raise_bad()
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # most rows have equal ids
    by_row: list[list[tuple[int, ...]]] = [[] for _ in rows]
    for index, ids in found:
        by_row[index].append(shared.setdefault(ids, ids))
    return [LabelPrompt(ids, found, row.source) for ids, found, row in zip(prompts, by_row, rows, strict=True)]


class _Turns:
    """Renders each row once, and every label where the text after the prompt could differ."""

    def __init__(self, rows: list[Row], labels: Sequence[str], tokenizer: Any, data: config.Data, ledger: Ledger):
        self._rows, self._labels = rows, labels
        self._arguments = data, tokenizer, ledger, chat_template.trials_of(tokenizer, data)

    def rendered(self) -> Iterator[tuple[int, list[Turn]]]:
        """Yield the index of each row with the turn of each label, in order."""
        if not self._rows:
            return
        labels = self._labels
        own = [row.answer if row.answer in labels else labels[0] for row in self._rows]
        single = self._render([with_answer(row, label) for row, label in zip(self._rows, own, strict=True)])
        tails = self._tails()
        for index, turn in single:
            if tails and turn.through == turn.prompt + tails[own[index]]:
                turns = [replace(turn, through=turn.prompt + tails[label], answer=label) for label in labels]
            else:
                turns = self._all(index)
            yield from ((index, [each]) for each in turns)

    def _render(self, rows: list[Row]) -> Iterator[tuple[int, Turn]]:
        for index, turns in chat_template.turns(rows, *self._arguments):
            yield index, turns[-1]

    def _all(self, index: int) -> list[Turn]:
        return [turn for _, turn in self._render([with_answer(self._rows[index], label) for label in self._labels])]

    def _tails(self) -> dict[str, str]:
        """Return the text after the first row's prompt for each label; {} if it does not begin with the prompt."""
        first = self._all(0)
        if len(first) < len(self._labels) or not all(turn.through.startswith(turn.prompt) for turn in first):
            return {}
        return {label: turn.through.removeprefix(turn.prompt) for label, turn in zip(self._labels, first, strict=True)}
