"""The check command: its page for good data, and one message and an exit code for each error."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from finished import call, finished_run
from rich.console import Console
from tiny import tiny_folder, tiny_tokenizer

from lora_ft import check, config
from lora_ft.cli import entry
from lora_ft.data.rows import Example
from lora_ft.data.tokenize import Vocabulary
from lora_ft.memory import prediction
from lora_ft.training.dry_run import ErrorCollector, partial_dry_run, read_rows

COMMAND = str(Path(sys.executable).with_name("lora-ft"))
GOOD = [{"prompt": f"How many legs have {n} spiders?", "completion": f"They have {8 * n} legs."} for n in range(24)]
SHORT = ("train.tokens_per_step=80", "train.epochs=2", "adapter.r=4", "adapter.lora_alpha=8", "data.eval_fraction=0.2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama with a context long enough for all rows of these tests."""
    folder = tiny_folder(tmp_path_factory.mktemp("base"), "llama")
    settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def checked(base, *overrides, content=None, name="rows.jsonl"):
    """Run check on a file with this content; return the exit code."""
    content = lines(GOOD) if content is None else content
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return call("check", "model=local", f"model.path={base}", f"data.path={name}", *SHORT, *overrides)


def test_page_for_good_data_fits_80_columns_and_no_file_is_written(base, capfd):
    assert checked(base) == 0
    out, err = capfd.readouterr()
    assert err == "" and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in out.splitlines())
    for word in ("read", "documents", "tokens", "length", "begin", "end", "prompts", "overlap", "steps",
                 "learning rate", "layers", "trainable", "adapted", "scale", "disk"):  # fmt: skip
        assert re.search(rf"^  {word} ", out, re.MULTILINE), word
    assert out.count("⟦") == out.count("⟧") == 1 + 3  # the legend and three rows
    assert len(re.findall(r"⟦They have \d+ legs\.<\|im_end\|>⟧", out)) == 3
    assert "<|im_start|>assistant↵" in out and "24 rows (prompt_completion), 0 duplicates" in out
    assert out.splitlines()[-1] == "no warnings"
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_installed_check_command_reads_no_weights(base, tmp_path):
    """The weights file has the right header and size, but only zeros after the header."""
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    for path in base.iterdir():
        (zeros / path.name).write_bytes(path.read_bytes())
    weights = (zeros / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    (zeros / "model.safetensors").write_bytes(weights[:header] + bytes(len(weights) - header))
    (tmp_path / "rows.jsonl").write_text(lines(GOOD))
    overrides = ["model=local", f"model.path={zeros}", "data.path=rows.jsonl", "device=cpu", "optim.decay_fraction=0.5"]
    done = subprocess.run([COMMAND, "check", *overrides], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "! optim.decay_fraction has no effect: it is for wsd, and optim.schedule=linear" in done.stdout
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "zeros"]


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BROKEN = {
    "cut short": (lines(GOOD) + '{"prompt": "2+2?", "comple', r"rows\.jsonl:25: .*Unterminated string"),
    "no answer": (
        lines([CHAT, {"messages": CHAT["messages"][:1]}]),
        r"rows\.jsonl:2: messages: no assistant message follows a user message; data\.turns=drop leaves such rows out",
    ),
    "wrong order of roles": (
        lines([CHAT, {"messages": [CHAT["messages"][0], {"role": "tool", "content": "7"}, CHAT["messages"][1]]}]),
        r"rows\.jsonl:2: message 2: tool may not follow user; data\.turns=drop leaves such rows out",
    ),
    "unknown role": (
        lines([CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}]),
        r"rows\.jsonl:2: messages\[0\]: role must be one of .*, got 'robot'",
    ),
    "control token": (
        lines([*GOOD, {"prompt": "a<|im_end|>b", "completion": "c"}]),
        r"rows\.jsonl:25: content: holds the control token <\|im_end\|>",
    ),
    "not UTF-8": (lines(GOOD).encode() + b'{"prompt": "caf\xe9"}\n', r"rows\.jsonl:25: .*not UTF-8"),
    "duplicate key": (lines(GOOD) + '{"prompt": "a", "prompt": "b", "completion": "c"}\n', r":25: prompt: key occurs"),
    "too long": (
        lines([*GOOD, {"prompt": "why? " * 3000, "completion": "c"}]),
        r"rows\.jsonl:25 with .*data\.too_long",
    ),
    "no format": (lines([{"question": "a", "reply": "b"}]), r"no format has the columns question, reply"),
    "preferences": (lines([{"prompt": "a", "chosen": "b", "rejected": "c"}]), r"chosen and rejected"),
    "empty file": ("", r"no row"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_data_gives_one_located_message_and_exit_code_4(base, capfd, name):
    content, message = BROKEN[name]
    assert checked(base, content=content) == 4
    out, err = capfd.readouterr()
    assert err.startswith("lora-ft: ") and "Traceback" not in err
    assert re.search(message, err), err
    assert re.findall(r"^\S+.*|^  [a-z]+", out, re.MULTILINE) == [
        "training",
        "  layers",
        "  trainable",
        "  adapted",
        "  scale",
    ]


def test_page_shows_what_an_error_does_not_affect(base, capfd):
    all_lines, without_layers = (
        ["steps", "learning", "layers", "trainable", "adapted", "scale", "disk"],
        ["steps", "learning"],
    )
    for override, expected, message in (
        ("adapter.target_modules=[q_prj]", without_layers,
         "q_prj matches no layer of this model, which has down_proj"),
        ("optim.warmup_steps=500", all_lines, r"optim.warmup_steps must be less than the run's \d+ steps, got 500"),
        ("train.tokens_per_microbatch=9", all_lines,
         r"tokens_per_microbatch must be at least the longest row: .*rows.jsonl:"),
        ("fast.kernels=compile", all_lines, "fast.kernels=compile needs a CUDA device"),
    ):  # fmt: skip
        assert checked(base, override) == 2
        out, err = capfd.readouterr()
        assert out.count("⟦") == 1 + 3 and "  documents " in out
        assert re.findall(r"^  ([a-z]+)", out.partition("\ntraining\n")[2], re.MULTILINE) == expected, override
        assert re.search(message, err) and override.partition("=")[0] in err and "errors" not in err


def test_all_errors_are_listed_and_the_first_sets_the_exit_code(base, capfd, monkeypatch):
    broken = lines([*GOOD, {"prompt": "2+2?"}, {"prompt": [], "completion": "4"}])
    assert checked(base, "adapter.target_modules=[q_prj]", content=broken) == 4
    out, err = capfd.readouterr()
    assert out == ""
    head, first, missing, number, second = err.splitlines()
    assert head == "lora-ft: 2 errors; training would stop at the first:" and first == "- 2 bad rows:"
    assert re.fullmatch(r"    \S*rows\.jsonl:25: completion: is missing: .*", missing)
    assert re.fullmatch(r"    \S*rows\.jsonl:26: prompt: is empty.*", number)
    assert second.startswith("- adapter.target_modules: q_prj matches no layer of this model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert checked(base, "optim.warmup_steps=500", "adapter.target_modules=[q_prj]", "dist=single") == 2
    assert re.search(r"3 errors.*\n- dist=single.*WORLD_SIZE=2.*\n- optim.*\n- adapter", capfd.readouterr().err)


def test_rows_are_checked_without_a_base(capfd):
    assert checked("./absent", content=lines([*GOOD, {"prompt": "2+2?"}])) == 7
    out, err = capfd.readouterr()
    assert out == "" and "- model.path=./absent: there is no such folder" in err
    assert re.search(r"^    \S*rows\.jsonl:25: completion: is missing", err, re.MULTILINE)


def test_check_and_train_refuse_several_processes_alike(base, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert checked(base, "dist=single") == 2
    message = capfd.readouterr().err
    assert message == "lora-ft: dist=single trains in one process, got WORLD_SIZE=2: set dist=ddp\n"
    overrides = ["model=local", f"model.path={base}", "data.path=rows.jsonl", "hydra.run.dir=run", "dist=single"]
    assert call("train", *overrides) == 2
    assert capfd.readouterr().err == message


def test_eval_row_that_is_also_a_training_row_is_an_error(base, capfd):
    Path("eval.jsonl").write_text(lines([GOOD[3], {"prompt": "Other?", "completion": "Yes."}]))
    assert checked(base, "data.eval_path=eval.jsonl") == 4
    assert re.search(r"1 eval rows are training rows too:\n.*eval\.jsonl:1 is also .*rows\.jsonl:4",
                     capfd.readouterr().err)  # fmt: skip


def test_check_of_a_resumed_run_uses_its_settings(base, tmp_path, capfd):
    run = finished_run(tmp_path, "gpt2", r=2, lora_alpha=7.0)
    assert call("check", f"resume={run}", "train.epochs=2") == 0
    assert re.search(r"scale +3\.5 \(lora_alpha / r\)", capfd.readouterr().out)
    assert call("check", f"resume={run}", "adapter.lora_alpha=9") == 2
    assert "adapter.lora_alpha: 7.0 -> 9.0" in capfd.readouterr().err
    assert checked(base, "resume=auto") == 0
    assert "! resume has no effect: check always looks at a run from its first step" in capfd.readouterr().out


WRONG = {
    "added token": (["model.added_tokens=['<never>']"], 4, "no training row contains <never>"),
    "base": (["model.path=./absent"], 7, "there is no such folder"),
    "template": (["model.chat_template=never_ends.jinja"], 4, "puts no end token after the answer"),
    "init_from": (["adapter.init_from=run/adapter"], 5, "was made for another base"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_setting_gives_the_exit_code_of_training(base, tmp_path, capfd, name):
    overrides, code, message = WRONG[name]
    Path("never_ends.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    if name == "init_from":
        finished_run(tmp_path, "gpt2", r=4, lora_alpha=8.0)
    assert checked(base, *overrides) == code
    assert re.search(message, capfd.readouterr().err)


def shown(base, tmp_path, rows, width=80, color=None, **data):
    """Return the page for these rows as text."""
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    cfg = config.CheckRun(device="cpu", data=config.Data(path="rows.jsonl", eval_fraction=0.0, **data))
    cfg.model.path = str(base)
    tokenizer = tiny_tokenizer()
    rows = read_rows(cfg, tokenizer)
    console = Console(width=width, color_system=color, force_terminal=color is not None)
    with console.capture() as captured:
        console.print(check.page(cfg, partial_dry_run(ErrorCollector(), cfg, rows, tokenizer, tmp_path), tokenizer))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def test_whitespace_is_visible_and_control_characters_are_escaped(base, tmp_path):
    page = shown(base, tmp_path, [{"prompt": "a  b \n\tc\x1b[31m\u202e[bold]x[/bold]", "completion": " d\u00a0e "}])
    assert "a··b·↵\n" in page and "→c\\x1b[31m\\u202e[bold]x[/bold]" in page
    assert "⟦·d\\xa0e·<|im_end|>⟧" in page
    assert "\x1b" not in page and "\u202e" not in page


def test_supervised_masked_and_control_tokens_have_colors_in_a_terminal(base, tmp_path):
    page = shown(base, tmp_path, [{"prompt": "a", "completion": "b"}], color="standard")
    assert "\x1b[32mb\x1b[0m\x1b[36m<|im_end|>" in page and "\x1b[2" in page


def test_long_texts_and_chats_are_shortened_in_the_middle(base, tmp_path):
    chat = [{"role": r, "content": f"{r} {n}"} for n in range(12) for r in ("user", "assistant")]
    chat[0]["content"] = "start " + "x" * 500 + " stop"
    page = " ".join(shown(base, tmp_path, [{"messages": chat}]).split())
    assert "start" in page and "stop" in page and "more characters" in page
    assert "assistant 0" in page and "assistant 11" in page and "assistant 6" not in page and "more parts" in page
    assert page.count("⟦") == page.count("⟧")


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_at_most_three_different_rows_are_shown(base, tmp_path, number):
    page = shown(base, tmp_path, GOOD[:number])
    sources = re.findall(r"^rows\.jsonl:(\d+) \(", page, re.MULTILINE)
    assert len(sources) == len(set(sources)) == min(number, 3)


def test_parts_of_a_row_join_to_its_text():
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    text = "What is the capital of France? The capital of France is Paris. Καλημέρα"
    (ids,) = vocabulary.ids([text])
    for period in (1, 2, 5):
        row = Example(ids=check.np.array(ids), supervised=check.np.arange(len(ids)) // period % 2 == 1, source="x")
        parts = list(check._parts(row, vocabulary))
        assert len(parts) == -(-len(ids) // period)
        if "\ufffd" not in "".join(part for part, _ in parts):
            assert "".join(part for part, _ in parts) == text
    assert [is_supervised for _, is_supervised in parts] == [i % 2 == 1 for i in range(len(parts))]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_page_fits_the_terminal_width(base, tmp_path, width):
    page = shown(base, tmp_path, GOOD, width=width)
    assert max(map(len, page.splitlines())) <= width


def test_page_reports_truncated_dropped_and_unused_data(base, tmp_path):
    rows = [{**row, "score": 1} for row in GOOD] + [{"prompt": "why " * 90, "completion": "So."}]
    cut = shown(base, tmp_path, rows, max_length=64, too_long=config.TooLong.truncate_prompt)
    assert "1 prompts cut (data.too_long=truncate_prompt)" in cut and "columns score" in cut
    dropped = shown(base, tmp_path, rows, max_length=64, too_long=config.TooLong.drop)
    assert re.search(r"1 longer than\s+data\.max_length left out", dropped)


def test_gpu_that_would_wait_for_launches_is_warned_of(base, capfd):
    Path("rows.jsonl").write_text(lines(GOOD))
    with pytest.raises(SystemExit) as ended:
        entry.run("check", ["model=local", f"model.path={base}", "data.path=rows.jsonl", *SHORT, "hardware=rtx_4090"])
    assert not ended.value.code
    page = " ".join(capfd.readouterr().out.split())
    assert re.search(r"! a step of \d+ tokens makes about [\d,]+ kernel launches, \d+ ms, but has only", page)
    assert re.search(r"from about train\.tokens_per_step=\d+ on it would not", page)
    assert re.search(r"memory predicted peak 0\.\d+ of 23\.6 GiB free, in the \w+, .*=off: fits", page)


def test_memory_that_is_too_small_is_a_warning(base, capfd):
    assert checked(base, "hardware.memory=300MiB") == 0
    page = " ".join(capfd.readouterr().out.split())
    assert "GiB free, in the" in page and ": does not fit" in page
    # The prediction includes what this process uses now.
    assert re.search(r"! the run does not fit: 0\.[4-9]\d* of 0\.29 GiB", page) or re.search(
        r"! the run does not fit: [1-9]\.\d+ of 0\.29 GiB", page
    )


def test_step_that_cannot_be_traced_leaves_the_prediction_out(base, capfd, caplog, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no meta function")

    monkeypatch.setattr(prediction, "trace_step", fail)
    assert checked(base) == 0
    assert "predicted peak" not in capfd.readouterr().out
    assert "the memory of llama cannot be predicted" in caplog.text and "no meta function" in caplog.text


def test_cpu_is_not_warned_of_launches(base, capfd):
    assert checked(base) == 0
    assert "launches" not in capfd.readouterr().out
