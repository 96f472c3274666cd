"""Make a checked dataset of the rows that the settings name, with a tokenizer.

    prepare(Data(path="chat.jsonl"), tokenizer) -> Dataset(train=[Example ...], eval=[...], eval_prompts=[...], ...)

Every row that was read is in the dataset, counted in its report, or named in an error.
"""

import hashlib
import itertools
import json
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.config import TooLong
from lora_ft.data import cache, chat_template, encoding, labels, lengths, thoughts
from lora_ft.data.examples import Examples
from lora_ft.data.read import Rows, read
from lora_ft.data.row_store import StoredRows
from lora_ft.data.rows import Example, Row, excerpt
from lora_ft.errors import ConfigError, DataError

MOST_LABELS = 50

# Looking into the cache takes 20 ms, mostly for the tokenizer's hash; tokenizing a thousand short rows takes 120 ms.
_CACHED_FROM_ROWS = 1000


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of the eval set, for generation and metrics.

    prompt_ids: int32 [length], the row up to its last answer, generation prompt included.
    prompt: the last user message. answer: the reference answer. source: file and line of the row. row: the row itself.
    part: the name of its source in data.sources, "" without sources.
    """

    prompt_ids: NDArray[np.int32]
    prompt: str
    answer: str
    source: str
    row: Row
    part: str = ""


class Prompts(Sequence[EvalPrompt]):
    """Interface of the prompts of an eval set."""

    @abstractmethod
    def of_rows(self, rows: NDArray[np.int64]) -> list[EvalPrompt]:
        """Return the prompts of these rows, each once, in the order of the rows; a row of plain text has none."""


class EvalPrompts(Prompts):
    """The prompt of each chat of the eval set, made of its last example when it is asked for.

    is_chat: True for each row with messages. answer: returns the reference answer of a row. part: as in EvalPrompt.
    """

    def __init__(
        self,
        examples: Examples,
        rows: Sequence[Row],
        is_chat: NDArray[np.bool_],
        answer: Callable[[Row], str] = operator.attrgetter("answer"),
        part: str = "",
    ) -> None:
        self._examples, self._rows, self._answer, self._part = examples, rows, answer, part
        of_rows = examples.rows
        places = np.flatnonzero((examples.answer_starts > 0) & is_chat[of_rows])
        # The last example of each row, by row.
        self._of_rows, backwards = np.unique(of_rows[places][::-1], return_index=True)
        self._places = places[::-1][backwards]

    def of_rows(self, rows: NDArray[np.int64]) -> list[EvalPrompt]:
        distinct = np.array(list(dict.fromkeys(rows.tolist())), np.int64)
        numbers = np.searchsorted(self._of_rows, distinct)
        return [self[number] for number in numbers[np.isin(distinct, self._of_rows)].tolist()]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> EvalPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvalPrompt]: ...
    def __getitem__(self, index: int | slice) -> EvalPrompt | list[EvalPrompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        example, row = self._examples[int(self._places[number])], self._rows[int(self._of_rows[number])]
        prompt_ids = example.ids[: example.answer_start]
        return EvalPrompt(prompt_ids, _question(row), self._answer(row), example.source, row, self._part)


@dataclass(frozen=True)
class Report:
    """Counts of rows, and of the documents made of them; a row may give several documents.

    left_out: rows by reason. converted: counts of what was brought to the usual form. truncated: documents whose
    prompt was cut. split: texts cut into windows. labels: training rows of each label; None without data.labels.
    duplicates: rows that differ from an earlier one in case and whitespace at most. unused: columns that are not read.
    sha256: of all ids and masks. template_sha256, tokenizer_sha256: of the chat template and the tokenizer.
    sources: the reports of the sources of data.sources, if there are any; the other fields are their sums.
    is_stream: the training rows are streamed, and only those of the first block are counted.
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
    sources: dict[str, "Report"] = field(default_factory=dict)
    is_stream: bool = False
    labels: dict[str, int] | None = None

    def __str__(self) -> str:
        left_out = "".join(f", {count:,} {reason} left out" for reason, count in self.left_out.items())
        converted = ", ".join(f"{count:,} {what}" for what, count in self.converted.items())
        rows = f"{'the first ' if self.is_stream else ''}{self.rows:,} rows ({self.format})"
        return (
            f"{rows}: {self.train_documents:,} documents of {self.train_tokens:,} tokens "
            f"to train on, {self.supervised_tokens:,} of them supervised, longest {self.longest:,}; "
            f"{self.eval_documents:,} to evaluate on; {self.duplicates:,} duplicates{left_out}"
            + (f"; {self.truncated:,} prompts cut" if self.truncated else "")
            + (f"; {self.split:,} texts cut into windows" if self.split else "")
            + (f"; converted: {converted}" if converted else "")
            + (f"; labels: {_listed(self.labels)}" if self.labels else "")
            + (f"; columns not used: {excerpt(', '.join(self.unused))}" if self.unused else "")
            + "".join(f"\n  source {name}: {report}" for name, report in self.sources.items())
        )


def _listed(counts: dict[str, int]) -> str:
    return excerpt(", ".join(f"{label} {count:,}" for label, count in counts.items()))


@dataclass(frozen=True)
class Part:
    """A source of data.sources: the indices of its training examples and of its eval examples in the dataset."""

    train: range
    eval: range


