"""Make one dataset of several sources, each read with its own settings: `data.sources`, `data.mix`.

    prepare(data, tokenizer) -> Dataset(train=[chat ..., wiki ...], parts={"chat": Part(train=range(0, 40), ...), ...})
    mix_of(dataset, data)    -> Mix(shares={"chat": 0.7, "wiki": 0.3}, ...)       None without sources

Sources are one after the other, in the order of their names. A row that is an eval row of one source and a training
row of another is refused; `data.deduplicate` also leaves out rows of earlier sources.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft import config, mixing
from lora_ft.classes import Classes
from lora_ft.config import MixUntil
from lora_ft.data import split
from lora_ft.data.dataset import (
    MOST_LABELS,
    Dataset,
    EvalPrompt,
    MakeExamples,
    Part,
    Prompts,
    Report,
    prepare_rows,
    tokenized,
)
from lora_ft.data.examples import Examples
from lora_ft.data.groups import Groups
from lora_ft.data.joined import Chained, joined
from lora_ft.data.read import EQUAL_TO_EARLIER, Rows, read, refuse_leaks
from lora_ft.data.rows import excerpt
from lora_ft.data.sampler import Source
from lora_ft.errors import DataError, LoraFtError


@dataclass(frozen=True)
class Mix:
    """The training examples of each source as a range of indices, its share, and the end of an epoch."""

    parts: Mapping[str, range]
    shares: Mapping[str, float]
    until: MixUntil

    def counts(self, indices: NDArray[np.int64], values: Any) -> dict[str, float]:
        """Return the sum of the values of these examples, by source."""
        ends = [part.stop for part in self.parts.values()]
        sums = np.bincount(np.searchsorted(ends, indices, side="right"), values, len(ends))
        return dict(zip(self.parts, sums.tolist(), strict=True))

    def passes(self, steps: Sequence[NDArray[np.int64]]) -> dict[str, float]:
        """Return how often each source is seen in these steps."""
        seen = np.concatenate([*steps])
        counts = self.counts(seen, np.ones(len(seen)))
        return {name: count / max(1, len(self.parts[name])) for name, count in counts.items()}

    def epochs(self, steps: Sequence[NDArray[np.int64]]) -> float:
        """Return the number of epochs of a run with these steps."""
        passes = [number for name, number in self.passes(steps).items() if self.shares[name]]
        return (max if self.until is MixUntil.first else min)(passes)


class MixedPrompts(Prompts):
    """The prompts of several sources, one after the other. num_rows: the number of rows of each source."""

    def __init__(self, each: Sequence[Prompts], num_rows: Sequence[int]) -> None:
        self._each, self._all = each, Chained(each)
        self._firsts = [*itertools.accumulate(num_rows, initial=0)]

    def of_rows(self, rows: NDArray[np.int64]) -> list[EvalPrompt]:
        found = []
        for row in dict.fromkeys(rows.tolist()):
            source = bisect.bisect_right(self._firsts, row) - 1
            found += self._each[source].of_rows(np.array([row - self._firsts[source]]))
        return found

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> EvalPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvalPrompt]: ...
    def __getitem__(self, index: int | slice) -> EvalPrompt | list[EvalPrompt]:
        return self._all[index]


def mix_of(dataset: Dataset, data: config.Data) -> Mix | None:
    """Return the mix of a dataset that `prepare` made with these settings; None if they have no sources."""
    if not dataset.parts:
        return None
    return Mix({name: part.train for name, part in dataset.parts.items()}, mixing.shares(data), data.mix_until)


def sources_of(examples: Examples, groups: Groups, mix: Mix) -> list[Source]:
    """Return the sources of a mix as the sampler takes them; `groups` are those of all examples."""
    leaders = groups.members[groups.starts[:-1]]
    supervised = np.add.reduceat(examples.supervised_tokens[groups.members].astype(np.float64), groups.starts[:-1])
    found = []
    for name, part in mix.parts.items():
        first, stop = np.searchsorted(leaders, (part.start, part.stop)).tolist()
        found.append(Source(name, mix.shares[name], first, groups.lengths[first:stop], supervised[first:stop]))
    return found


def read_sources(data: config.Data) -> dict[str, Rows]:
    """Read the rows of each source, or those of `data` under the name "". Raises the errors of `read`.

    Raises DataError if an eval row of a source is a training row of any source.
    """
    found: dict[str, Rows] = {}
    for name, source in mixing.named(data).items():
        with _of_source(name):
            found[name] = _without_earlier(read(source), found, source)
    if len(found) > 1:
        refuse_leaks([*found.values()], [*found.values()])
    return found


def prepare(data: config.Data, tokenizer: Any, make_examples: MakeExamples = tokenized) -> Dataset:
    """Read and tokenize the rows of `data` or of all its sources. Raises the errors of `dataset.prepare`."""
    return combined(prepare_each(read_sources(data), data, tokenizer, make_examples))


def prepare_each(
    found: Mapping[str, Rows],
    data: config.Data,
    tokenizer: Any,
    make_examples: MakeExamples = tokenized,
    classes: Classes | None = None,
) -> dict[str, Dataset]:
    """Make a dataset of the rows of each source that `read_sources` has read; `classes` are those of a classifier."""
    made = {}
    for name, source in mixing.named(data).items():
        with _of_source(name):
            own = prepare_rows(found[name], source, tokenizer, make_examples, name)
            made[name] = replace(own, classes=classes)
    return made


def combined(made: Mapping[str, Dataset]) -> Dataset:
    """Return the examples of all sources, one source after the other; the source without a name is alone.

    Raises DataError for sources with different labels.
    """
    if "" in made:
        return made[""]
    each = list(made.values())
    num_rows = [own.report.rows for own in each]
    train, evaluated = (joined([getattr(own, side) for own in each], num_rows) for side in ("train", "eval"))
    parts, trained, tested = {}, 0, 0
    for name, own in made.items():
        parts[name] = Part(
            range(trained, trained := trained + len(own.train)), range(tested, tested := tested + len(own.eval))
        )
    prompts = MixedPrompts([own.eval_prompts for own in each], num_rows)
    report = _report({name: own.report for name, own in made.items()})
    return Dataset(train, evaluated, prompts, _answers(made), report, parts, classes=each[0].classes)


@contextlib.contextmanager
def _of_source(name: str) -> Iterator[None]:
    """Name the source in an error of the block."""
    try:
        yield
    except LoraFtError as error:
        if not name:
            raise
        raise type(error)(f"data.sources.{name}: {error}") from error


def _without_earlier(found: Rows, earlier: Mapping[str, Rows], source: config.Data) -> Rows:
    """Count the rows that earlier sources have, and leave them out if `data.deduplicate` is true."""
    if not earlier:
        return found
    seen = np.concatenate([rows.rows.hashes for rows in earlier.values()])
    kept = np.flatnonzero(~split.are_among(found.rows.hashes, seen))
    count = len(found.rows) - len(kept)
    if not count:
        return found
    if not source.deduplicate:
        return replace(found, duplicates=found.duplicates + count)
    found.ledger.left_out[EQUAL_TO_EARLIER] += count
    return replace(
        found,
        rows=found.rows.select(kept),
        is_eval=found.is_eval[kept],
        duplicates=found.duplicates + count,
    )


def _answers(made: Mapping[str, Dataset]) -> list[str] | None:
    """Return the labels of the sources that have data.labels, else the different answers of all if these are few."""
    labelled = {name: list(own.report.labels) for name, own in made.items() if own.report.labels is not None}
    if labelled:
        first, labels = next(iter(labelled.items()))
        for name, others in labelled.items():
            if set(others) != set(labels):
                raise DataError(
                    f"data.sources.{name} has the labels {excerpt(', '.join(others))}, and data.sources.{first} has "
                    f"{excerpt(', '.join(labels))}: sources with data.labels must have the same labels, which a list "
                    "in data.labels can name"
                )
        return labels
    if any(own.answers is None for own in made.values()):
        return None
    together = sorted({answer for own in made.values() for answer in own.answers or ()})
    return together if len(together) <= MOST_LABELS else None


def _report(reports: Mapping[str, Report]) -> Report:
    """Return the sums of the reports of all sources."""
    each = list(reports.values())

    def total(name: str) -> int:
        return sum(int(getattr(report, name)) for report in each)

    def together(name: str) -> dict[str, int]:
        counts = Counter[str]()
        for report in each:
            counts.update(getattr(report, name) or {})  # `+` would leave out labels without rows
        return dict(counts)

    return replace(
        each[0],
        rows=total("rows"),
        train_documents=total("train_documents"),
        eval_documents=total("eval_documents"),
        truncated=total("truncated"),
        split=total("split"),
        duplicates=total("duplicates"),
        train_tokens=total("train_tokens"),
        eval_tokens=total("eval_tokens"),
        supervised_tokens=total("supervised_tokens"),
        format=" and ".join(dict.fromkeys(report.format for report in each)),
        left_out=together("left_out"),
        converted=together("converted"),
        unused=list(dict.fromkeys(name for report in each for name in report.unused)),
        longest=max(report.longest for report in each),
        cached=all(report.cached for report in each),
        sha256=hashlib.sha256(json.dumps([[n, r.sha256] for n, r in reports.items()]).encode()).hexdigest(),
        sources=dict(reports),
        labels=together("labels") if any(report.labels is not None for report in each) else None,
    )
