"""Talk to a base and its adapter: one answer with prompt=, else a session.

lora-ft chat run=runs/2026-11-23_10-15-00 prompt="How many legs has a spider?"     -> the answer, nothing else

    you> How many legs has a spider?
    adapter> Eight.
    you> /base
    base answers from here on
    you> And an insect?
    base> An insect has ...

The prompt is rendered as in training: by the chat template that is saved with the adapter.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from lora_ft import config
from lora_ft.adapters import loading
from lora_ft.cli import entry
from lora_ft.data.chat_template import control_tokens, plain_prompt, render
from lora_ft.data.tokenize import Vocabulary
from lora_ft.errors import ConfigError
from lora_ft.evaluation.comparison import adapter_off
from lora_ft.evaluation.generation import context_length, stream, visible

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

HELP = """\
/base      the base answers from here on        /adapter   the adapter answers again
/reset     forget the conversation              /help      this list
/quit      end, as Ctrl-D does                  Ctrl-C     stop the answer"""

Message = dict[str, str]


@dataclass
class Session:
    """A conversation: its messages, the model that answers, and the sampling settings."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    system: str | None
    sampling: config.Sampling
    seed: int
    data: config.Data = field(default_factory=config.Data)
    adapter_on: bool = True
    messages: list[Message] = field(default_factory=list)

    @property
    def speaker(self) -> str:
        return "adapter" if self.adapter_on else "base"


def main(cfg: config.ChatRun, invocation: entry.Invocation) -> None:
    """Answer `prompt` on stdout, or hold a session over stdin and stdout."""
    model, tokenizer = loading.load(cfg)
    system = cfg.data.system if cfg.system is None else cfg.system
    session = Session(model, tokenizer, system, cfg.sampling, cfg.seed, cfg.data)
    if cfg.prompt is None:
        converse(session)
    else:
        answer(session, cfg.prompt, _write if sys.stdout.isatty() else _write_raw)
        _write("\n")


def converse(session: Session) -> None:
    """Read lines until the input ends; run those that are commands, answer all others."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and editing)
    _write("/help lists the commands\n")
    if not session.tokenizer.chat_template:
        _write("this model has no chat template: it continues each line as plain text, without what was said before\n")
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if text.startswith("/"):
            _write(obey(session, text) + "\n")
        elif text:
            _reply(session, text)


def obey(session: Session, command: str) -> str:
    """Run a command; returns the reply to print."""
    match command:
        case "/base" | "/adapter":
            session.adapter_on = command == "/adapter"
            return f"{session.speaker} answers from here on"
        case "/reset":
            session.messages.clear()
            return "forgotten"
        case "/help":
            return HELP
    return f"{command.split()[0]} is not a command\n{HELP}"


def _reply(session: Session, text: str) -> None:
    """Answer a line of the session; an error in the line is printed, and the session continues."""
    _write(f"{session.speaker}> ")
    try:
        answer(session, text, _write)
    except KeyboardInterrupt:
        _write(" (stopped)")
    except ConfigError as error:
        _write(f"({error})")
    _write("\n")


def answer(session: Session, text: str, on_text: Callable[[str], None]) -> str:
    """Answer `text` after the messages so far, and append both; a stopped answer is kept up to that point.

    Raises ConfigError for a text that cannot be a prompt; nothing is appended then.
    """
    asked = {"role": "user", "content": text}
    prompt = _fitted_prompt(session, asked, on_text)
    pieces: list[str] = []

    def on_piece(piece: str) -> None:
        pieces.append(piece)
        on_text(piece)

    def remember() -> None:
        if session.tokenizer.chat_template:
            session.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]

    with contextlib.nullcontext() if session.adapter_on else adapter_off(session.model):
        try:
            base = session.model.get_base_model()
            stream(base, session.tokenizer, prompt, session.sampling, session.seed, on_piece)
        except KeyboardInterrupt:
            remember()
            raise
    remember()
    return "".join(pieces)


def _fitted_prompt(session: Session, asked: Message, say: Callable[[str], None]) -> np.ndarray:
    """Ids of the prompt; the oldest turns are dropped, with a notice, while they leave no room for an answer."""
    context, wanted = context_length(session.model.get_base_model()), session.sampling.max_new_tokens
    dropped = 0
    while len(ids := prompt_ids(session, asked)) + min(wanted, context // 2) > context and session.messages:
        del session.messages[:2]
        dropped += 1
    if dropped:
        say(f"(forgot the oldest {dropped} {'turn' if dropped == 1 else 'turns'}: the model reads {context} tokens)\n")
    return ids


def prompt_ids(session: Session, asked: Message) -> np.ndarray:
    """Ids of the prompt, rendered as in training: int32 [length], at most one beginning-of-text token.

    Raises ConfigError for text that holds a control token, and for a conversation that the template refuses.
    """
    tokenizer, vocabulary = session.tokenizer, Vocabulary(session.tokenizer)
    if found := control_tokens(tokenizer).search(asked["content"]):
        raise ConfigError(f"the text holds the control token {found[0]}, which would end or begin a turn")
    if not tokenizer.chat_template:
        return np.array(
            vocabulary.lead + vocabulary.ids([plain_prompt(asked["content"], session.data)])[0], dtype=np.int32
        )
    system = [{"role": "system", "content": session.system}] if session.system else []
    chat = [*system, *session.messages, asked]
    try:
        rendered = render(chat, tokenizer, generation_prompt=True)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template refuses this conversation: {error}") from None
    return np.array(vocabulary.ids([rendered])[0], dtype=np.int32)


def _read_line() -> str | None:
    """Read a line of the user, None at the end of the input; Ctrl-C at the prompt gives a fresh line."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input("you> ")
    except EOFError:
        _write("\n")
        return None
    except KeyboardInterrupt:
        _write("\n(/quit or Ctrl-D ends)\n")
        return ""


def _write(text: str) -> None:
    _write_raw(visible(text))


def _write_raw(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    entry.run("chat")
