"""Tokenize rendered turns into examples. Masks are found by comparing ids; templates need no `{% generation %}` tags.

    ids         <|im_start|> user \n 2 + 2 ? <|im_end|> \n <|im_start|> assistant \n 4 <|im_end|>
    supervised                                                                       x x
                |-------------------- ids of the prompt --------------------------|

Three rules make every mask right for any template:

- The ids before an answer are those that the model gets as its prompt at inference. If a token would span the end of
  the prompt, prompt and answer are tokenized separately, as they are at inference.
- The same holds for a thought that is not learned (`data.train_on_thoughts`): it is context, like a prompt.
- An answer shares a document with the answers before it only if its prompt contains them unchanged. If a template
  rewrites history (Qwen3 drops earlier <think> parts), each answer gets its own document.

The end-of-turn token is supervised. Whitespace that a template writes after it is cut, since nothing learns from it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from lora_ft.config import TrainOn
from lora_ft.data.answers import Turn
from lora_ft.data.rows import Example, Ledger, Row, RowError, any_of
from lora_ft.errors import ConfigError

# About four thousand short rows: enough work for the tokenizer's threads, and a few dozen megabytes at most.
_CHUNK_CHARACTERS = 1 << 20

Rendered = tuple[int, list[Turn]]
"""The index of a row and its turns."""

Tokenized = tuple[Turn, list[int], list[int], list[int]]
"""A turn with the ids of its prompt, of the thought that is not learned, and of the whole."""


class Span(NamedTuple):
    """The place of an answer in its document: the end of its prompt, its first learned token, its end; its weight."""

    prompt: int
    learned: int
    end: int
    weight: float


class Vocabulary:
    """A tokenizer with the properties that masks depend on: begin, end and whitespace tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A tokenizer.json may have truncation enabled, which would cut the ends of rows silently.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.lead = self._lead()
        self.split = _splitter(tokenizer.backend_tokenizer)
        self._blank: dict[int, bool] = {}

    def _lead(self) -> list[int]:
        """Return the ids that the tokenizer puts before plain text by default: [bos] or []."""
        bare, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return list(whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)])

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts without added special tokens. A part of several texts is tokenized once."""
        if self.split is None:
            return self.ids_whole(texts)
        parts = [self.split(text) for text in texts]
        distinct = list({part for text in parts for part in text})
        ids = dict(zip(distinct, self.ids_whole(distinct), strict=True))
        return [list(chain.from_iterable(map(ids.__getitem__, text))) for text in parts]

    def ids_whole(self, texts: list[str]) -> list[list[int]]:
        """Return the same ids without cutting the texts; much faster than calling the tokenizer itself."""
        return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def text(self, ids: list[int]) -> str:
        """Decode ids, special tokens included."""
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))

    def blank(self, token: int) -> bool:
        """Return True for a token that is only whitespace."""
        if token not in self._blank:
            self._blank[token] = token not in self.added and not self.text([token]).strip()
        return self._blank[token]


# Pre-tokenizers whose result for the text between two added tokens does not depend on its position. Metaspace may treat
# the start of the text differently, and unknown ones may as well.
_LOCAL = frozenset(("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
                    "UnicodeScripts", "CharDelimiterSplit"))  # fmt: skip


def _splitter(backend: Any) -> Callable[[str], list[str]] | None:
    """Return a function that cuts a text at its added tokens; None if the ids of a part may depend on the other parts.

    The tokenizer does the same first: it looks for the longest added token from left to right, and tokenizes each part
    between them separately. It is not imitated for added tokens that absorb whitespace or need word boundaries.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized and token.content]
    simple = not any(token.lstrip or token.rstrip or token.single_word for token in added)
    if not added or not simple or backend.encode_special_tokens or not _is_local(backend.pre_tokenizer):
        return None
    return re.compile(f"({any_of(token.content for token in added).pattern})").split


def _is_local(pre_tokenizer: Any) -> bool:
    settings: Any = (
        json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {"type": "Sequence", "pretokenizers": []}
    )
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    return all(step["type"] in _LOCAL or step.get("prepend_scheme") in ("always", "never") for step in steps)


def encode(
    rows: list[Row], rendered: Iterable[Rendered], tokenizer: Any, train_on: TrainOn, ledger: Ledger
) -> Iterator[Example]:
    """Tokenize the turns of rows, in order. Bad rows go into the ledger.

    Raises ConfigError if plain text needs an end token and the tokenizer has none.
    """
    vocabulary = Vocabulary(tokenizer)
    for chunk in _chunks(rendered):
        texts = [text for _, turns in chunk for turn in turns for text in (turn.prompt, turn.thought, turn.through)]
        ids = iter(vocabulary.ids(texts))
        for index, turns in chunk:
            tokenized = [(turn, next(ids), next(ids), next(ids)) for turn in turns]
            try:
                for example in _examples(index, rows[index], tokenized, vocabulary):
                    yield _supervise_all(example, rows[index], turns) if train_on is TrainOn.all else example
            except RowError as error:
                ledger.add_bad(rows[index].source, error.name, error.reason, error.shown)


