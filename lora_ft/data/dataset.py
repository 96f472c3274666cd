"""Make a checked dataset of the rows that the settings name, with a tokenizer.

    prepare(Data(path="chat.jsonl"), tokenizer) -> Dataset(train=[Example ...], eval=[...], eval_prompts=[...], ...)

Every row that was read is in the dataset, counted in its report, or named in an error.
"""

import hashlib
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.config import TooLong
from lora_ft.data import cache, chat_template, labels, lengths, tokenize
from lora_ft.data.columns import InMemory
from lora_ft.data.examples import Examples, columns_of
from lora_ft.data.read import Rows, read
from lora_ft.data.rows import Example, Ledger, Row, excerpt
from lora_ft.errors import ConfigError, DataError

MOST_LABELS = 50

# Looking into the cache takes 20 ms, mostly for the tokenizer's hash; tokenizing a thousand short rows takes 120 ms.
_CACHED_FROM_ROWS = 1000


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of the eval set, for generation and metrics.

    prompt_ids: int32 [length], the row up to its last answer, generation prompt included.
    prompt: the last user message. answer: the reference answer. source: file and line of the row. row: the row itself.
    """

    prompt_ids: NDArray[np.int32]
    prompt: str
    answer: str
    source: str
    row: Row


class EvalPrompts(Sequence[EvalPrompt]):
    """The prompt of each chat of the eval set, made of its last example when it is asked for.

    answer: returns the reference answer of a row.
    """

    def __init__(
        self, examples: Examples, rows: Sequence[Row], answer: Callable[[Row], str] = operator.attrgetter("answer")
    ) -> None:
        self._examples, self._rows, self._answer = examples, rows, answer
        places = np.flatnonzero(examples.answer_starts)
        of_rows = examples.rows[places]
        chats = {row for row in np.unique(of_rows).tolist() if rows[row].messages}
        self._last = {row: place for row, place in zip(of_rows.tolist(), places.tolist(), strict=True) if row in chats}
        self._order = list(self._last)

    def of_rows(self, rows: NDArray[np.int64]) -> list[EvalPrompt]:
        """Return the prompts of these rows, each once, in the order of the rows; a row of plain text has none."""
        return [self._made(row) for row in dict.fromkeys(rows.tolist()) if row in self._last]

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> EvalPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvalPrompt]: ...
    def __getitem__(self, index: int | slice) -> EvalPrompt | list[EvalPrompt]:
        chosen = self._order[index]
        return self._made(chosen) if isinstance(chosen, int) else [self._made(row) for row in chosen]

    def _made(self, row: int) -> EvalPrompt:
        example, found = self._examples[self._last[row]], self._rows[row]
        answer = self._answer(found)
        return EvalPrompt(example.ids[: example.answer_start], _question(found), answer, example.source, found)


@dataclass(frozen=True)
class Report:
    """Counts of rows, and of the documents made of them; a row may give several documents.

    left_out: rows by reason. converted: counts of what was brought to the usual form. truncated: documents whose
    prompt was cut. split: texts cut into windows. labels: training rows of each label; None without data.labels.
    duplicates: rows that differ from an earlier one in case and whitespace at most. unused: columns that are not read.
    sha256: of all ids and masks. template_sha256, tokenizer_sha256: of the chat template and the tokenizer.
    """

    format: str
    rows: int
    train_documents: int
    eval_documents: int
    left_out: dict[str, int]
    converted: dict[str, int]
    truncated: int
    split: int
    duplicates: int
    unused: list[str]
    train_tokens: int
    eval_tokens: int
    supervised_tokens: int
    longest: int
    cached: bool
    sha256: str
    template_sha256: str | None
    tokenizer_sha256: str
    labels: dict[str, int] | None = None

    def __str__(self) -> str:
        left_out = "".join(f", {count:,} {reason} left out" for reason, count in self.left_out.items())
        converted = ", ".join(f"{count:,} {what}" for what, count in self.converted.items())
        return (
            f"{self.rows:,} rows ({self.format}): {self.train_documents:,} documents of {self.train_tokens:,} tokens "
            f"to train on, {self.supervised_tokens:,} of them supervised, longest {self.longest:,}; "
            f"{self.eval_documents:,} to evaluate on; {self.duplicates:,} duplicates{left_out}"
            + (f"; {self.truncated:,} prompts cut" if self.truncated else "")
            + (f"; {self.split:,} texts cut into windows" if self.split else "")
            + (f"; converted: {converted}" if converted else "")
            + (f"; labels: {_listed(self.labels)}" if self.labels else "")
            + (f"; columns not used: {excerpt(', '.join(self.unused))}" if self.unused else "")
        )


def _listed(counts: dict[str, int]) -> str:
    return excerpt(", ".join(f"{label} {count:,}" for label, count in counts.items()))


@dataclass(frozen=True)
class Dataset:
    """Training examples, eval examples, and the prompts of the eval set.

    answers: the labels in order (data/labels.py); without data.labels the distinct answers of the training rows, if
    these are few. classes: of a classifier, else None.
    """

    train: Examples
    eval: Examples
    eval_prompts: EvalPrompts
    answers: list[str] | None
    report: Report
    classes: Classes | None = None


def tokenized(found: Rows, tokenizer: Any, data: config.Data) -> Examples:
    """Render and tokenize rows, or load their examples from the cache. Bad rows go into the ledger."""
    rows, ledger = found.rows, found.ledger
    name = cache.key(rows, tokenizer, data) if len(rows) >= _CACHED_FROM_ROWS and not ledger.bad else None
    if name and (kept := cache.load(name, rows, ledger)) is not None:
        found.from_cache.append(name)
        return kept
    counts = Ledger(ledger.strict, bad=ledger.bad)  # of rendering, which are stored with the examples
    rendered = chat_template.turns(rows, data, tokenizer, counts)
    stored = InMemory(columns_of(list(tokenize.encode(rows, rendered, tokenizer, data.train_on, counts))))
    ledger.count(counts.left_out, counts.converted)
    examples = Examples(stored, [row.source for row in rows])
    if name and not ledger.bad and examples.supervised_tokens.all():
        cache.store(name, stored, counts)
    return examples


MakeExamples = Callable[[Rows, Any, config.Data], Sequence[Example]]  # `Objective.examples`


def prepare(data: config.Data, tokenizer: Any, make_examples: MakeExamples = tokenized) -> Dataset:
    """Read, check, split, tokenize and measure the rows of `data`.

    `tokenizer` is a fast one of transformers. Raises DataError for rows, ConfigError for settings and tokenizer,
    ResourceError for a package or hub dataset that cannot be read, SecurityError.
    """
    return prepare_rows(read(data), data, tokenizer, make_examples)


def prepare_rows(found: Rows, data: config.Data, tokenizer: Any, make_examples: MakeExamples = tokenized) -> Dataset:
    """Make examples of rows and measure them; all rows may be eval rows.

    Raises one DataError that lists all bad rows, including those found by `read`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
    rows, ledger = found.rows, found.ledger
    counts = labels.resolve(data, found.training_rows, found.eval_rows, ledger) if data.labels is not None else None
    examples = Examples.of(make_examples(found, tokenizer, data))
    for index in np.flatnonzero(examples.supervised_tokens == 0).tolist():
        example = examples[index]
        ledger.add_bad(example.source, "row", "has no supervised token", rows[example.row].answer)
    ledger.raise_bad()
    fitted, cut = lengths.fit(examples, found, data, tokenizer)
    in_eval = np.array(found.is_eval, dtype=np.bool_)[fitted.rows]
    train, eval_ = fitted.select(np.flatnonzero(~in_eval)), fitted.select(np.flatnonzero(in_eval))
    if not (eval_ if all(found.is_eval) else train):
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"no row is left to {'evaluate' if all(found.is_eval) else 'train on'}: {left_out}")
    report = Report(
        format=found.format.name, rows=len(rows), train_documents=len(train), eval_documents=len(eval_),
        left_out=dict(+ledger.left_out), converted=dict(+ledger.converted),
        truncated=cut if data.too_long is TooLong.truncate_prompt else 0,
        split=cut if data.too_long is TooLong.split else 0, duplicates=found.duplicates, unused=found.unused,
        train_tokens=int(train.lengths.sum()), eval_tokens=int(eval_.lengths.sum()),
        supervised_tokens=int(train.supervised_tokens.sum()), longest=int(fitted.lengths.max()),
        cached=bool(found.from_cache),
        sha256=_sha256(train, eval_), template_sha256=_template_sha256(tokenizer),
        tokenizer_sha256=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        labels=None if counts is None else dict(counts),
    )  # fmt: skip
    answers = few_answers(rows[row] for row in train.rows.tolist()) if counts is None else [*counts]
    prompts = EvalPrompts(eval_, rows, partial(chat_template.answer_of, data=data, tokenizer=tokenizer))
    return Dataset(train, eval_, prompts, answers, report)


def _question(row: Row) -> str:
    return next(str(m["content"]) for m in reversed(row.messages) if m["role"] == "user")


def few_answers(rows: Iterable[Row]) -> list[str] | None:
    """Return the distinct last answers of chats, sorted; None if there are more than MOST_LABELS, or no chats."""
    answers = {row.answer for row in rows if row.messages}
    return sorted(answers) if 0 < len(answers) <= MOST_LABELS else None


def _sha256(*sides: Examples) -> str:
    """Hash the length, ids and mask of each document, and where each side ends."""
    digest = hashlib.sha256()
    for examples in sides:
        for block in examples.blocks():
            ids, supervised = block.ids.data.cast("B"), block.supervised.data.cast("B")
            for start, stop in itertools.pairwise(block.starts.tolist()):
                digest.update((stop - start).to_bytes(8, "little"))
                digest.update(ids[4 * start : 4 * stop])
                digest.update(supervised[start:stop])
        digest.update(b"side")
    return digest.hexdigest()


def _template_sha256(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None
