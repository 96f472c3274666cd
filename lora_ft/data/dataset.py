"""Make a checked dataset of the rows that the settings name, with a tokenizer.

    prepare(Data(path="chat.jsonl"), tokenizer) -> Dataset(train=[Example ...], eval=[...], eval_prompts=[...], ...)

Every row that was read is in the dataset, counted in its report, or named in an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.config import TooLong
from lora_ft.data import cache, chat_template, lengths, tokenize
from lora_ft.data.read import Rows, read
from lora_ft.data.rows import Example, Row, excerpt
from lora_ft.errors import ConfigError, DataError

MOST_LABELS = 50

# Looking into the cache takes 20 ms, mostly for the tokenizer's hash; tokenizing a thousand short rows takes 120 ms.
_CACHED_FROM_ROWS = 1000


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of the eval set, for generation and metrics.

    prompt_ids: int32 [length], the row up to its last answer, generation prompt included.
    prompt: the last user message. answer: the reference answer. source: file and line of the row.
    """

    prompt_ids: NDArray[np.int32]
    prompt: str
    answer: str
    source: str


@dataclass(frozen=True)
class Report:
    """Counts of rows, and of the documents made of them; a row may give several documents.

    left_out: rows by reason. converted: counts of what was brought to the usual form. truncated: documents whose
    prompt was cut. split: texts cut into windows.
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
            + (f"; columns not used: {excerpt(', '.join(self.unused))}" if self.unused else "")
        )


@dataclass(frozen=True)
class Dataset:
    """Training examples, eval examples, the prompts of the eval set, and the `labels` of the training rows.

    classes: of a classifier, else None.
    """

    train: list[Example]
    eval: list[Example]
    eval_prompts: list[EvalPrompt]
    answers: list[str] | None
    report: Report
    classes: Classes | None = None


def tokenized(found: Rows, tokenizer: Any, data: config.Data) -> list[Example]:
    """Render and tokenize rows, or load their examples from the cache. Bad rows go into the ledger."""
    rows, ledger = found.rows, found.ledger
    name = cache.key(rows, tokenizer, data) if len(rows) >= _CACHED_FROM_ROWS and not ledger.bad else None
    if name and (kept := cache.load(name, rows)) is not None:
        found.from_cache.append(name)
        return kept
    rendered = chat_template.turns(rows, data, tokenizer, ledger)
    examples = list(tokenize.encode(rows, rendered, tokenizer, data.train_on, ledger))
    if name and not ledger.bad and all(example.supervised.any() for example in examples):
        cache.store(name, examples)
    return examples


MakeExamples = Callable[[Rows, Any, config.Data], list[Example]]  # `Objective.examples`


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
    examples = make_examples(found, tokenizer, data)
    for example in examples:
        if not example.supervised.any():
            ledger.add_bad(example.source, "row", "has no supervised token", rows[example.row].answer)
    ledger.raise_bad()
    fitted, cut = lengths.fit(examples, found, data, tokenizer)
    train = [example for example in fitted if not found.is_eval[example.row]]
    eval_ = [example for example in fitted if found.is_eval[example.row]]
    if not (eval_ if all(found.is_eval) else train):
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"no row is left to {'evaluate' if all(found.is_eval) else 'train on'}: {left_out}")
    report = Report(
        format=found.format.name, rows=len(rows), train_documents=len(train), eval_documents=len(eval_),
        left_out=dict(+ledger.left_out), converted=dict(+ledger.converted),
        truncated=cut if data.too_long is TooLong.truncate_prompt else 0,
        split=cut if data.too_long is TooLong.split else 0, duplicates=found.duplicates, unused=found.unused,
        train_tokens=sum(len(e.ids) for e in train), eval_tokens=sum(len(e.ids) for e in eval_),
        supervised_tokens=sum(int(example.supervised.sum()) for example in train),
        longest=max(len(example.ids) for example in fitted), cached=bool(found.from_cache),
        sha256=_sha256(train, eval_), template_sha256=_template_sha256(tokenizer),
        tokenizer_sha256=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    )  # fmt: skip
    return Dataset(train, eval_, _eval_prompts(eval_, rows), labels(rows[example.row] for example in train), report)


def _eval_prompts(examples: Iterable[Example], rows: list[Row]) -> list[EvalPrompt]:
    """Make a prompt of the last example of each chat."""
    last = {example.row: example for example in examples if example.answer_start and rows[example.row].messages}
    return [
        EvalPrompt(e.ids[: e.answer_start], _question(rows[e.row]), rows[e.row].answer, e.source) for e in last.values()
    ]


def _question(row: Row) -> str:
    return next(str(m["content"]) for m in reversed(row.messages) if m["role"] == "user")


def labels(rows: Iterable[Row]) -> list[str] | None:
    """Return the distinct last answers of chats, sorted; None if there are more than MOST_LABELS, or no chats."""
    answers = {row.answer for row in rows if row.messages}
    return sorted(answers) if 0 < len(answers) <= MOST_LABELS else None


def _sha256(*sides: list[Example]) -> str:
    digest = hashlib.sha256()
    for examples in sides:
        for e in examples:
            digest.update(len(e.ids).to_bytes(8, "little") + e.ids.tobytes() + e.supervised.tobytes())
        digest.update(b"side")
    return digest.hexdigest()


def _template_sha256(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None
