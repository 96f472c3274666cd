"""Turn the columns of the usual data formats into one type, `Row`.

    messages           {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    conversations      {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    prompt_completion  {"prompt": "2+2?", "completion": "4"}          texts, or two lists of messages
    alpaca             {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]]}
    table              {"english": "good", "german": "gut"}           with data.prompt and data.answer
    text               {"text": "Two and two are four."}

A message with "weight": 0, "train": false or "loss": false is not learned; "tools" go to the chat template. A column
"system" becomes the first message of a chat of any format, unless the chat has a system message.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from lora_ft import config
from lora_ft.config import Format
from lora_ft.data import labels, table
from lora_ft.data.messages import check_order, messages_of, optional_text, text_of, tools_of, with_system
from lora_ft.data.rows import ANSWER_CUE, Ledger, Message, Record, Row, RowError, excerpt, is_blank
from lora_ft.errors import ConfigError, DataError

Parse = Callable[[str, dict[str, Any], Ledger], Row]


def rows(records: Iterable[Record], data: config.Data, ledger: Ledger) -> tuple[Format, list[Row], list[str]]:
    """Read at most `data.max_rows` records; return the format, the rows, and the columns that are not read.

    Bad rows go into the ledger, which is raised if no row is good. Raises ConfigError for settings that name columns
    which no record has, DataError if no format fits or there is no row.
    """
    kept = list(islice(records, data.max_rows))
    if not kept:
        ledger.raise_bad()
        raise DataError(f"{data.path}: there are no rows")
    columns = Counter(tuple(_renamed(values, data.columns)) for _, values in kept)
    names = list(dict.fromkeys(name for _, values in kept for name in values))
    found, parse, read = _parser(names, columns, data)
    parse = labels.checked(parse, data)
    parsed: list[Row] = []
    for source, values in kept:
        try:
            parsed.append(parse(source, _renamed(values, data.columns), ledger))
        except RowError as error:
            ledger.add_bad(source, _name_in_file(error.name, data.columns), error.reason, values)
    if not parsed:
        ledger.raise_bad()
    in_file = {data.columns.get(name, name) for name in read}
    return found, parsed, [name or "(unnamed)" for name in names if name not in in_file]


def _parser(
    names: list[str], columns: Counter[tuple[str, ...]], data: config.Data
) -> tuple[Format, Parse, Iterable[str]]:
    """Return the format of rows with these columns, the function that makes a row, and the columns that it reads.

    names: of the file's columns. columns: the number of rows with each set of columns, after renaming.
    """
    if missing := [name for name in data.columns.values() if name not in names]:
        raise ConfigError(f"data.columns names {missing[0]}, which is not a column of {data.path}: {_listed(names)}")
    found = _detect(columns, data)
    if found is Format.table:
        return found, *table.parser(data, {*names, *data.columns})
    if data.prompt is not None or data.answer is not None:
        raise ConfigError(f"data.prompt and data.answer are templates of data.format=table, got {found.name}")
    known = _FORMATS[found].columns
    if unknown := [name for name in data.columns if name not in known]:
        raise ConfigError(f"data.columns: {unknown[0]} is no column of format {found.name}, which has {_listed(known)}")
    return found, _FORMATS[found].parse, known


def _detect(columns: Counter[tuple[str, ...]], data: config.Data) -> Format:
    """Return the format whose required columns most rows have; the other rows will be bad. DataError if none fits.

    If no single row has all columns of a format, all rows together may have them.
    """
    if data.format is not Format.auto:
        return data.format
    if data.prompt is not None or data.answer is not None:
        return Format.table
    votes: Counter[Format] = Counter()
    for names, count in columns.items():
        if found := _format_of(set(names)):
            votes[found] += count
    if votes:
        return votes.most_common(1)[0][0]
    together = {name for names in columns for name in names}
    if found := _format_of(together):
        return found
    if together >= _PREFERENCE:
        raise DataError(
            f"{data.path}: chosen and rejected are preference pairs; supervised rows have prompt and completion"
        )
    raise DataError(
        f"{data.path}: no format has the columns {_listed(together)}: set data.format, rename columns with "
        "data.columns, or write data.prompt and data.answer as templates over them"
    )


def _format_of(names: set[str]) -> Format | None:
    """Return the first format whose required columns are all there; None for preference pairs, unless it is a chat."""
    found = next((found for found, shape in _FORMATS.items() if shape.required <= names), None)
    is_chat = found in (Format.messages, Format.conversations)
    return found if is_chat or not names >= _PREFERENCE else None


def _listed(names: Iterable[str]) -> str:
    return excerpt(", ".join(sorted(map(str, names))), longest=300)


def _renamed(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return values by the names that formats expect; a column that the row lacks stays missing."""
    if not columns:
        return values
    given = {name: values[in_file] for name, in_file in columns.items() if in_file in values}
    return {name: value for name, value in values.items() if name not in columns} | given


