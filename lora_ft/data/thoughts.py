"""Find the thought of an answer, in a message and in the text that a chat template makes of it.

    {"role": "assistant", "reasoning_content": "2 and 2 are 4.", "content": "Four."}
    <|im_start|>assistant\\n<think>\\n2 and 2 are 4.\\n</think>\\n\\nFour.<|im_end|>
                         |----------- thought -----------------|

Templates differ in where they look for a thought: in a field of the message, in a part of its content, or in the
content's text. They differ in the tags that they write, and some end their generation prompt inside a thought.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_ft.data.rows import Message, RowError

FIELD = "reasoning_content"  # of a message, after messages.py
FIELDS = (FIELD, "reasoning", "thinking")  # under which templates read it


@dataclass(frozen=True, slots=True)
class Tags:
    """The texts before and after a thought."""

    opening: str
    closing: str


# Those of Qwen3, DeepSeek, GLM, SmolLM3, Nemotron, MiniMax and Kimi; Seed-OSS; Magistral and Ministral; Command A;
# gpt-oss, whose thoughts are a message in the channel `analysis`; Gemma 4; EXAONE Deep.
TAGS = (
    Tags("<think>", "</think>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|channel|>analysis<|message|>", "<|end|>"),
    Tags("<|channel>thought", "<channel|>"),
    Tags("<thought>", "</thought>"),
)
_TEXT = TAGS[0]  # for a template that does not know thoughts


@dataclass(frozen=True, slots=True)
class Found:
    """A thought at the start of an answer: its text, its tags, and the position after it and the whitespace there."""

    text: str
    tags: Tags
    end: int


def known_to(template: Any) -> tuple[Tags, ...]:
    """Return the tags that a chat template (or templates by name) mentions; () if it does not know thoughts."""
    text = str(template)
    return tuple(tags for tags in TAGS if tags.opening in text or (tags is _TEXT and tags.closing in text))


def opened_by(prompt: str) -> Tags | None:
    """Return the tags of the thought in which a prompt ends, as those of DeepSeek-R1 do."""
    end = prompt.rstrip()
    return next((tags for tags in TAGS if end.endswith(tags.opening)), None)


def closed_by(prompt: str, known: tuple[Tags, ...]) -> bool:
    """Return True for a prompt that ends with an empty thought, or only its end: the answer is to have no thought."""
    end = prompt.rstrip()
    return any(end.endswith(tags.closing) for tags in known)


def at_start(prompt: str, completion: str) -> Found | None:
    """Find the thought at the start of an answer, which the prompt may have opened."""
    tags, start = opened_by(prompt), 0
    if tags is None:
        lead = len(completion) - len(completion.lstrip())
        tags = next((tags for tags in TAGS if completion.startswith(tags.opening, lead)), None)
        if tags is None:
            return None
        start = lead + len(tags.opening)
    end = completion.find(tags.closing, start)
    if end < 0:
        return None
    after = end + len(tags.closing)
    after += len(completion) - after - len(completion[after:].lstrip())
    return Found(completion[start:end].strip(), tags, after)


def split(message: Message) -> tuple[str, str]:
    """Return the thought of an assistant message, "" without one, and the rest of its content."""
    content = message["content"]
    if thought := message.get(FIELD):
        return thought, content
    if found := at_start("", content):
        return found.text, content[found.end :]
    before, tag, rest = content.partition(_TEXT.closing)
    if tag and _TEXT.opening not in before:  # as DeepSeek-R1 writes it after a prompt that opens the thought
        return before.strip(), rest.lstrip()
    return "", content


def of(message: Message) -> str:
    """Return the thought of a message, "" without one."""
    return split(message)[0] if message["role"] == "assistant" else ""


def after(text: str, prompt: str = "") -> str:
    """Return the text of an answer after its thought; "" if the thought has no end."""
    if found := at_start(prompt, text):
        return text[found.end :]
    opened = opened_by(prompt) or any(text.lstrip().startswith(tags.opening) for tags in TAGS)
    return "" if opened else text


@dataclass(frozen=True, slots=True)
class Form:
    """A chat with its thoughts in one of the forms that templates read.

    converted: what the report counts; "" for the form of the row. needs_tags: the form is right only if the template
    writes the thoughts between its own tags.
    """

    messages: list[Message]
    converted: str = ""
    needs_tags: bool = False


def forms(messages: list[Message]) -> Iterator[Form]:
    """Yield the forms of a chat, the likeliest first; only the chat itself if it has no thoughts."""
    if not any(map(of, messages)):
        yield Form(messages)
    elif any(message.get(FIELD) for message in messages):
        yield Form([_in_fields(m) for m in messages])
        yield Form([_in_parts(m) for m in messages], needs_tags=True)
        converted = "chats whose thoughts are written into the text of answers, since the template has no other place"
        yield Form([_in_text(m) for m in messages], converted, needs_tags=True)
    else:
        converted = "chats whose thoughts are taken from the text of answers"
        yield Form(messages, needs_tags=True)
        yield Form([_in_fields(m) for m in messages], converted)
        yield Form([_in_parts(m) for m in messages], converted, needs_tags=True)
        yield Form([_in_text(m) for m in messages], converted, needs_tags=True)


def canonical(messages: list[Message]) -> list[Message]:
    """Return a chat with the thoughts of all answers in `FIELD`, for comparison with what a template wrote."""
    return [{**m, FIELD: of(m), "content": split(m)[1]} if of(m) else m for m in messages]


def _in_fields(message: Message) -> Message:
    thought, content = split(message) if message["role"] == "assistant" else ("", "")
    return {**message, **dict.fromkeys(FIELDS, thought), "content": content} if thought else message


def _in_parts(message: Message) -> Message:
    thought, content = split(message) if message["role"] == "assistant" else ("", "")
    if not thought:
        return message
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": content}]
    return {**_without_fields(message), "content": parts if content else parts[:1]}


def _in_text(message: Message) -> Message:
    thought, content = split(message) if message["role"] == "assistant" else ("", "")
    if not thought:
        return message
    return {**_without_fields(message), "content": f"{_TEXT.opening}\n{thought}\n{_TEXT.closing}\n\n{content}"}


def _without_fields(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in FIELDS}


def continued(prompt: str, through: str, thought: str) -> tuple[str, bool]:
    """Return the text of prompt and answer for a prompt that opens a thought; True if an empty one had to be closed.

    A template that opens a thought in its generation prompt may leave it out of the chat's answers (DeepSeek-R1) or
    write another one there. The model has to continue the prompt that it gets: with the thought, its end, the answer.

        prompt   <｜Assistant｜><think>\\n
        through  <｜Assistant｜>Four.<｜end▁of▁sentence｜>
        ->       <｜Assistant｜><think>\\n2 and 2 are 4.\\n</think>\\n\\nFour.<｜end▁of▁sentence｜>
    """
    tags = opened_by(prompt)
    if tags is None:
        return through, False
    rest = through.removeprefix(prompt)
    if rest != through:
        found = at_start(prompt, rest)
        if found and (found.text or not thought):
            return through, False
    else:
        before = prompt[: prompt.rindex(tags.opening)]
        if not through.startswith(before):
            return through, False  # reported as a template that does not begin an answer with its generation prompt
        rest = through[len(before) :]
        found = at_start("", rest) or at_start(prompt, rest)
        if found and thought and found.text != thought:
            return through, False
    rest = rest[found.end :] if found else rest
    if prompt.endswith("\n"):
        return f"{prompt}{thought}\n{tags.closing}\n\n{rest.lstrip()}", not thought
    return f"{prompt}{thought}{tags.closing}{rest}", not thought


def refuse_in_closed(prompt: str, thought: str, known: tuple[Tags, ...], variables: set[str]) -> None:
    """Raise RowError for an answer with a thought after a prompt that asks for none."""
    if thought and closed_by(prompt, known):
        names = [name for name in sorted(variables) if "think" in name or "reason" in name]
        setting = " or ".join(f"data.template.{name}" for name in names) or "model.chat_template"
        raise RowError(
            "chat template",
            f"the prompt asks for an answer without a thought, and the row has one: change {setting}, or remove the "
            "thoughts from the rows",
            thought,
        )
