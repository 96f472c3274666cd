"""Settings and a tokenizer in, a checked dataset out: the front door of this folder.

    prepare(Data(path="chat.jsonl"), tokenizer) -> Dataset(train=[TokenRow ...], heldout=[...], questions=[...], ...)

Every row that was read is in the dataset, or counted in its report, or named in an error.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.config import TooLong
from lora_ft.data import cache, formats, split, templates, tokenize
from lora_ft.data.rows import Ledger, Row
from lora_ft.data.rows import TokenRow as TokenRow
from lora_ft.data.sources import records
from lora_ft.data.tokenize import Encoded
from lora_ft.errors import ConfigError, DataError

MOST_LABELS = 50

# A look into the cache costs 20 ms, mostly the tokenizer's hash; a thousand short rows take 120 ms to tokenize.
_CACHED_FROM_ROWS = 1000


@dataclass(frozen=True)
class Question:
    """A held-out prompt for generation and metrics.

    prompt_ids: int32, the row up to its last answer, generation prompt included. prompt: the last user message.
    answer: the reference. place: of the row.
    """

    prompt_ids: NDArray[np.int32]
    prompt: str
    answer: str
    place: str


@dataclass(frozen=True)
class Report:
    """What was read, and what became of it. Rows are counted as read; a row may give several documents.

    left_out: counts by reason. truncated: documents whose prompt was cut. duplicates: rows equal to an earlier
    one but for case and blanks. sha256: of all ids and masks. template_sha256, tokenizer_sha256: of what made them.
    """

    format: str
    rows: int
    train_documents: int
    heldout_documents: int
    left_out: dict[str, int]
    truncated: int
    duplicates: int
    train_tokens: int
    heldout_tokens: int
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
            f"{self.heldout_documents:,} held out; {self.duplicates:,} duplicates{left_out}"
            + (f"; {self.truncated:,} prompts cut" if self.truncated else "")
        )


@dataclass(frozen=True)
class Dataset:
    """answers: the distinct last answers of the training rows, sorted, where they are MOST_LABELS or fewer."""

    train: list[TokenRow]
    heldout: list[TokenRow]
    questions: list[Question]
    answers: list[str] | None
    report: Report


def prepare(data: config.Data, tokenizer: Any) -> Dataset:
    """Read, check, split, tokenize and measure the rows of `data`.

    The tokenizer is a fast one of transformers. Raises DataError (rows), ConfigError (settings, tokenizer),
    ResourceError (a package or hub dataset that is not here), SecurityError.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
    ledger = Ledger()
    found, rows = formats.rows(records(data.path, "data.path", data, ledger), data, ledger)
    rows, hashes, duplicates = _unique(rows, data, ledger)
    if data.eval_path or data.eval_split:
        key, apart = _apart(data)
        _, extra = formats.rows(records(apart.path, key, apart, ledger), data, ledger)
        extra, extra_hashes, more = _unique(extra, data, ledger)
        duplicates += more
        split.refuse_leaks(rows, extra, hashes, extra_hashes)
        aside = [False] * len(rows) + [True] * len(extra)
        rows, hashes = rows + extra, hashes + extra_hashes
    else:
        aside = split.held_out(hashes, data.eval_fraction)
    documents, cached = _tokenized(rows, data, tokenizer, ledger)
    fitted, truncated = _fitted(documents, rows, data, tokenizer, ledger)
    train = [d for d in fitted if not aside[d.row]]
    heldout = [d for d in fitted if aside[d.row]]
    if not train:
        raise DataError(f"no row is left to train on: {_reasons(ledger)}")
    report = Report(
        format=found.name, rows=len(rows), train_documents=len(train), heldout_documents=len(heldout),
        left_out=dict(+ledger.left_out), truncated=truncated, duplicates=duplicates,
        train_tokens=_tokens(train), heldout_tokens=_tokens(heldout),
        supervised_tokens=sum(int(d.supervised.sum()) for d in train), longest=max(len(d.ids) for d in fitted),
        cached=cached, sha256=_sha256(train, heldout), template_sha256=_template_sha256(tokenizer),
        tokenizer_sha256=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    )  # fmt: skip
    return Dataset(_token_rows(train, rows), _token_rows(heldout, rows), _questions(heldout, rows),
                   _labels(train, rows), report)  # fmt: skip


def _unique(rows: list[Row], data: config.Data, ledger: Ledger) -> tuple[list[Row], list[bytes], int]:
    """Rows, their content hashes and the number of duplicates, which `data.deduplicate` leaves out, counted."""
    hashes = [split.content_hash(row) for row in rows]
    first = {h: i for i, h in reversed(list(enumerate(hashes)))}
    duplicates = len(rows) - len(first)
    if not data.deduplicate:
        return rows, hashes, duplicates
    ledger.left_out["equal to an earlier row"] += duplicates
    kept = sorted(first.values())
    return [rows[i] for i in kept], [hashes[i] for i in kept], duplicates


