"""Chat with a base and its adapter: one answer with prompt=, otherwise an interactive session.

lora-ft chat run=runs/2026-11-23_10-15-00 prompt="How many legs has a spider?"     -> prints only the answer

    you> How many legs has a spider?
    adapter> Eight.
    you> /base
    the base answers now
    you> And an insect?
    base> An insect has ...

Prompts are rendered as in training, by the chat template that is saved with the adapter.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from lora_ft import config
from lora_ft.adapters import loading, peft_folder
from lora_ft.cli import entry
from lora_ft.data import template_variables
from lora_ft.data.chat_template import control_tokens, fitted_prompt, plain_prompt
from lora_ft.data.rendering import render
from lora_ft.data.rows import RowError
from lora_ft.data.tokenize import Vocabulary
from lora_ft.errors import ConfigError
from lora_ft.evaluation.comparison import adapter_off
from lora_ft.evaluation.generation import context_length, stream, visible
from lora_ft.models.device import resolve_device, selected

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

HELP = """\
/base      let the base answer                  /adapter   let the adapter answer
/reset     forget the conversation              /help      show this list
/quit      end the session (or Ctrl-D)          Ctrl-C     stop the answer"""

Message = dict[str, str]

_AS_PYTHON = "lora-ft eval measures it, and lora_ft.load(...) gives the model and its tokenizer in Python"


@dataclass
class Session:
    """A conversation: its messages, the model that answers, and the settings of rendering and sampling."""

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
    """Answer `prompt` on stdout, or run a session on stdin and stdout."""
    with selected(resolve_device(cfg.device)):
        adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
        loading.check_generates(adapter, peft_folder.read_config(adapter), "a chat", _AS_PYTHON)
        model, tokenizer = loading.load(cfg)
        template_variables.check(tokenizer, cfg.data.template)
        system = cfg.data.system if cfg.system is None else cfg.system
        session = Session(model, tokenizer, system, cfg.sampling, cfg.seed, cfg.data)
        if cfg.prompt is None:
            converse(session)
        else:
            answer(session, cfg.prompt, _write if sys.stdout.isatty() else _write_raw)
            _write("\n")


def converse(session: Session) -> None:
    """Read lines until the input ends; run commands and answer all other lines."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (adds history and line editing to input())
    _write("/help lists the commands\n")
    if not session.tokenizer.chat_template:
        _write("this model has no chat template: it continues each line as plain text, without the lines before\n")
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if text.startswith("/"):
            _write(run_command(session, text) + "\n")
        elif text:
            _reply(session, text)


def run_command(session: Session, command: str) -> str:
    """Run a command of the session; return the text to print."""
    match command:
        case "/base" | "/adapter":
            session.adapter_on = command == "/adapter"
            return f"the {session.speaker} answers now"
        case "/reset":
            session.messages.clear()
            return "conversation forgotten"
        case "/help":
            return HELP
    return f"{command.split()[0]} is not a command\n{HELP}"


def _reply(session: Session, text: str) -> None:
    """Answer a line of the session. If it cannot be answered, the error is printed and the session continues."""
    _write(f"{session.speaker}> ")
    try:
        answer(session, text, _write)
    except KeyboardInterrupt:
        _write(" (stopped)")
    except ConfigError as error:
        _write(f"({error})")
    _write("\n")


def answer(session: Session, text: str, on_text: Callable[[str], None]) -> str:
    """Answer `text` after the messages so far, and append both; of an interrupted answer, the part generated so far.

    Raises ConfigError for a text that cannot be a prompt; nothing is appended then.
    """
    question = {"role": "user", "content": text}
    prompt = _fitted_prompt(session, question, on_text)
    pieces: list[str] = []

    def on_piece(piece: str) -> None:
        pieces.append(piece)
        on_text(piece)

    def remember() -> None:
        if session.tokenizer.chat_template:
            session.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    with contextlib.nullcontext() if session.adapter_on else adapter_off(session.model):
        try:
            base = session.model.get_base_model()
            stream(base, session.tokenizer, prompt, session.sampling, session.seed, on_piece)
        except KeyboardInterrupt:
            remember()
            raise
    remember()
    return "".join(pieces)


def _fitted_prompt(session: Session, question: Message, on_text: Callable[[str], None]) -> np.ndarray:
    """Return the ids of the prompt. The oldest turns are dropped, with a notice, until there is room for an answer."""
    context, wanted = context_length(session.model.get_base_model()), session.sampling.max_new_tokens
    dropped = 0
    while len(ids := prompt_ids(session, question)) + min(wanted, context // 2) > context and session.messages:
        del session.messages[:2]
        dropped += 1
    if dropped:
        turns = "turn" if dropped == 1 else "turns"
        on_text(f"(forgot the oldest {dropped} {turns}: the model reads at most {context} tokens)\n")
    return ids


def prompt_ids(session: Session, question: Message) -> np.ndarray:
    """Return the ids of the prompt, int32 [length], rendered as in training.

    Raises ConfigError for text that holds a control token, and for a conversation that the template refuses.
    """
    tokenizer, vocabulary = session.tokenizer, Vocabulary(session.tokenizer)
    if found := control_tokens(tokenizer).search(question["content"]):
        raise ConfigError(f"the text holds the control token {found[0]}, which would end or begin a turn")
    if not tokenizer.chat_template:
        [ids] = vocabulary.ids([plain_prompt(question["content"], session.data)])
        return np.array(vocabulary.lead + ids, dtype=np.int32)
    system = [{"role": "system", "content": session.system}] if session.system else []
    chat = [*system, *session.messages, question]
    try:
        asked = fitted_prompt(chat, session.data, tokenizer)
        rendered = render(asked, tokenizer, generation_prompt=True, variables=session.data.template)
    except (jinja2.TemplateError, RowError) as error:
        raise ConfigError(f"the chat template refuses this conversation: {error}") from None
    return np.array(vocabulary.ids([rendered])[0], dtype=np.int32)


def _read_line() -> str | None:
    """Read a line from the user; None at the end of the input, "" for Ctrl-C at the prompt."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input("you> ")
    except EOFError:
        _write("\n")
        return None
    except KeyboardInterrupt:
        _write("\n(/quit or Ctrl-D ends the session)\n")
        return ""


def _write(text: str) -> None:
    _write_raw(visible(text))


def _write_raw(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    entry.run("chat")
