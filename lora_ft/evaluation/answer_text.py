"""Decode the tokens of an answer: without special tokens, but with those that mark a thought.

gpt-oss    <|channel|>final<|message|>Four.                                                     -> Four.
           <|channel|>analysis<|message|>2+2.<|end|><|start|>assistant<|channel|>final<|message|>Four.
                                                             -> <|channel|>analysis<|message|>2+2.<|end|>Four.

Some templates write special tokens and words before the text of an answer. If only the special tokens were left out,
the words would be a part of the answer, and a thought could not be told from it (data/thoughts.py).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from lora_ft.data import thoughts
from lora_ft.data.rendering import Template
from lora_ft.data.rows import Message, RowError

_CHAT: list[Message] = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


class AnswerText:
    """Decodes answers as the chat template of a tokenizer writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prompt, self._headers, marks = "", ("", ""), list[str]()
        if tokenizer.chat_template:
            template = Template(tokenizer, {})
            self._prompt = _prompt(template)
            self._headers = _header(template, self._prompt, None), _header(template, self._prompt, "three")
            marks = [*self._headers, *(mark for tags in template.tags for mark in (tags.opening, tags.closing))]
        special = set(tokenizer.all_special_ids)
        self._kept = {i for mark in marks for i in tokenizer.encode(mark, add_special_tokens=False) if i in special}

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, or of its first tokens: with more tokens, the text only becomes longer."""
        text = "".join(self._parts(ids))
        if not self._kept:
            return text
        found = thoughts.at_start(self._prompt, text)
        start, header = (found.end, self._headers[1]) if found else (0, self._headers[0])
        rest = text[start:]
        return text[:start] + ("" if header.startswith(rest) else rest.removeprefix(header))

    def _parts(self, ids: Sequence[int]) -> Iterator[str]:
        for is_kept, part in groupby(ids, key=self._kept.__contains__):
            yield str(
                self._tokenizer.decode(list(part), skip_special_tokens=not is_kept, clean_up_tokenization_spaces=False)
            )


def _prompt(template: Template) -> str:
    try:
        return template.rendered(_CHAT[:1], True)
    except RowError:
        return ""


def _header(template: Template, prompt: str, thought: str | None) -> str:
    """Return what a template writes between the prompt, or the thought, and the text of an answer."""
    question, answer = _CHAT
    for form in thoughts.forms([question, answer if thought is None else {**answer, thoughts.FIELD: thought}]):
        try:
            text = template.rendered(form.messages, False)
        except RowError:
            continue
        found = thoughts.at_start(prompt, text[len(prompt) :]) if text.startswith(prompt) else None
        if thought is None and text.startswith(prompt) and not found:
            return text[len(prompt) : text.rindex("two")]
        if found and found.text == thought:
            return text[len(prompt) + found.end : text.rindex("two")]
    return ""