def _apart(data: config.Data) -> tuple[str, config.Data]:
    """Where rows are held out that have a place of their own, as settings, and the setting that says so."""
    if data.eval_path:
        return "data.eval_path", replace(data, path=data.eval_path, split=data.eval_split or data.split)
    return "data.eval_split", replace(data, split=str(data.eval_split))


def _tokenized(rows: list[Row], data: config.Data, tokenizer: Any, ledger: Ledger) -> tuple[list[Encoded], bool]:
    """Documents of all rows in order, and whether they came from the cache."""
    name = cache.key(rows, tokenizer, data) if len(rows) >= _CACHED_FROM_ROWS else None
    if name and (kept := cache.load(name)) is not None:
        return kept, True
    rendered = templates.scripts(rows, data, tokenizer, ledger)
    documents = list(tokenize.encode(rows, rendered, tokenizer, data.train_on, ledger))
    ledger.raise_bad()
    for document in documents:
        if not document.supervised.any():
            ledger.add_bad(rows[document.row].place, "row", "has no supervised token", rows[document.row].answer)
    ledger.raise_bad()
    if name:
        cache.store(name, documents)
    return documents, False


def _fitted(
    documents: list[Encoded], rows: list[Row], data: config.Data, tokenizer: Any, ledger: Ledger
) -> tuple[list[Encoded], int]:
    """Documents of at most `data.max_length` tokens by `data.too_long`, and how many were cut to it."""
    long = [d for d in documents if len(d.ids) > data.max_length]
    if not long:
        return documents, 0
    if data.too_long is TooLong.drop:
        # A row goes as a whole: a part of its documents would be half a conversation.
        gone = {d.row for d in long}
        ledger.left_out["longer than data.max_length"] += len(gone)
        return [d for d in documents if d.row not in gone], 0
    if data.too_long is TooLong.error:
        advice = "raise it, or choose data.too_long=drop or truncate_prompt"
        raise DataError(f"{_too_long(long, rows, data)}: {advice}")
    cut = [_cut(d, data.max_length, tokenizer) if len(d.ids) > data.max_length else d for d in documents]
    if stuck := [d for d in cut if len(d.ids) > data.max_length]:
        raise DataError(f"{_too_long(stuck, rows, data)} without their prompts: answers are never cut")
    return cut, len(long)


def _too_long(long: list[Encoded], rows: list[Row], data: config.Data) -> str:
    worst = max(long, key=lambda d: len(d.ids))
    return (f"{len({d.row for d in long})} of {len(rows)} rows are longer than data.max_length={data.max_length}, "
            f"the longest is {rows[worst.row].place} with {len(worst.ids)} tokens")  # fmt: skip


def _cut(document: Encoded, max_length: int, tokenizer: Any) -> Encoded:
    """Take tokens from the start of the first prompt, behind a beginning-of-text token; as they were if too few."""
    keep = int(document.ids[0] == tokenizer.bos_token_id)
    excess = len(document.ids) - max_length
    # One token must stay before the first answer: something has to predict it.
    if document.prompt_end - excess < max(keep, 1):
        return document
    ids = np.concatenate([document.ids[:keep], document.ids[keep + excess :]])
    supervised = np.concatenate([document.supervised[:keep], document.supervised[keep + excess :]])
    supervised[0] = False
    return replace(document, ids=ids, supervised=supervised, prompt_end=document.prompt_end - excess,
                   answer_start=document.answer_start - excess)  # fmt: skip


def _token_rows(documents: Iterable[Encoded], rows: list[Row]) -> list[TokenRow]:
    return [TokenRow(d.ids, d.supervised, rows[d.row].place) for d in documents]


def _questions(documents: Iterable[Encoded], rows: list[Row]) -> list[Question]:
    """One for each held-out row that has a prompt, from its last document."""
    last = {d.row: d for d in documents}
    return [
        Question(d.ids[: d.answer_start], _asked(rows[d.row]), rows[d.row].answer, rows[d.row].place)
        for d in last.values()
        if rows[d.row].messages
    ]


def _asked(row: Row) -> str:
    return next(str(m["content"]) for m in reversed(row.messages) if m["role"] == "user")


def _labels(documents: Iterable[Encoded], rows: list[Row]) -> list[str] | None:
    answers = {rows[d.row].answer for d in documents if rows[d.row].messages}
    return sorted(answers) if 0 < len(answers) <= MOST_LABELS else None


def _tokens(documents: Iterable[Encoded]) -> int:
    return sum(len(d.ids) for d in documents)


def _reasons(ledger: Ledger) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items()) or "all are held out"


def _sha256(*sides: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for documents in sides:
        for d in documents:
            digest.update(len(d.ids).to_bytes(8, "little") + d.ids.tobytes() + d.supervised.tobytes())
        digest.update(b"side")
    return digest.hexdigest()


def _template_sha256(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None
