"""Turn the columns of the usual data formats into one type, `Row`.

    messages           {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    conversations      {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    prompt_completion  {"prompt": "2+2?", "completion": "4"}          texts, or two lists of messages
    alpaca             {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]]}
    table              {"english": "good", "german": "gut"}           with data.prompt and data.answer
    text               {"text": "Two and two are four."}

Columns of other names are read as those of a format if they have one meaning: question and answer as prompt and
completion, instruction and response as instruction and output, conversation as conversations.

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
from lora_ft.config import Format, Turns
from lora_ft.data import labels, synonyms, table
from lora_ft.data.json_values import as_text, decoded
from lora_ft.data.messages import messages_of, optional_text, text_of, with_system
from lora_ft.data.rows import ANSWER_CUE, Ledger, LeftOut, Message, Record, Row, RowError, excerpt, is_blank
from lora_ft.data.synonyms import Names
from lora_ft.data.tool_calls import drop_undeclared_nulls, tools_of
from lora_ft.data.turns import arrange
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
        except LeftOut as reason:
            ledger.left_out[str(reason)] += 1
        except RowError as error:
            shown = values if error.shown is None else error.shown
            ledger.add_bad(source, _name_in_file(error.name, data.columns), error.reason, shown)
    if not parsed:
        ledger.raise_bad()
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"{data.path}: every row is left out: {left_out}")
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
    has_templates = data.prompt is not None or data.answer is not None
    if data.format is Format.table or (data.format is Format.auto and has_templates):
        return Format.table, *table.parser(data, {*names, *data.columns})
    if has_templates:
        raise ConfigError(f"data.prompt and data.answer are templates of data.format=table, got {data.format.name}")
    found = _detect(columns, data)
    shape = _FORMATS[found.format].read_as(found.present(name for row in columns for name in row))
    if unknown := [name for name in data.columns if name not in shape.columns]:
        known = _listed(shape.columns)
        raise ConfigError(f"data.columns: {unknown[0]} is no column of format {found.format.name}, which has {known}")
    return found.format, partial(_arranged, shape.parse, data.turns), shape.columns


def _arranged(parse: Parse, turns: Turns, source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    return arrange(parse(source, values, ledger), turns, ledger)


def _detect(columns: Counter[tuple[str, ...]], data: config.Data) -> Names:
    """Return the format whose required columns most rows have; the other rows will be bad. DataError if none fits.

    If no single row has all columns of a format, all rows together may have them.
    """
    together = {name for names in columns for name in names}
    votes: Counter[tuple[Names, ...]] = Counter()
    for names, count in columns.items():
        votes[_fitting(set(names), data)] += count
    del votes[()]
    if fits := max(votes, key=votes.__getitem__, default=_fitting(together, data)):
        synonyms.check(fits, together, data)
        return fits[0]
    if data.format is not Format.auto:
        return _FORMATS[data.format].names(data.format)
    if together >= _PREFERENCE:
        raise DataError(
            f"{data.path}: chosen and rejected are preference pairs; supervised rows have prompt and completion"
        )
    raise DataError(
        f"{data.path}: no format has the columns {_listed(together)}: set data.format, rename columns with "
        "data.columns, or write data.prompt and data.answer as templates over them"
    )


def _fitting(names: set[str], data: config.Data) -> tuple[Names, ...]:
    """Return the format of rows with these columns, by its own names or by synonyms; several if they have two meanings.

    Columns that data.columns names have the meaning that it gives them. Empty if no format fits, and for preference
    pairs, unless they hold a chat or data.format is set.
    """
    chosen = data.format
    own = next(
        (form for form, shape in _FORMATS.items() if chosen in (Format.auto, form) and shape.required <= names), None
    )
    found = [_FORMATS[own].names(own)] if own else []
    required = _FORMATS[own].required if own else set()
    is_pair = chosen is Format.auto and own in (Format.prompt_completion, Format.alpaca)
    if not own or (is_pair and required.isdisjoint(data.columns)):
        others = synonyms.fitting(names - (set(data.columns.values()) - set(data.columns)), chosen)
        found += [other for other in others if required.isdisjoint(other.in_file)]
    if chosen is Format.auto and names >= _PREFERENCE:
        found = [names for names in found if names.format in (Format.messages, Format.conversations)]
    return tuple(found)


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
    messages = with_system(messages_of(values, column, ledger), optional_text(values, "system", ledger))
    return _chat(source, messages, values, ledger)


def _chat(
    source: str, messages: list[Message], values: dict[str, Any], ledger: Ledger, context: frozenset[int] = frozenset()
) -> Row:
    """Make the row of a chat; the weights of its messages become `Row.excluded`."""
    tools = tools_of(values, ledger)
    messages = drop_undeclared_nulls(messages, tools, ledger)
    excluded = frozenset(i for i, message in enumerate(messages) if message.pop("weight", 1) == 0)
    answer = messages[-1].get("content") or ""
    return Row(source, messages, answer, context=context | excluded, excluded=excluded, tools=tools)


def _prompt_completion_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    system = optional_text(values, "system", ledger)
    if isinstance(values.get("prompt"), list):
        prompt_messages = with_system(messages_of(values, "prompt", ledger), system)
        context = frozenset(i for i, message in enumerate(prompt_messages) if message["role"] == "assistant")
        return _chat(source, prompt_messages + messages_of(values, "completion", ledger), values, ledger, context)
    prompt, completion = text_of(values, "prompt", ledger), text_of(values, "completion", ledger)
    messages = with_system([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], system)
    plain = f"{system}\n\n{prompt}" if system else prompt
    return Row(source, messages, completion, plain_prompt=plain, tools=tools_of(values, ledger))


def _alpaca_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    """Make a chat whose user message is instruction and input; the plain prompt has Alpaca's headings instead."""
    instruction, output = text_of(values, "instruction", ledger), text_of(values, "output", ledger)
    extra, system = optional_text(values, "input", ledger), optional_text(values, "system", ledger)
    turns = [*_history(values, ledger), (f"{instruction}\n{extra}" if extra else instruction, output)]
    messages = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in turns[:-1]:
        plain += f"### Instruction:\n{question}{ANSWER_CUE}{answer}\n\n"
    heading = f"\n\n### Input:\n{extra}" if extra else ""
    return Row(source, messages, output, f"{plain}### Instruction:\n{instruction}{heading}{ANSWER_CUE}")


