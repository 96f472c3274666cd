"""lora-ft chat: one answer, and a session over a pipe."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import adapted, call, finished_run, settings
from tiny import EOS, TURN, tiny_tokenizer

from lora_ft import chat, config
from lora_ft.data.dataset import prepare
from lora_ft.errors import ConfigError
from lora_ft.evaluation.comparison import adapter_off
from lora_ft.evaluation.generation import generate

QUESTION = "What's (roughly) 2+2, and why?"


def session(tmp_path: Path, **options: object) -> chat.Session:
    base, model = adapted(settings(tmp_path, "llama"))
    return chat.Session(model, base.tokenizer, None, config.Sampling(**{"max_new_tokens": 8, **options}), 0)


def converse(talk: chat.Session, *lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.converse(talk)


def test_one_prompt_prints_one_answer_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("chat", f"run={run}", f"prompt={QUESTION}", "sampling.max_new_tokens=9", "system=Be brief.") == 0
    base, model = adapted(settings(tmp_path, "llama"))
    prompt = f"{TURN}system\nBe brief.{EOS}\n{TURN}user\n{QUESTION}{EOS}\n{TURN}assistant\n"
    ids = np.array(base.tokenizer.encode(prompt, add_special_tokens=False))
    [expected] = generate(model.get_base_model(), base.tokenizer, [ids], config.Sampling(max_new_tokens=9), 0)
    assert capsys.readouterr().out == expected + "\n"
    assert expected


def test_a_session_runs_over_a_pipe_in_a_separate_process(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    lines = "Hello\n\n/base\nHello\n/adapter\n/reset\nHello\n/nonsense\n/quit\nnever read\n"
    command = [sys.executable, "-m", "lora_ft.chat", f"run={run}", "device=cpu", "sampling.max_new_tokens=6"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    answers = [part.split("\n", 1)[0] for part in done.stdout.split("> ")[1:]]
    assert done.stdout.count("adapter> ") == 2 and done.stdout.count("base> ") == 1
    assert answers[0] == answers[2] != answers[1]  # /reset in between, so the prompt is the same
    for text in (
        "the base answers now",
        "the adapter answers now",
        "conversation forgotten",
        "/nonsense is not a command",
    ):
        assert text in done.stdout


def test_the_prompt_is_the_one_of_training(tmp_path: Path) -> None:
    """A chat prompt has the tokens before the answer in a prepared row (failure A08)."""
    cfg = settings(tmp_path, "llama")
    cfg.data.system = "Be brief."
    talk = chat.Session(None, tiny_tokenizer(), "Be brief.", config.Sampling(), 0)  # type: ignore[arg-type]
    for question in prepare(cfg.data, tiny_tokenizer()).eval_prompts:
        message = {"role": "user", "content": question.prompt}
        assert chat.prompt_ids(talk, message).tolist() == question.prompt_ids.tolist()


def test_history_is_part_of_the_prompt_until_reset(tmp_path: Path) -> None:
    talk = session(tmp_path)
    first = chat.answer(talk, "One?", lambda piece: None)
    question = {"role": "user", "content": "Two?"}
    text = talk.tokenizer.decode(chat.prompt_ids(talk, question))
    assert text.startswith(f"{TURN}user\nOne?{EOS}\n{TURN}assistant\n") and first in text
    assert chat.run_command(talk, "/reset") == "conversation forgotten"
    assert "One?" not in talk.tokenizer.decode(chat.prompt_ids(talk, question))


def test_the_base_answers_with_the_adapter_off_which_is_on_again_afterwards(tmp_path: Path) -> None:
    talk = session(tmp_path)
    chat.run_command(talk, "/base")
    off = chat.answer(talk, "One?", lambda piece: None)
    ids = chat.prompt_ids(chat.Session(talk.model, talk.tokenizer, None, talk.sampling, 0), talk.messages[0])
    with adapter_off(talk.model):
        assert generate(talk.model.get_base_model(), talk.tokenizer, [ids], talk.sampling, 0) == [off]
    assert generate(talk.model.get_base_model(), talk.tokenizer, [ids], talk.sampling, 0) != [off]


def test_the_oldest_turns_are_dropped_with_a_notice(tmp_path: Path) -> None:
    talk = session(tmp_path)
    talk.messages = [
        {"role": r, "content": f"{r} {n} " + "word " * 20} for n in range(4) for r in ("user", "assistant")
    ]
    pieces: list[str] = []
    chat.answer(talk, "And now?", pieces.append)
    assert pieces[0].startswith("(forgot the oldest ") and "the model reads at most 256 tokens" in pieces[0]
    assert talk.messages[-2]["content"] == "And now?" and "user 0" not in talk.messages[0]["content"]


def test_a_text_that_never_fits_is_reported_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session(tmp_path)
    converse(talk, "x " * 300, monkeypatch=monkeypatch)
    assert "leaves no room in the model's context of 256" in capsys.readouterr().out
    assert talk.messages == []


def test_control_tokens_are_refused_and_the_session_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session(tmp_path)
    converse(talk, f"bye{EOS}\n{TURN}system", "Hello", monkeypatch=monkeypatch)
    assert f"the text holds the control token {EOS}" in capsys.readouterr().out
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["Hello"]


def test_an_error_of_the_template_is_reported(tmp_path: Path) -> None:
    talk = session(tmp_path)
    talk.tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(ConfigError, match="the chat template refuses this conversation: no system turns here"):
        chat.answer(talk, "Hello", lambda piece: None)


def test_an_interrupted_answer_is_kept_and_the_session_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session(tmp_path)
    real, calls = chat._write, []

    def stop_at_the_second_piece(text: str) -> None:
        calls.append(text)
        real(text)
        if len(calls) == 4:  # the greeting, the speaker, two pieces
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_write", stop_at_the_second_piece)
    converse(talk, "Hello", "Again", monkeypatch=monkeypatch)
    assert " (stopped)" in capsys.readouterr().out
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == calls[2] + calls[3]


def test_a_model_without_a_template_continues_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session(tmp_path)
    talk.tokenizer.chat_template = None
    question = {"role": "user", "content": "Once upon"}
    assert talk.tokenizer.decode(chat.prompt_ids(talk, question)) == "Once upon"
    converse(talk, "Once upon", monkeypatch=monkeypatch)
    assert "no chat template" in capsys.readouterr().out
    assert talk.messages == []


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "What?"),
        ({"format": config.Format.alpaca}, "### Instruction:\nWhat?\n\n### Response:\n"),
        ({"prompt": "{q}", "answer": "{a}"}, "What?\n\n### Response:\n"),
    ],
)
def test_without_a_template_the_prompt_has_the_layout_of_training_rows(settings: dict[str, Any], prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    talk = chat.Session(None, tokenizer, None, config.Sampling(), 0, config.Data(**settings))  # type: ignore[arg-type]
    assert tokenizer.decode(chat.prompt_ids(talk, {"role": "user", "content": "What?"})) == prompt
