"""Completion, through its functions and in a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft import config, validation
from lora_ft.cli import choices, completion

BREAKS = "\"'><=;|&(: "  # bash's own list
BIN = str(Path(sys.executable).parent)


def offered(line):
    return completion.reply(line, "")


def bash(line, tmp_path, breaks=None):
    """Return COMPREPLY of the installed bash function for a line."""
    script = r"""
        eval "$(lora-ft -sc install=bash)"
        [ -n "$BREAKS" ] && COMP_WORDBREAKS=$BREAKS || COMP_WORDBREAKS=$' \t\n"\047><=;|&(:'
        COMP_LINE=$LINE; COMP_POINT=${#LINE}
        complete -p lora-ft | grep -q -- '-F _lora_ft lora-ft' || exit 3
        _lora_ft
        printf '%s\n' "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "LINE": line, "BREAKS": breaks or ""}
    done = subprocess.run(["bash", "--norc", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora-ft tr", ["train "]),
        ("lora-ft train model=gpt2_", ["gpt2_large ", "gpt2_medium "]),
        ("lora-ft train quant=", ["fp4 ", "int8 ", "nf4 ", "none "]),
        ("lora-ft nothing=", []),
    ],
)
def test_bash_function_replaces_the_part_after_the_equals_sign(tmp_path, line, expected):
    assert [c for c in bash(line, tmp_path) if c] == expected


def test_bash_function_replaces_whole_arguments_if_the_equals_sign_is_no_word_break(tmp_path):
    assert bash("lora-ft train quant=f", tmp_path, breaks=" ") == ["quant=fp4 "]


def test_tab_key_completes_the_line_in_a_real_shell(tmp_path):
    pty = pytest.importorskip("pty")
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "", "TERM": "dumb", "INPUTRC": "/dev/null"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], env)
    # the terminal echoes what is typed: a mark must not occur in it
    os.write(terminal, b'eval "$(lora-ft -sc install=bash)"; printf "[%s]" ready\n')
    read_until(terminal, b"[ready]")
    os.write(terminal, b'lora-ft tr\tquant=f\t--cfg job -p quant; printf "[%s]" done\n')
    seen = read_until(terminal, b"[done]")
    os.write(terminal, b"exit\n")
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"kind: fp4" in seen


def read_until(terminal, mark):
    seen = b""
    while mark not in seen:
        seen += os.read(terminal, 4096)
    return seen


def test_commands_complete_first_and_then_groups_and_settings():
    assert offered("lora-ft ") == [*(f"{command} " for command in config.SCHEMAS), "--help ", "--version "]
    keys = offered("lora-ft train ")
    assert {"quant=", "quant.", "experiment=", "device=", "seed="} <= set(keys)
    assert "run=" in offered("lora-ft chat ") and "run=" not in keys


@pytest.mark.parametrize("command", config.SCHEMAS)
def test_every_setting_and_choice_of_a_command_completes(command):
    for setting in validation.settings(config.SCHEMAS[command]):
        assert f"{setting.key}=" in offered(f"lora-ft {command} {setting.key}")
    for group in choices.groups(command):
        assert offered(f"lora-ft {command} {group}=") == [f"{group}={name} " for name in choices.of(group)]


def test_values_complete_by_the_type_of_the_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows, old.jsonl").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / ".hidden").touch()
    assert offered("lora-ft train train.packing=") == ["train.packing=true ", "train.packing=false "]
    assert offered("lora-ft train adapter.r=") == ["adapter.r=16 "]
    assert offered("lora-ft train data.path=r") == ["data.path=rows,\\ old.jsonl ", "data.path=runs/"]
    assert offered("lora-ft chat run=") == ["run=rows,\\ old.jsonl ", "run=runs/"]
    assert offered("lora-ft train hydra.run.dir=ru") == ["hydra.run.dir=runs/"]
    assert offered("lora-ft train data.path=absent/") == []
    assert offered("lora-ft train --config-dir ru") == ["runs/"]


def test_choices_of_config_dir_complete(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    assert offered(f"lora-ft train --config-dir {tmp_path} experiment=m") == ["experiment=mine "]


def test_flags_complete_after_a_dash():
    assert "--config-dir " in offered("lora-ft train --")


@pytest.mark.parametrize("line", ["", "lora-ft", "lora-ft  train   ", "lora-ft train 'open", "lora-ft train a=b=c="])
def test_any_line_gets_a_list_of_completions(line):
    assert isinstance(completion.reply(line, BREAKS), list)