def _history(values: dict[str, Any], ledger: Ledger) -> list[tuple[str, str]]:
    """Return the earlier pairs of instruction and answer, which may be JSON text."""
    pairs = values.get("history") or []
    if isinstance(pairs, str) and not is_blank(pairs):
        pairs = decoded("history", pairs)
        ledger.convert("history", "histories read from JSON text", pairs)
    found = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        texts = [as_text("history", text, ledger) for text in pair] if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) and not is_blank(text) for text in texts):
            raise RowError("history", "must be a list of [instruction, answer]")
        found.append((str(texts[0]), str(texts[1])))
    return found


def _text_row(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    return Row(source, [], text_of(values, "text", ledger), plain_prompt="")


@dataclass(frozen=True)
class _Shape:
    """A format: the columns that identify it, all columns that it reads, and the function that makes a row."""

    required: set[str]
    columns: tuple[str, ...]
    parse: Parse

    def names(self, own: Format) -> Names:
        return Names(own, tuple((name, name) for name in self.columns if name in self.required))

    def read_as(self, names: dict[str, str]) -> "_Shape":
        """Return the format with other names of its columns in the file."""
        others = {name: other for name, other in names.items() if name != other}
        if not others:
            return self
        columns = tuple(others.get(name, name) for name in self.columns)
        return _Shape({others.get(name, name) for name in self.required}, columns, partial(_row_as, self.parse, others))


def _row_as(parse: Parse, names: dict[str, str], source: str, values: dict[str, Any], ledger: Ledger) -> Row:
    """Make the row of a format whose columns have other names. It is counted, but no conversion to be refused."""
    try:
        row = parse(source, _renamed(values, names), ledger)
    except RowError as error:
        raise RowError(_name_in_file(error.name, names), error.reason, error.shown) from None
    ledger.converted[f"rows with {', '.join(names.values())} read as {', '.join(names)}"] += 1
    return row


# In the order in which they are tried.
_FORMATS = {
    Format.messages: _Shape({"messages"}, ("messages", "system", "tools", "functions"), partial(_chat_row, "messages")),
    Format.conversations: _Shape(
        {"conversations"}, ("conversations", "system", "tools", "functions"), partial(_chat_row, "conversations")
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
