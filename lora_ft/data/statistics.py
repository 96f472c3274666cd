"""Measure rows and their tokens before training: lengths, end tokens, prompts, tokens that people wrote.

    measure(found, dataset, data, tokenizer)  -> Statistics(median=51, unended=0, other_prompts=[], ...)
    warnings(statistics, dataset.report, data)     -> "3 of 40 rows have <think> in a prompt or text: ...", ...

`prepare` refuses rows that are wrong. The statistics check the resulting tokens independently, and find
what is allowed but rarely intended.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.config import TooLong
from lora_ft.data.chat_template import fitted, prompts, trials_of
from lora_ft.data.dataset import Dataset, Report
from lora_ft.data.examples import Examples
from lora_ft.data.read import Rows
from lora_ft.data.rows import Row, any_of, excerpt
from lora_ft.data.table import text_alone
from lora_ft.data.tokenize import Vocabulary

_BINS = 8
_PROMPTS_COMPARED = 32  # a third of a millisecond each
_FEW_SUPERVISED = 0.01
_MANY_DUPLICATES = 0.01


@dataclass(frozen=True)
class Statistics:
    """Counts of training documents, unless another unit is given. Lengths are in tokens.

    histogram: [shortest, longest, documents] of each bin.
    begin: the beginning-of-text token; None if the tokenizer puts none before text.
    begun: documents that begin with it.
    ends: documents by their supervised end token. unended: documents without one.
    prompts: rows whose prompt (of a classifier, text) was rendered again, as at inference. other_prompts: sources of
    the rows among them whose tokens do not begin with that prompt.
    written: rows by the added token that occurs in a prompt or plain text.
    asked_before: eval rows whose prompt (or text) equals that of a training row, up to case, whitespace and
    punctuation.
    """

    median: float
    percentile_95: float
    histogram: list[tuple[int, int, int]]
    begin: str | None
    begun: int
    ends: dict[str, int]
    unended: int
    prompts: int
    other_prompts: list[str]
    written: dict[str, int]
    asked_before: int


def measure(found: Rows, dataset: Dataset, data: config.Data, tokenizer: Any) -> Statistics:
    """Measure the rows `found` and the documents that `prepare_rows` made of them."""
    lengths = dataset.train.lengths
    vocabulary = Vocabulary(tokenizer)
    lead = vocabulary.lead
    classifies = dataset.classes is not None
    ends, unended = ({}, 0) if classifies else _ends(dataset.train, data, tokenizer)
    again = _texts_again if classifies else _prompts_again
    compared = list(again(found, dataset, data, vocabulary))
    return Statistics(
        median=float(np.median(lengths)),
        percentile_95=float(np.percentile(lengths, 95)),
        histogram=_histogram(lengths),
        begin=tokenizer.convert_ids_to_tokens(lead[0]) if lead else None,
        begun=_begun(dataset.train, lead[0]) if lead else 0,
        ends=ends,
        unended=unended,
        prompts=len(compared),
        other_prompts=[source for source, same in compared if not same],
        written=_written(found.rows, tokenizer),
        asked_before=_asked_before(found),
    )


def warnings(found: Statistics, report: Report, data: config.Data, classes: Classes | None = None) -> Iterator[str]:
    """Yield a sentence for each finding that is rarely intended; `classes` are those of a classifier."""
    documents = f"{report.train_documents:,} documents"
    if not classes and report.supervised_tokens < _FEW_SUPERVISED * report.train_tokens:
        part = report.supervised_tokens / report.train_tokens
        yield f"only {part:.2%} of the tokens are supervised: nearly all of the computation trains nothing"
    if found.unended:
        yield f"{found.unended:,} of {documents} have no supervised end token: the model would not learn to stop"
    if found.begin and found.begun < report.train_documents:
        yield (
            f"{report.train_documents - found.begun:,} of {documents} do not begin with {found.begin}, which the "
            "tokenizer puts before text: the chat template omits it"
        )
    if found.other_prompts and classes:
        yield (
            f"{len(found.other_prompts)} of {found.prompts} texts differ from what the tokenizer makes of them, first "
            f"at {found.other_prompts[0]}: other programs would give the model other tokens"
        )
    elif found.other_prompts:
        yield (
            f"{len(found.other_prompts)} of {found.prompts} prompts differ between training and inference, first at "
            f"{found.other_prompts[0]}: the chat template depends on more than the chat"
        )
    for token, count in found.written.items():
        yield (
            f"{count:,} of {report.rows:,} rows have {excerpt(token)} in a prompt or text: the model reads it as one "
            "token, not as text"
        )
    if not data.deduplicate and report.duplicates > _MANY_DUPLICATES * report.rows:
        yield f"{report.duplicates:,} of {report.rows:,} rows are duplicates: set data.deduplicate=true to drop them"
    if found.asked_before:
        yield (
            f"{found.asked_before:,} eval rows have the prompt of a training row (up to case, whitespace and "
            "punctuation): the eval loss partly measures memorized rows"
        )


def _histogram(lengths: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(shortest, longest + 1, _BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [
        (int(low), int(high) - 1, int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _begun(documents: Examples, token: int) -> int:
    """Count documents that begin with a token."""
    return sum(int((block.ids[block.starts[:-1]] == token).sum()) for block in documents.blocks())


def _last_of_rows(documents: Examples) -> NDArray[np.int64]:
    """Return the index of the last document of each row, in the order of the rows."""
    _, backwards = np.unique(documents.rows[::-1], return_index=True)
    return len(documents) - 1 - backwards


def _ends(documents: Examples, data: config.Data, tokenizer: Any) -> tuple[dict[str, int], int]:
    """Count documents by their supervised end token, and those without one; of a text in windows the last counts."""
    if data.too_long is TooLong.split:
        documents = documents.select(_last_of_rows(documents))
    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    last: Counter[int] = Counter()
    for block in documents.blocks():
        stops = block.starts[1:] - 1
        last.update(token for token in block.ids[stops][block.supervised[stops]].tolist() if token in ends)
    named = {str(tokenizer.convert_ids_to_tokens(token)): count for token, count in last.most_common()}
    return named, len(documents) - last.total()


def _prompts_again(
    found: Rows, dataset: Dataset, data: config.Data, vocabulary: Vocabulary
) -> Iterator[tuple[str, bool]]:
    """Yield the sources of some chats, and True if their tokens begin with the last prompt, rendered as at inference.

    The text is tokenized as a whole. This finds templates that depend on the time or on chance, and would find errors
    in the faster tokenization of `prepare`.
    """
    tokenizer = vocabulary.tokenizer
    if not tokenizer.chat_template:
        return
    trials = trials_of(tokenizer)
    last = _last_of_rows(dataset.train)
    rows = dataset.train.rows[last]
    chats = [place for place, row in enumerate(rows.tolist()) if found.rows[row].messages]
    for place in chats[:: max(1, len(chats) // _PROMPTS_COMPARED)][:_PROMPTS_COMPARED]:
        row, ids = found.rows[int(rows[place])], dataset.train[int(last[place])].ids
        if data.too_long is TooLong.truncate_prompt and len(ids) == data.max_length:
            continue  # it may have been cut
        chat, answers = fitted(row, data, trials)
        expected = vocabulary.ids_whole(prompts(chat.messages[: answers[-1]], tokenizer, row.tools))
        yield row.source, any(prompt == ids[: len(prompt)].tolist() for prompt in expected)


def _texts_again(
    found: Rows, dataset: Dataset, data: config.Data, vocabulary: Vocabulary
) -> Iterator[tuple[str, bool]]:
    """Yield the sources of some texts of a classifier, and True if their tokens are those of `tokenizer(text)`."""
    examples = dataset.train[:: max(1, len(dataset.train) // _PROMPTS_COMPARED)][:_PROMPTS_COMPARED]
    for example in examples:
        if data.too_long is TooLong.truncate_prompt and len(example.ids) == data.max_length:
            continue  # it may have been cut
        text = text_alone(str(found.rows[example.row].messages[0]["content"]), data.prompt)
        expected = vocabulary.tokenizer(text)["input_ids"]
        yield example.source, expected == example.ids[: example.prompt_end].tolist()


def _written(rows: list[Row], tokenizer: Any) -> dict[str, int]:
    """Count rows by each added token in a message that is not an answer, or in plain text.

    Answers may contain <think> and the like, which the model is to write. Added tokens of whitespace are only text.
    `prepare` refuses special tokens in chats, but plain text may use them on purpose to separate documents.
    """
    pattern = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
    counts: Counter[str] = Counter()
    for row in rows:
        if row.messages and tokenizer.chat_template:
            texts = [str(message["content"]) for message in row.messages if message["role"] != "assistant"]
        else:
            texts = [row.plain_prompt or "", row.answer]
        counts.update({token for text in texts for token in pattern.findall(text)})
    return dict(counts.most_common())


def _asked_before(found: Rows) -> int:
    """Count the eval rows with the question of a training row; rows that are equal as a whole are refused earlier."""
    if not any(found.is_eval):
        return 0
    texts = [_question(row) for row in found.rows]
    trained = {text for text, is_eval in zip(texts, found.is_eval, strict=True) if not is_eval}
    return sum(text in trained for text, is_eval in zip(texts, found.is_eval, strict=True) if is_eval and text)


def _question(row: Row) -> str:
    """Return letters and digits of a chat before its last answer, or of a whole text."""
    text = " ".join(str(m["content"]) for m in row.messages[:-1]) if row.messages else row.answer
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
