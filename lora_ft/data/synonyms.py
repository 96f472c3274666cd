"""Other names of the columns of a format: question and answer are read as prompt and completion.

    {"question": "2+2?", "answer": "4"}       prompt_completion, as {"prompt": "2+2?", "completion": "4"}
    {"instruction": "Add.", "response": "4"}  alpaca; a column context is its input
    {"conversation": [...]}                   conversations, or messages if data.format says so

The names of a format itself come first. Columns that fit several pairs of names have two meanings and are refused.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lora_ft import config
from lora_ft.errors import DataError
from lora_ft.values import Format

# Columns that a prompt of these names alone would leave out.
_OF_PROMPT = ("context", "passage", "choices", "options")


@dataclass(frozen=True)
class Names:
    """Columns of a format with the names that they have in a file: ("prompt", "question"), ("completion", "answer").

    required: identify the format, if all are there. optional: are read if they are there.
    """

    format: Format
    required: tuple[tuple[str, str], ...]
    optional: tuple[tuple[str, str], ...] = ()

    @property
    def in_file(self) -> tuple[str, ...]:
        return tuple(other for _, other in self.required)

    @property
    def are_synonyms(self) -> bool:
        return any(name != other for name, other in self.required)

    def present(self, columns: Iterable[str]) -> dict[str, str]:
        """Return the names to read in a file that has these columns, by the format's own names."""
        known = set(columns)
        return dict((*self.required, *((name, other) for name, other in self.optional
                                       if name not in known and other in known)))  # fmt: skip


_PAIRS = (
    ("question", "answer"), ("question", "response"), ("query", "answer"), ("query", "response"),
    ("prompt", "answer"), ("prompt", "response"), ("prompt", "output"), ("input", "output"), ("inputs", "targets"),
    ("problem", "answer"), ("problem", "solution"), ("user", "assistant"), ("human", "assistant"),
)  # fmt: skip
SYNONYMS = (
    Names(Format.conversations, (("conversations", "conversation"),)),
    Names(Format.conversations, (("conversations", "messages"),)),
    Names(Format.messages, (("messages", "conversation"),)),
    Names(Format.messages, (("messages", "conversations"),)),
    *(
        Names(Format.alpaca, (("instruction", "instruction"), ("output", output)), (("input", "context"),))
        for output in ("response", "answer", "completion")
    ),
    *(
        Names(Format.prompt_completion, (("prompt", prompt), ("completion", answer)), (("system", "system_prompt"),))
        for prompt, answer in _PAIRS
    ),
)


def fitting(columns: set[str], chosen: Format) -> list[Names]:
    """Return the synonyms whose required columns are all there, of the format that data.format chose, or of any."""
    found: dict[tuple[str, ...], Names] = {}
    for synonym in SYNONYMS:
        if chosen in (Format.auto, synonym.format) and columns.issuperset(synonym.in_file):
            found.setdefault(synonym.in_file, synonym)
    return list(found.values())


def check(fits: Sequence[Names], columns: Collection[str], data: config.Data) -> None:
    """Raise DataError for columns that fit several formats, or leave out a column that may belong to the prompt."""
    last = fits[-1]
    advice = " ".join(f"data.columns.{name}={data.columns.get(other, other)}" for name, other in last.required)
    if len(fits) > 1:
        shown = "; ".join(" and ".join(names.in_file) for names in fits)
        raise DataError(
            f"{data.path}: its columns have several meanings ({shown}): choose one, as in {advice}, or set data.format"
        )
    read = last.present(columns).values()
    others = [name for name in _OF_PROMPT if name in columns and name not in read]
    if others and last.are_synonyms and last.format in (Format.alpaca, Format.prompt_completion):
        raise DataError(
            f"{data.path}: are {' and '.join(last.in_file)} the whole row, or does {others[0]} belong to the prompt? "
            f"Set {advice} to leave it out, or data.prompt and data.answer, templates over the columns"
        )
