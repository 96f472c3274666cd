"""Rendered turns become examples, ids with a mask found by comparing ids: no `{% generation %}` tags needed.

    ids         <|im_start|> user \n 2 + 2 ? <|im_end|> \n <|im_start|> assistant \n 4 <|im_end|>
    supervised                                                                       x x
                |-------------------- ids of the prompt --------------------------|

Two rules make every mask right, whatever the template does:

- What stands before an answer must be the ids that the model gets as its prompt. Where a token would span the
  end of the prompt, prompt and answer are tokenized apart, as they are at inference.
- An answer joins the document of the answers before it only if these stand unchanged in its prompt. A template
  that rewrites history (Qwen3 strips earlier <think> parts) gets a document for each answer, as at inference.

The end-of-turn token is supervised; blanks that a template puts behind it are cut, since nothing learns from them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from lora_ft.config import TrainOn
from lora_ft.data.chat_template import Turn
from lora_ft.data.rows import Example, Ledger, Row, RowError
from lora_ft.errors import ConfigError

# Four thousand short rows: enough for the tokenizer's threads to share, and a few dozen megabytes at most.
_CHARACTERS_AT_ONCE = 1 << 20

Rendered = tuple[int, list[Turn]]
"""The index of a row, and its turns."""


class Vocabulary:
    """A tokenizer with what masks need: its begin and end tokens, and its blank tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A tokenizer.json may come with truncation switched on: rows would lose their ends without a word.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.lead = self._lead()
        self.split = _splitter(tokenizer.backend_tokenizer)
        self._blank: dict[int, bool] = {}

    def _lead(self) -> list[int]:
        """The ids that the tokenizer puts before plain text by default: [bos] or []."""
        bare, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return list(whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)])

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, without added special tokens; text that repeats between two of them is read once."""
        if self.split is None:
            return self.ids_whole(texts)
        parts = [self.split(text) for text in texts]
        distinct = list({part for text in parts for part in text})
        ids = dict(zip(distinct, self.ids_whole(distinct), strict=True))
        return [list(chain.from_iterable(map(ids.__getitem__, text))) for text in parts]

    def ids_whole(self, texts: list[str]) -> list[list[int]]:
        """The plain twin of `ids`: each text as one; still much faster than the tokenizer's own call."""
        return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))

    def blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self.added and not self.text([token]).strip()
        return self._blank[token]


# Pre-tokenizers that read a stretch between two added tokens the same wherever it stands. Metaspace may look for the
# start of the text, and what is not known may as well.
_LOCAL = frozenset(("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
                    "UnicodeScripts", "CharDelimiterSplit"))  # fmt: skip


