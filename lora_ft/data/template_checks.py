"""Check that a chat template keeps every text of a chat. One that drops, changes or moves text raises no error itself.

    {"role": "user", "content": "2+2?"}        <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n 4 <|im_end|>
    {"role": "assistant", "content": "4"}      every text is there, in order       |  the answer, once, and its end

`check` looks for the texts of each row in its rendering. It cannot see all errors, since a text of the row may also be
part of the template or of another text. `Trials` finds these with made-up words, once for each sequence of roles.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from lora_ft.data.rows import Message, RowError, any_of

# An answer may have several parts; a template writes those that it knows.
_ANSWER_PARTS = ("reasoning_content", "thinking", "content")

_NO_TOOLS = ": tools and calls need a base whose chat template writes them, or another model.chat_template"

# Templates may change the whitespace around these tags, and drop the thoughts of earlier answers.
_THOUGHT = re.compile("</?think>")


def check(messages: list[Message], answer: int, prompt: str, through: str, tools: list[Any] | None) -> None:
    """Raise RowError if the rendering of `messages` up to the answer lacks one of their texts.

    Whitespace around a text is ignored, since many templates strip it. A system message may be anywhere: some
    templates write it into a later turn. Templates differ in how they write tools and calls, so only the names of both,
    the names of a tool's parameters, and the keys and values of a call's arguments are looked for. The result of a tool
    may be written as text or as a JSON string, anywhere before the answer.
    """
    completion = through[len(prompt) :] if through.startswith(prompt) else through
    learned, earlier = messages[answer], messages[:answer]
    for part in _ANSWER_PARTS:
        if isinstance(text := learned.get(part), str) and _missing(_THOUGHT.split(text), completion):
            raise RowError("chat template", "changes or drops the answer", text)
    _check_calls(learned, completion, "the answer's")
    for message in earlier:
        _check_calls(message, prompt, "an earlier")
        if message["role"] == "tool" and not any(form in prompt for form in _forms(message["content"])):
            raise RowError("chat template", "changes or drops the result of a tool", message["content"])
    _check_tools(tools, prompt)
    for message in earlier:
        if message["role"] == "system" and _missing([message["content"]], prompt):
            raise RowError("chat template", "changes or drops the system message", message["content"])
    dialogue = [m["content"] if m["role"] == "user" else _THOUGHT.split(m["content"])[-1]
                for m in earlier if m["role"] in ("user", "assistant")]  # fmt: skip
    if missing := _missing(dialogue, prompt):
        raise RowError("chat template", "changes, moves or drops a message before the answer", missing)


def _missing(texts: list[str], rendering: str) -> str | None:
    """Return the first text that does not follow the texts before it in the rendering; None if all do."""
    end = 0
    for text in texts:
        core = text.strip()
        start = rendering.find(core, end)
        if start < 0:
            return text
        end = start + len(core)
    return None


def _functions(listed: list[Any] | None) -> list[dict[str, Any]]:
    """Return the functions of tools or of tool calls, which may be wrapped in {"function": ...}."""
    inner = [entry.get("function", entry) for entry in listed or []]
    return [f for f in inner if isinstance(f, dict) and isinstance(f.get("name"), str)]


def _check_tools(tools: list[Any] | None, prompt: str) -> None:
    """Raise RowError if the name of a tool or of one of its parameters is missing."""
    for tool in _functions(tools):
        if tool["name"] not in prompt:
            raise RowError("chat template", f"drops the tool {tool['name']}{_NO_TOOLS}", tools)
        parameters = tool.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        for name in properties if isinstance(properties, dict) else ():
            if not any(form in prompt for form in _forms(name)):
                raise RowError("chat template", f"drops the parameter {name} of the tool {tool['name']}", tools)


def _check_calls(message: Message, rendering: str, whose: str) -> None:
    """Raise RowError if the name or an argument of a tool call is missing, or the arguments are written as Python."""
    for function in _functions(message.get("tool_calls")):
        call, arguments = f"{whose} call of {function['name']}", function.get("arguments", {})
        if function["name"] not in rendering:
            raise RowError("chat template", f"drops {call}{_NO_TOOLS}", message)
        as_json = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        if as_json in rendering:
            continue
        for value in _leaves(arguments):
            if isinstance(arguments, str) or not any(form in rendering for form in _forms(value)):
                raise RowError("chat template", f"drops {value} in {call}", message)
        if str(arguments) in rendering:
            raise RowError("chat template", f"writes the arguments of {call} as Python, not as JSON", message)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys of an object, and the values that contain no others."""
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
    """Return the ways in which a template may write a key or value: as plain text, as JSON or as Python."""
    if isinstance(value, str):
        text = value.strip()
        return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]}
    return {json.dumps(value, default=str), str(value)}


_PLAIN = ("user", "assistant")


def _made_up(roles: tuple[str, ...]) -> list[Message]:
    return [{"role": role, "content": f"zq{i}xw"} for i, role in enumerate(roles)]