def _name_in_file(name: str, columns: dict[str, str]) -> str:
    """Undo the renaming of columns for an error: messages[1] -> dialogue[1]."""
    column, bracket, index = name.partition("[")
    return columns.get(column, column) + bracket + index


def _chat_row(column: str, source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    return _chat(source, with_system(messages_of(values, column), optional_text(values, "system")), values)


def _chat(source: str, messages: list[Message], values: dict[str, Any], context: frozenset[int] = frozenset()) -> Row:
    """Make the row of a chat; the weights of its messages become `Row.excluded`."""
    check_order(messages)
    excluded = frozenset(i for i, message in enumerate(messages) if message.pop("weight", 1) == 0)
    answer = messages[-1].get("content") or ""
    return Row(source, messages, answer, context=context | excluded, excluded=excluded, tools=tools_of(values))


def _prompt_completion_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    system = optional_text(values, "system")
    if isinstance(values.get("prompt"), list):
        prompt_messages = with_system(messages_of(values, "prompt"), system)
        context = frozenset(i for i, message in enumerate(prompt_messages) if message["role"] == "assistant")
        return _chat(source, prompt_messages + messages_of(values, "completion"), values, context)
    prompt, completion = text_of(values, "prompt"), text_of(values, "completion")
    messages = with_system([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], system)
    plain = f"{system}\n\n{prompt}" if system else prompt
    return Row(source, messages, completion, plain_prompt=plain, tools=tools_of(values))


def _alpaca_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    """Make a chat whose user message is instruction and input; the plain prompt has Alpaca's headings instead."""
    instruction, output = text_of(values, "instruction"), text_of(values, "output")
    extra, system = optional_text(values, "input"), optional_text(values, "system")
    turns = [*_history(values), (f"{instruction}\n{extra}" if extra else instruction, output)]
    messages = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in turns[:-1]:
        plain += f"### Instruction:\n{question}{ANSWER_CUE}{answer}\n\n"
    heading = f"\n\n### Input:\n{extra}" if extra else ""
    return Row(source, messages, output, f"{plain}### Instruction:\n{instruction}{heading}{ANSWER_CUE}")


def _history(values: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = values.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        texts = pair if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) and not is_blank(text) for text in texts):
            raise RowError("history", "must be a list of [instruction, answer]")
    return [(question, answer) for question, answer in pairs]


def _text_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    return Row(source, [], text_of(values, "text"), plain_prompt="")


@dataclass(frozen=True)
class _Shape:
    """A format: the columns that identify it, all columns that it reads, and the function that makes a row."""

    required: set[str]
    columns: tuple[str, ...]
    parse: Parse


# In the order in which they are tried.
_FORMATS = {
    Format.messages: _Shape({"messages"}, ("messages", "system", "tools"), partial(_chat_row, "messages")),
    Format.conversations: _Shape(
        {"conversations"}, ("conversations", "system", "tools"), partial(_chat_row, "conversations")
    ),
    Format.prompt_completion: _Shape(
        {"prompt", "completion"}, ("prompt", "completion", "system", "tools"), _prompt_completion_row
    ),
    Format.alpaca: _Shape(
        {"instruction", "output"}, ("instruction", "input", "output", "system", "history"), _alpaca_row
    ),
    Format.text: _Shape({"text"}, ("text",), _text_row),
}
_PREFERENCE = {"chosen", "rejected"}