def _splitter(backend: Any) -> Callable[[str], list[str]] | None:
    """Return a function that cuts a text at its added tokens as the tokenizer does first; None if parts are not local.

    The tokenizer looks for the longest of these tokens from left to right, and normalizes, cuts and merges each part
    between them on its own. Tokens that take blanks or word boundaries around them with them are not cut at.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized and token.content]
    simple = not any(token.lstrip or token.rstrip or token.single_word for token in added)
    if not added or not simple or backend.encode_special_tokens or not _is_local(backend.pre_tokenizer):
        return None
    longest_first = map(re.escape, sorted((token.content for token in added), key=len, reverse=True))
    return re.compile(f"({'|'.join(longest_first)})").split


def _is_local(pre_tokenizer: Any) -> bool:
    settings: Any = (
        json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {"type": "Sequence", "pretokenizers": []}
    )
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    return all(step["type"] in _LOCAL or step.get("prepend_scheme") in ("always", "never") for step in steps)


def encode(
    rows: list[Row], rendered: Iterable[Rendered], tokenizer: Any, train_on: TrainOn, ledger: Ledger
) -> Iterator[Example]:
    """Tokenize the turns of rows, in their order; faults of a row go into the ledger.

    Raises ConfigError for a tokenizer without an end token where plain text needs one.
    """
    vocabulary = Vocabulary(tokenizer)
    for chunk in _chunks(rendered):
        ids = iter(
            vocabulary.ids([text for _, turns in chunk for turn in turns for text in (turn.prompt, turn.through)])
        )
        for index, turns in chunk:
            tokenized = [(turn, next(ids), next(ids)) for turn in turns]
            try:
                for example in _examples(index, rows[index], tokenized, vocabulary):
                    yield _learned_whole(example, rows[index], turns) if train_on is TrainOn.all else example
            except RowError as error:
                ledger.add_bad(rows[index].source, error.name, error.reason, error.shown)


def _chunks(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Rows to tokenize at once; the last turn of a row is the longest."""
    chunk: list[Rendered] = []
    characters = 0
    for index, turns in rendered:
        chunk.append((index, turns))
        characters += len(turns) * len(turns[-1].through)
        if characters >= _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _examples(
    index: int, row: Row, turns: list[tuple[Turn, list[int], list[int]]], vocabulary: Vocabulary
) -> Iterator[Example]:
    held: list[int] = []
    spans: list[tuple[int, int]] = []
    for turn, prompt, through in turns:
        ids = _joined(turn, prompt, through, vocabulary)
        if turn.plain:
            prompt, ids = vocabulary.lead + prompt, _ended(vocabulary.lead + ids, vocabulary)
        else:
            ids = _cut_behind_end(turn, ids, len(prompt), vocabulary)
        if vocabulary.bos is not None and ids[:2] == [vocabulary.bos] * 2:
            name = "text" if turn.plain else "chat template"
            raise RowError(name, "begins with two beginning-of-text tokens", turn.through)
        if spans and ids[: len(held)] != held:
            yield _example(index, row, held, spans)
            spans = []
        held = ids
        spans.append((len(prompt), len(ids)))
    yield _example(index, row, held, spans)


def _example(index: int, row: Row, ids: list[int], spans: list[tuple[int, int]]) -> Example:
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        supervised[start:end] = True
    supervised[0] = False  # nothing precedes it that could predict it
    return Example(
        np.array(ids, dtype=np.int32), supervised, row.source, index, prompt_end=spans[0][0], answer_start=spans[-1][0]
    )


def _learned_whole(example: Example, row: Row, turns: list[Turn]) -> Example:
    """Supervise everything; a chat with earlier answers has then no prompt that may be cut."""
    has_earlier = not turns[0].plain and sum(message["role"] == "assistant" for message in row.messages) > 1
    supervised = np.arange(len(example.ids)) > 0
    return replace(example, supervised=supervised, prompt_end=0 if has_earlier else example.prompt_end)


def _joined(turn: Turn, prompt: list[int], through: list[int], vocabulary: Vocabulary) -> list[int]:
    """Ids of `turn.through` that begin with the prompt's ids and spell the same text."""
    if through[: len(prompt)] == prompt:
        return through
    if not turn.through.startswith(turn.prompt):
        raise RowError("chat template", "does not begin an answer with its own generation prompt", turn.answer)
    apart = prompt + vocabulary.ids([turn.through[len(turn.prompt) :]])[0]
    if vocabulary.text(apart) != vocabulary.text(through):
        reason = "begins inside a token: prompt and answer cannot be told apart in it"
        raise RowError("answer", reason, turn.answer)
    return apart


def _ended(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    if vocabulary.eos is None:
        raise ConfigError("plain text must end with the tokenizer's end-of-text token, and the tokenizer has none")
    return ids if ids[-1] == vocabulary.eos else [*ids, vocabulary.eos]


def _cut_behind_end(turn: Turn, ids: list[int], start: int, vocabulary: Vocabulary) -> list[int]:
    """Ids up to the answer's end token, which must be the last but for blanks so that the model learns to stop."""
    end = len(ids)
    while end > start and vocabulary.blank(ids[end - 1]):
        end -= 1
    if end > start and ids[end - 1] not in vocabulary.added:
        shown = vocabulary.text(ids[max(start, len(ids) - 8) :])
        reason = f"puts no end token after the answer, which ends {shown!r}: it would never stop"
        raise RowError("chat template", reason, turn.answer)
    if end <= start + 1:
        raise RowError("chat template", "leaves nothing of the answer", turn.answer)
    return ids[:end]