@dataclass(frozen=True)
class Dataset:
    """Training examples, eval examples, and the prompts of the eval set.

    answers: the labels in order (data/labels.py); without data.labels the distinct answers of the training rows, if
    these are few.

    parts: those of each source of data.sources, in order; empty if there are no sources. classes: of a classifier, else
    None.

    If the training rows are streamed, `train` are those of the first block; eval_rows: the rows of the eval set.
    """

    train: Examples
    eval: Examples
    eval_prompts: Prompts
    answers: list[str] | None
    report: Report
    parts: dict[str, Part] = field(default_factory=dict)
    eval_rows: StoredRows | None = None
    classes: Classes | None = None

    @property
    def named_parts(self) -> dict[str, Part]:
        """The parts, or the whole dataset under the name "" if there are no sources."""
        return self.parts or {"": Part(range(len(self.train)), range(len(self.eval)))}


def tokenized(found: Rows, tokenizer: Any, data: config.Data) -> Examples:
    """Render and tokenize rows, or load their examples from the cache. Bad rows go into the ledger."""
    rows, ledger = found.rows, found.ledger
    name = cache.key(rows.digest, tokenizer, data) if _is_cached(found, data) else None
    if name and (kept := cache.load(name)) is not None:
        found.from_cache.append(name)
        stored, counts = kept
    else:
        stored, counts = encoding.encode(rows, tokenizer, data, ledger)
    ledger.count(counts["left_out"], counts["converted"])
    found.written.update(counts["written"])
    examples = Examples(stored, rows.sources)
    if name and not (kept or ledger.bad) and examples.supervised_tokens.all():
        cache.store(name, stored, counts)
    return examples


def _is_cached(found: Rows, data: config.Data) -> bool:
    return len(found.rows) >= _CACHED_FROM_ROWS and not (found.ledger.bad or data.stream)


MakeExamples = Callable[[Rows, Any, config.Data], Sequence[Example]]  # `Objective.examples`


def prepare(data: config.Data, tokenizer: Any, make_examples: MakeExamples = tokenized) -> Dataset:
    """Read, check, split, tokenize and measure the rows of `data`.

    `tokenizer` is a fast one of transformers. Raises DataError for rows, ConfigError for settings and tokenizer,
    ResourceError for a package or hub dataset that cannot be read, SecurityError.
    """
    return prepare_rows(read(data), data, tokenizer, make_examples)


def prepare_rows(
    found: Rows, data: config.Data, tokenizer: Any, make_examples: MakeExamples = tokenized, part: str = ""
) -> Dataset:
    """Make examples of rows and measure them; all rows may be eval rows. part: their name in data.sources.

    Raises one DataError that lists all bad rows, including those found by `read`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
    rows, ledger = found.rows, found.ledger
    counts = None if data.labels is None else labels.resolve(data, rows, found.is_eval, ledger)
    fitted, cut = documents(found, data, tokenizer, make_examples)
    in_eval, is_all_eval = found.is_eval[fitted.rows], bool(found.is_eval.all())
    train, eval_ = fitted.select(np.flatnonzero(~in_eval)), fitted.select(np.flatnonzero(in_eval))
    if not (eval_ if is_all_eval else train):
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"no row is left to {'evaluate' if is_all_eval else 'train on'}: {left_out}")
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
        is_stream=data.stream,
        labels=counts,
    )  # fmt: skip
    answers = few_answers(rows.select(np.unique(train.rows))) if counts is None else [*counts]
    trials = chat_template.trials_of(tokenizer, data) if tokenizer.chat_template else None
    answer_of = partial(chat_template.answer_of, data=data, trials=trials)
    prompts = EvalPrompts(eval_, rows, rows.is_chat, answer_of, part)
    return Dataset(train, eval_, prompts, answers, report, eval_rows=found.eval_rows if data.stream else None)


def documents(found: Rows, data: config.Data, tokenizer: Any, make_examples: MakeExamples) -> tuple[Examples, int]:
    """Make examples of at most `data.max_length` tokens; also return the number of those that were cut."""
    ledger = found.ledger
    examples = Examples.of(make_examples(found, tokenizer, data))
    for index in np.flatnonzero(examples.supervised_tokens == 0).tolist():
        example = examples[index]
        ledger.add_bad(example.source, "row", "has no supervised token", found.rows[example.row].answer)
    ledger.raise_bad()
    return lengths.fit(examples, found, data, tokenizer)


def _question(row: Row) -> str:
    return next(str(m["content"]) for m in reversed(row.messages) if m["role"] == "user")


def few_answers(rows: Iterable[Row]) -> list[str] | None:
    """Return the distinct last answers of chats, without thoughts; None for none or more than MOST_LABELS."""
    answers: set[str] = set()
    for row in rows:
        if row.messages:
            answers.add(thoughts.after(row.answer))
            if len(answers) > MOST_LABELS:
                return None
    return sorted(answers) or None


def _sha256(*sides: Examples) -> str:
    """Hash the length, ids, mask and weights of each document, and where each side ends."""
    digest = hashlib.sha256()
    for examples in sides:
        for block in examples.blocks():
            ids, supervised = block.ids.data.cast("B"), block.supervised.data.cast("B")
            weights = None if block.weights is None else block.weights.data.cast("B")
            for start, stop in itertools.pairwise(block.starts.tolist()):
                digest.update((stop - start).to_bytes(8, "little"))
                digest.update(ids[4 * start : 4 * stop])
                digest.update(supervised[start:stop])
                if weights is not None:
                    digest.update(weights[4 * start : 4 * stop])
        digest.update(b"side")
    return digest.hexdigest()


def _template_sha256(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None
