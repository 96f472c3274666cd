"""The README keeps its word: its commands run as written, its settings exist."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import tiny_folder

import lora_ft
from lora_ft import config
from lora_ft.cli import entry
from lora_ft.errors import LoraFtError

ROOT = Path(lora_ft.__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]

FIRST = next(command for command in COMMANDS if command.startswith("lora-ft train"))

# Every run below is the command as written, made short. The first command trains the README's own base; it runs again
# on a tiny base, which is that of all other commands.
SHORT = {
    "train": ("train.max_steps=1", "train.tokens_per_step=64", "train.eval_rows=2", "train.samples=1", "device=cpu"),
    "eval": ("eval.samples=1", "eval.max_new_tokens=4", "device=cpu"),
    "chat": ("sampling.max_new_tokens=4", "device=cpu"),
    "merge": ("device=cpu", "eval_rows=2"),
    "publish": ("device=cpu",),
    "check": ("device=cpu",),
    "sweep": ("train.max_steps=1", "train.tokens_per_step=64", "train.eval_rows=2", "train.samples=1", "device=cpu"),
    "report": (),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's reader has."""
    folder = tmp_path_factory.mktemp("reader")
    chats = [{"messages": [{"role": "user", "content": f"What is {n} + {n}?"},
                           {"role": "assistant", "content": f"It is {n + n}."}]} for n in range(40)]  # fmt: skip
    (folder / "my.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "cities.csv").write_text("city,country\n" + "".join(f"City {n},Country {n}\n" for n in range(40)))
    tiny_folder(folder, "llama")
    (folder / "pairs.csv").write_text("english,german\n" + "".join(f"number {n},Zahl {n}\n" for n in range(40)))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_written(command: str, folder: Path, monkeypatch, capfd) -> None:
    """In their order: a later command uses what an earlier one made."""
    monkeypatch.chdir(folder)
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        assert subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True).stdout
        return
    assert program == "lora-ft"
    short = () if {"--help", "--cfg"} & set(words) or words[1].startswith("resume=my_sweep") else SHORT[words[0]]
    if command == FIRST:
        run([*words, *short], capfd)
        shutil.rmtree("my_run")
    if short and words[0] in ("train", "check", "sweep") and "resume=" not in command:
        short = (*short, "model.path=llama")
    run([*words, *short], capfd)


def run(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process; it succeeds and prints something."""
    with pytest.raises(SystemExit) as ended:
        entry.run(None, words)
    shown = capfd.readouterr()
    assert (ended.value.code or 0) == 0, shown.err
    assert shown.out.strip()


def test_there_are_commands_to_run() -> None:
    assert {c.split()[1] for c in COMMANDS if c.startswith("lora-ft")} == set(config.SCHEMAS)


def test_every_command_and_exit_code_is_named() -> None:
    assert all(f"`lora-ft {command}`" in README for command in config.SCHEMAS)
    (said,) = re.findall(r"Exit codes: (.*?)\.\n", README)
    codes = {error.exit_code for error in LoraFtError.__subclasses__()}
    assert {int(code) for code in re.findall(r"(?:^|, )(\d+) ", said)} == {0, 1, 3, 130, 141} | codes


def test_no_placeholder_is_left() -> None:
    """Figures are filled in from measurements: none of the usual marks of a gap may be left in README or docs."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    gaps = re.compile(r"@@|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b|\?\?\?|<[a-z ]*figure[a-z ]*>", re.IGNORECASE)
    assert [f"{page.name}: {line}" for page in pages for line in page.read_text("utf-8").splitlines()
            if gaps.search(line)] == []  # fmt: skip