def _chunks(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Group rows to be tokenized together, by the length of their last turn, which is the longest."""
    chunk: list[Rendered] = []
    characters = 0
    for index, turns in rendered:
        chunk.append((index, turns))
        characters += len(turns) * len(turns[-1].through)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _examples(index: int, row: Row, turns: list[Tokenized], vocabulary: Vocabulary) -> Iterator[Example]:
    """Make the documents of one row: consecutive answers share one as long as each extends the last."""
    document: list[int] = []
    spans: list[Span] = []  # of the answers in the document
    for turn, prompt, thought, through in turns:
        context = _joined(turn, (turn.prompt, turn.thought), prompt, thought, vocabulary) if thought else prompt
        ids = _joined(turn, (turn.thought or turn.prompt, turn.through), context, through, vocabulary)
        if turn.plain:
            ids = _with_end(vocabulary.lead + ids, vocabulary)
            prompt = context = vocabulary.lead + prompt
        else:
            ids = _cut_after_end(turn, ids, len(context), vocabulary)
        if vocabulary.bos is not None and ids[:2] == [vocabulary.bos] * 2:
            name = "text" if turn.plain else "chat template"
            raise RowError(name, "begins with two beginning-of-text tokens", turn.through)
        if spans and ids[: len(document)] != document:
            yield _example(index, row, document, spans)
            spans = []
        document = ids
        spans.append(Span(len(prompt), len(context), len(ids), turn.weight))
    yield _example(index, row, document, spans)


def _example(index: int, row: Row, ids: list[int], spans: list[Span]) -> Example:
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for span in spans:
        supervised[span.learned : span.end] = True
    supervised[0] = False  # there is no token before it to predict it from
    weights = None
    if any(span.weight != 1 for span in spans):
        weights = np.zeros(len(ids), dtype=np.float32)
        for span in spans:
            weights[span.learned : span.end] = span.weight
        weights[0] = 0
    return Example(
        np.array(ids, dtype=np.int32), supervised, row.source, index, spans[0].prompt, spans[-1].prompt, weights=weights
    )


def _supervise_all(example: Example, row: Row, turns: list[Turn]) -> Example:
    """Supervise all tokens. A chat with earlier answers then has no prompt that may be truncated."""
    has_earlier = not turns[0].plain and sum(message["role"] == "assistant" for message in row.messages) > 1
    supervised = np.arange(len(example.ids)) > 0
    return replace(example, supervised=supervised, prompt_end=0 if has_earlier else example.prompt_end)


def _joined(
    turn: Turn, texts: tuple[str, str], prompt: list[int], through: list[int], vocabulary: Vocabulary
) -> list[int]:
    """Return ids of the second text that begin with those of the first; RowError if no such ids have the same text."""
    if through[: len(prompt)] == prompt:
        return through
    before, whole = texts
    if not whole.startswith(before):
        raise RowError("chat template", "does not begin an answer with its own generation prompt", turn.answer)
    separate = prompt + vocabulary.ids([whole[len(before) :]])[0]
    if vocabulary.text(separate) != vocabulary.text(through):
        reason = "begins inside a token, and tokenizing it separately would change its text"
        raise RowError("answer", reason, turn.answer)
    return separate


def _with_end(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    if vocabulary.eos is None:
        raise ConfigError("plain text must end with an end-of-text token, and the tokenizer has none")
    return ids if ids[-1] == vocabulary.eos else [*ids, vocabulary.eos]


def _cut_after_end(turn: Turn, ids: list[int], start: int, vocabulary: Vocabulary) -> list[int]:
    """Return ids up to the end token of the answer; RowError if text or nothing follows the answer instead."""
    end = len(ids)
    while end > start and vocabulary.blank(ids[end - 1]):
        end -= 1
    if end > start and ids[end - 1] not in vocabulary.added:
        shown = vocabulary.text(ids[max(start, len(ids) - 8) :])
        reason = f"puts no end token after the answer, which ends in {shown!r}: the model would not learn to stop"
        raise RowError("chat template", reason, turn.answer)
    if end <= start + 1:
        raise RowError("chat template", "writes an empty answer", turn.answer)
    return ids[:end]