def _with_answers(chat: list[Message]) -> list[Message]:
    """Return a chat with answers in place of system messages, which some templates do not tell apart."""
    return [{**message, "role": "assistant"} if message["role"] == "system" else message for message in chat]


class Trials:
    """Renders one made-up chat for each sequence of roles and keeps what is wrong with it.

    `render` takes messages and whether to add a generation prompt.
    """

    def __init__(self, tokenizer: Any, render: Callable[[list[Message], bool], str]) -> None:
        self._render, self._bos, self._unknown = render, tokenizer.bos_token, tokenizer.unk_token
        self._eos = tokenizer.eos_token
        self._tokens = any_of(token.content for token in tokenizer.added_tokens_decoder.values())
        self._errors: dict[tuple[str, ...], str | None] = {}
        self._accepted: dict[tuple[str, ...], bool] = {}

    def accepts(self, roles: tuple[str, ...]) -> bool:
        """Return True if the template renders a chat of these roles: each text in order, each answer with its end.

        True as well for a template that renders no chat at all, of which the checks of each row tell what is wrong.
        """
        if roles not in self._accepted:
            renders_none = roles != _PLAIN and not self.accepts(_PLAIN)
            self._accepted[roles] = renders_none or self._renders(roles)
        return self._accepted[roles]

    def _renders(self, roles: tuple[str, ...]) -> bool:
        chat = _made_up(roles)
        answers = [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
        try:
            for answer in answers:
                prompt, through = self._render(chat[:answer], True), self._render(chat[: answer + 1], False)
                after = through[len(prompt) :].partition(str(chat[answer]["content"]))[2]
                if not through.startswith(prompt) or not self._tokens.search(after):
                    return False
                if roles[answer - 1] == "assistant" and prompt == self._render(chat[:answer], False):
                    return False  # nothing would separate the second answer from the end of the first
                check(chat, answer, prompt, through, None)
                self.check(roles[: answer + 1])
            whole = self._render(chat, False)
        except RowError:
            return False
        return "system" not in roles or self._tells_apart(whole, _with_answers(chat))

    def _tells_apart(self, whole: str, other: list[Message]) -> bool:
        try:
            return self._render(other, False) != whole
        except RowError:
            return True

    def check(self, roles: tuple[str, ...]) -> None:
        """Raise RowError if the template renders chats of these roles wrongly; the last is an answer to be learned."""
        if roles not in self._errors:
            self._errors[roles] = self._error(roles)
        if error := self._errors[roles]:
            raise RowError("chat template", error)

    def _error(self, roles: tuple[str, ...]) -> str | None:
        chat = _made_up(roles)
        words = [str(message["content"]) for message in chat]
        try:
            closed, prompt = self._render(chat[:-1], False), self._render(chat[:-1], True)
            through = self._render(chat, False)
        except RowError:
            return None  # chats of these roles may need more than words, such as tool calls, which the row has
        completion = through[len(prompt) :]
        before, found, after = completion.partition(words[-1])
        if not (through.startswith(prompt) and found):
            return None  # the checks of each row report this
        opening = (prompt[len(closed) :] if prompt.startswith(closed) else "") + before
        return (
            self._extra_text(words, completion, after)
            or self._extra_bos(through, roles, opening)
            or self._wrong_end(after, self._tokens.findall(opening))
        )

    def _extra_text(self, words: list[str], completion: str, after: str) -> str | None:
        if words[-1] in after:
            return "writes the answer twice"
        for number, word in enumerate(words[:-1], 1):
            if word in completion:
                return f"writes message {number} after the prompt, where it would be learned"
        if added := self._tokens.sub("", self._after_end(after)).strip():
            return f"adds {added!r} to the answer, which would be learned"
        return None

    def _after_end(self, after: str) -> str:
        """Return the text after the token that ends the answer. Words before it are allowed: Dolly's ### End."""
        if self._eos and self._eos in after:
            return after.partition(self._eos)[2]
        return self._tokens.split(after)[-1]

    def _extra_bos(self, through: str, roles: tuple[str, ...], opening: str) -> str | None:
        """Find repeated BOS tokens.

        Llama 2 begins each exchange with one. SmolLM2's BOS is the token that begins each turn, before the role.
        """
        if not self._bos or self._bos == self._eos:
            return None
        begin = re.match(rf"\s*{re.escape(self._bos)}\s*", opening)
        begins_turn = begin and not self._tokens.match(opening, begin.end())
        count = through.count(self._bos)
        adjacent = re.search(rf"(?:{re.escape(self._bos)}\s*){{2}}", through)
        if adjacent or (not begins_turn and count > roles.count("user")):
            return f"writes {count} beginning-of-text tokens, more than it needs"
        return None

    def _wrong_end(self, after: str, openings: list[str]) -> str | None:
        ends = self._tokens.findall(after)
        if not ends:
            return None  # the checks of each row report this
        if ends[-1] in {*openings, self._bos, self._unknown} - {self._eos}:
            return f"ends the answer with {ends[-1]}, which is not an end-of-turn token"
        return f"ends the answer with {ends[-1]} twice" if ends.count(ends[-1]) > 1 else None
