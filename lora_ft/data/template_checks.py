"""What a chat template owes a chat. One that loses, bends or moves text does so without a word, and rows look fine.

    {"role": "user", "content": "2+2?"}        <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n 4 <|im_end|>
    {"role": "assistant", "content": "4"}      every text is there, in order       |  the answer, once, and its end

`check` looks for the texts of each row in what was rendered of it. What a row cannot show, because its texts may
stand in the template or in one another, `Trials` tries once for each shape of chat with words that nobody writes.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from lora_ft.data.rows import Message, RowError

# Answers may come in parts; templates write those that they know.
_ANSWER_PARTS = ("reasoning_content", "thinking", "content")

# Templates write these anew, with other blanks around them, and leave the thoughts of earlier answers out.
_THOUGHT = re.compile("</?think>")


def check(messages: list[Message], answer: int, prompt: str, through: str, tools: list[Any] | None) -> None:
    """RowError if the rendering of `messages` up to an answer does not hold all of their texts.

    Blanks at the ends do not count: many templates strip contents. A system message may stand anywhere, since some
    write it into a later turn. Each template has its own form for tools and calls: the names of both must be there, and
    the keys and values of a call's arguments. Tool messages, which some write as JSON, are not checked.
    """
    behind = through[len(prompt) :] if through.startswith(prompt) else through
    learned, earlier = messages[answer], messages[:answer]
    for part in _ANSWER_PARTS:
        if isinstance(text := learned.get(part), str) and _lost(_THOUGHT.split(text), behind):
            raise RowError("chat template", "changes the answer or leaves it out", text)
    _check_calls(learned, behind, "the answer's")
    for message in earlier:
        _check_calls(message, prompt, "an earlier")
    for tool in _functions(tools):
        if tool["name"] not in prompt:
            raise RowError("chat template", f"leaves out the tool {tool['name']}", tools)
    for message in earlier:
        if message["role"] == "system" and _lost([message["content"]], prompt):
            raise RowError("chat template", "changes the system message or leaves it out", message["content"])
    dialogue = [m["content"] if m["role"] == "user" else _THOUGHT.split(m["content"])[-1]
                for m in earlier if m["role"] in ("user", "assistant")]  # fmt: skip
    if lost := _lost(dialogue, prompt):
        raise RowError("chat template", "changes a message before the answer, moves it or leaves it out", lost)


def _lost(texts: list[str], rendering: str) -> str | None:
    """The first text that does not stand behind those before it."""
    end = 0
    for text in texts:
        core = text.strip()
        start = rendering.find(core, end)
        if start < 0:
            return text
        end = start + len(core)
    return None


def _functions(listed: list[Any] | None) -> list[dict[str, Any]]:
    """The functions of tools, or of tool calls, in OpenAI's form or without its wrapping."""
    inner = [entry.get("function", entry) for entry in listed or []]
    return [f for f in inner if isinstance(f, dict) and isinstance(f.get("name"), str)]


def _check_calls(message: Message, rendering: str, whose: str) -> None:
    """RowError if the rendering lacks the name or an argument of a tool call, or shows Python's form of an object."""
    for function in _functions(message.get("tool_calls")):
        call, arguments = f"{whose} call of {function['name']}", function.get("arguments", {})
        if function["name"] not in rendering:
            raise RowError("chat template", f"leaves out {call}", message)
        as_json = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        if as_json in rendering:
            continue
        for value in _leaves(arguments):
            if isinstance(arguments, str) or not any(form in rendering for form in _forms(value)):
                raise RowError("chat template", f"leaves out {value} in {call}", message)
        if str(arguments) in rendering:
            raise RowError("chat template", f"writes the arguments of {call} as Python does, not as JSON", message)


def _leaves(value: Any) -> Iterator[Any]:
    """The keys of an object and the values that hold no others."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(value: Any) -> set[str]:
    """The forms in which a template may write a key or value: as it is, as in JSON, or as in Python."""
    if isinstance(value, str):
        text = value.strip()
        return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]}
    return {json.dumps(value, default=str), str(value)}


class Trials:
    """Chats of words that nobody writes, one for each order of roles; `render` is (messages, generation prompt)."""

    def __init__(self, tokenizer: Any, render: Callable[[list[Message], bool], str]) -> None:
        self._render, self._bos, self._unknown = render, tokenizer.bos_token, tokenizer.unk_token
        self._eos = tokenizer.eos_token
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self._tokens = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        self._faults: dict[tuple[str, ...], str | None] = {}

    def check(self, roles: tuple[str, ...]) -> None:
        """RowError if the template gives chats of these roles, the last an answer that is learned, a wrong form."""
        if roles not in self._faults:
            self._faults[roles] = self._fault(roles)
        if fault := self._faults[roles]:
            raise RowError("chat template", fault)

    def _fault(self, roles: tuple[str, ...]) -> str | None:
        words = [f"zq{i}xw" for i in range(len(roles))]
        chat: list[Message] = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
        try:
            closed, prompt = self._render(chat[:-1], False), self._render(chat[:-1], True)
            through = self._render(chat, False)
        except RowError:
            return None  # such a chat may want more than words, tool calls say; the row has them
        behind = through[len(prompt) :]
        before, found, after = behind.partition(words[-1])
        if not (through.startswith(prompt) and found):
            return None  # each row says so itself
        opening = (prompt[len(closed) :] if prompt.startswith(closed) else "") + before
        return (
            self._stray(words, behind, after)
            or self._twice(through, roles, opening)
            or self._ends(after, self._tokens.findall(opening))
        )

    def _stray(self, words: list[str], behind: str, after: str) -> str | None:
        if words[-1] in after:
            return "writes the answer twice"
        for number, word in enumerate(words[:-1], 1):
            if word in behind:
                return f"writes message {number} behind the prompt, where it would be learned"
        if added := self._tokens.sub("", self._behind_end(after)).strip():
            return f"adds {added!r} to the answer, which would be learned"
        return None

    def _behind_end(self, after: str) -> str:
        """What follows the token that ends the answer. Words before it may end the answer as well: Dolly's ### End."""
        if self._eos and self._eos in after:
            return after.partition(self._eos)[2]
        return self._tokens.split(after)[-1]

    def _twice(self, through: str, roles: tuple[str, ...], opening: str) -> str | None:
        """Llama 2 begins each exchange with a BOS; SmolLM2's BOS is what begins each turn: a role's name follows it."""
        if not self._bos or self._bos == self._eos:
            return None
        begin = re.match(rf"\s*{re.escape(self._bos)}\s*", opening)
        needed = begin and not self._tokens.match(opening, begin.end())
        count = through.count(self._bos)
        adjacent = re.search(rf"(?:{re.escape(self._bos)}\s*){{2}}", through)
        if adjacent or (not needed and count > roles.count("user")):
            return f"writes {count} beginning-of-text tokens, some without need"
        return None

    def _ends(self, after: str, begins: list[str]) -> str | None:
        ends = self._tokens.findall(after)
        if not ends:
            return None  # each row says so itself
        if ends[-1] in {*begins, self._bos, self._unknown} - {self._eos}:
            return f"ends the answer with {ends[-1]}, which ends nothing"
        return f"ends the answer with {ends[-1]} twice" if ends.count(ends[-1]) > 1 else None
