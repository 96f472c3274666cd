"""Make a checked dataset of the rows that the settings name, with a tokenizer.

    prepare(Data(path="chat.jsonl"), tokenizer) -> Dataset(train=[Example ...], eval=[...], eval_prompts=[...], ...)

Every row that was read is in the dataset, counted in its report, or named in an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.config import TooLong
from lora_ft.data import cache, chat_template, tokenize
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

    left_out: rows by reason. truncated: documents whose prompt was cut. split: texts cut into windows.
    duplicates: rows that differ from an earlier one in case and whitespace at most. unused: columns that are not read.
    sha256: of all ids and masks. template_sha256, tokenizer_sha256: of the chat template and the tokenizer.
    """

    format: str
    rows: int
    train_documents: int
    eval_documents: int
    left_out: dict[str, int]
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
        return (
            f"{self.rows:,} rows ({self.format}): {self.train_documents:,} documents of {self.train_tokens:,} tokens "
            f"to train on, {self.supervised_tokens:,} of them supervised, longest {self.longest:,}; "
            f"{self.eval_documents:,} to evaluate on; {self.duplicates:,} duplicates{left_out}"
            + (f"; {self.truncated:,} prompts cut" if self.truncated else "")
            + (f"; {self.split:,} texts cut into windows" if self.split else "")
            + (f"; columns not used: {excerpt(', '.join(self.unused))}" if self.unused else "")
        )


@dataclass(frozen=True)
class Dataset:
    """Training examples, eval examples, the prompts of the eval set, and the `labels` of the training rows."""

    train: list[Example]
    eval: list[Example]
    eval_prompts: list[EvalPrompt]
    answers: list[str] | None
    report: Report


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
    fitted, cut = _fitted(examples, found, data, tokenizer)
    train = [example for example in fitted if not found.is_eval[example.row]]
    eval_ = [example for example in fitted if found.is_eval[example.row]]
    if not (eval_ if all(found.is_eval) else train):
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"no row is left to {'evaluate' if all(found.is_eval) else 'train on'}: {left_out}")
    report = Report(
        format=found.format.name, rows=len(rows), train_documents=len(train), eval_documents=len(eval_),
        left_out=dict(+ledger.left_out), truncated=cut if data.too_long is TooLong.truncate_prompt else 0,
        split=cut if data.too_long is TooLong.split else 0, duplicates=found.duplicates, unused=found.unused,
        train_tokens=sum(len(e.ids) for e in train), eval_tokens=sum(len(e.ids) for e in eval_),
        supervised_tokens=sum(int(example.supervised.sum()) for example in train),
        longest=max(len(example.ids) for example in fitted), cached=bool(found.from_cache),
        sha256=_sha256(train, eval_), template_sha256=_template_sha256(tokenizer),
        tokenizer_sha256=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    )  # fmt: skip
    return Dataset(train, eval_, _eval_prompts(eval_, rows), labels(rows[example.row] for example in train), report)


def _fitted(examples: list[Example], found: Rows, data: config.Data, tokenizer: Any) -> tuple[list[Example], int]:
    """Return examples of at most `data.max_length` tokens, according to `data.too_long`, and the number of cut ones."""
    rows = found.rows
    long = [example for example in examples if len(example.ids) > data.max_length]
    if not long:
        return examples, 0
    if data.too_long is TooLong.drop:
        # All documents of the row are dropped: the others would be half a conversation.
        dropped = {example.row for example in long}
        found.ledger.left_out["longer than data.max_length"] += len(dropped)
        return [example for example in examples if example.row not in dropped], 0
    if data.too_long is TooLong.error:
        raise DataError(f"{_too_long(long, rows, data)}: {_advice(long, rows, data, tokenizer)}")
    if data.too_long is TooLong.split:
        if stuck := [example for example in long if rows[example.row].messages]:
            why = "data.too_long=split applies to plain text only"
            raise DataError(f"{_too_long(stuck, rows, data)}, and {why}: {_advice(stuck, rows, data, tokenizer)}")
        return [window for example in examples for window in _windows(example, data.max_length)], len(long)
    cut = [_cut(e, data.max_length, tokenizer) if len(e.ids) > data.max_length else e for e in examples]
    if stuck := [example for example in cut if len(example.ids) > data.max_length]:
        why = "even without their prompts, and answers are never cut"
        raise DataError(f"{_too_long(stuck, rows, data)} {why}: {_advice(stuck, rows, data, tokenizer)}")
    return cut, len(long)


def _too_long(long: list[Example], rows: list[Row], data: config.Data) -> str:
    worst = max(long, key=lambda d: len(d.ids))
    return (f"{len({d.row for d in long})} of {len(rows)} rows are longer than data.max_length={data.max_length}, "
            f"the longest is {worst.source} with {len(worst.ids)} tokens")  # fmt: skip


def _advice(long: list[Example], rows: list[Row], data: config.Data, tokenizer: Any) -> str:
    """Name the choices of data.too_long that work for all of these documents."""
    cures = ["drop"]
    if all(len(_cut(d, data.max_length, tokenizer).ids) <= data.max_length for d in long):
        cures.append("truncate_prompt")
    if not any(rows[d.row].messages for d in long):
        cures.append("split")
    return f"raise it, or choose data.too_long={' or '.join(cures)}"


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
        yield replace(document, ids=document.ids[start : start + max_length], supervised=supervised)


def _cut(document: Example, max_length: int, tokenizer: Any) -> Example:
    """Remove tokens from the start of the first prompt, after a beginning-of-text token.

    Returns the document unchanged if its first prompt is too short for that.
    """
    keep = int(document.ids[0] == tokenizer.bos_token_id)
    excess = len(document.ids) - max_length
    # One token must remain before the first answer, to predict its first token from.
    if document.prompt_end - excess < max(keep, 1):
        return document
    ids = np.concatenate([document.ids[:keep], document.ids[keep + excess :]])
    supervised = np.concatenate([document.supervised[:keep], document.supervised[keep + excess :]])
    supervised[0] = False
    return replace(document, ids=ids, supervised=supervised, prompt_end=document.prompt_end - excess,
                   answer_start=document.answer_start - excess)  # fmt: skip


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
