"""Secrets planted in the environment, settings, paths and rows appear in no file and in no output."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from finished import rows_file
from tiny import tiny_folder

from lora_ft.cli import entry
from lora_ft.errors import DataError
from lora_ft.io import durable, redact

# Forms that are made up; each provider's own check of a real one would fail.
CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryCanaryCanaryCanary0001",
    "WANDB_API_KEY": "c0ffee" * 6 + "0002",
    "AWS_SECRET_ACCESS_KEY": 'ca"na\\ry/two+words=0003',
    "AWS_ACCESS_KEY_ID": "AKIA" + "CANARYCANARY0004",
    "OPENAI_API_KEY": "sk-" + "canary-canary-canary-0005",
    "GITHUB_TOKEN": "ghp_" + "CanaryCanaryCanaryCanary0006",
    "MLFLOW_TRACKING_PASSWORD": "größe-canary-0007",
    "MY_DB_PWD": "canary-0008-of-a-database",
    "GOOGLE_APPLICATION_CREDENTIALS": "/keys/canary-0009.json",
    "SLACK_TOKEN": "xoxb-" + "0010-canary-canary",
    "SSH_PRIVATE_KEY": "-----BEGIN OPENSSH PRIVATE KEY-----\ncanary0011\n-----END OPENSSH PRIVATE KEY-----",
    "NPM_AUTH": "canary-0012-npm",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    return CANARIES


def leaks(*texts: str) -> set[str]:
    """Return the variables whose values a text holds, plain or escaped, whole or their second half."""
    found = set()
    for name, value in CANARIES.items():
        forms = {value, json.dumps(value)[1:-1], repr(value)[1:-1], value[len(value) // 2 :]}
        found |= {name for text in texts if any(form in text for form in forms)}
    return found


def written(folder: Path) -> list[str]:
    """Contents and names of everything below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in folder.rglob("*")] + [
        path.read_bytes().decode("utf-8", "replace") for path in files
    ]


def test_all_twelve_secrets_are_found_and_replaced(planted: dict[str, str]) -> None:
    assert len(planted) == 12
    for name, value in planted.items():
        assert redact.held(f"before {value} after") is not None, name
        for text in (value, json.dumps({"a": value}), repr([value]), f"x{value}y"):
            assert leaks(text) and not leaks(redact.redact(text)), name
        assert redact.redact(f"before {value} after").startswith("before [redacted ")


@pytest.mark.parametrize(
    "text",
    ["hf_" + "a" * 34, "sk-ant-" + "a" * 30, "ghp_" + "a" * 36, "github_pat_" + "a" * 40, "glpat-" + "a" * 20,
     "AKIA" + "A" * 16, "AIza" + "a" * 35, "xoxp-" + "1" * 12, "eyJ" + "a" * 20 + ".eyJ" + "b" * 20 + ".c",
     "https://me:pass@host/rows.jsonl", "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----"],
)  # fmt: skip
def test_credential_is_recognized_by_its_form(text: str) -> None:
    assert redact.held(text)
    assert "[redacted " in redact.redact(f"({text})")


@pytest.mark.parametrize(
    "text",
    ["a plain sentence", "task-oriented-dialogue-model-v2", "hf_transfer", "https://host:8080/rows", "user@host.org",
     "0f" * 32, "meta-llama/Llama-3.2-1B", "risk-adjusted-returns-of-portfolios", "http://[::1]:80/@x", "a: b@c"],
)  # fmt: skip
def test_other_text_is_unchanged(text: str) -> None:
    assert redact.held(text) is None
    assert redact.redact(text) == text


def test_secret_variables_are_recognized_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = [*CANARIES, "TOKEN", "hf-token", "DB_PASSWORD", "API_KEY_2", "CLIENT_SECRET_VALUE", "secretThing", "x_pat"]
    plain = ["TOKENIZERS_PARALLELISM", "PATH", "PWD", "OLDPWD", "MONKEY", "KEYBOARD", "SSH_AUTH_SOCK", "COMPASS"]
    assert [name for name in secret if not redact.is_secret_name(name)] == []
    assert [name for name in plain if redact.is_secret_name(name)] == []
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact.redact("abc") == "abc"


WORDS = {
    "postgres": True, "password=postgres": True, "password: 'postgres'": True, "It is postgres.": True,
    "me:postgres@host": True, "(postgres, 5432)": True, "a:\npostgres\nb": True,
    "postgres_rows": False, "postgres-14": False, "mypostgres": False, "postgresql": False, "über-postgres": False,
    "/data/postgres_rows.jsonl": False, "/home/postgres/rows.jsonl": False, "postgres.jsonl": False,
    "postgres/rows.jsonl": False, "runs/postgres": False,
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_short_secret_of_letters_counts_as_a_whole_word_outside_of_file_names(text, monkeypatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    for form in (text, json.dumps({"a": [text]}), repr([text])):
        expected = form.replace("postgres", "[redacted POSTGRES_PASSWORD]") if WORDS[text] else form
        assert redact.redact(form) == expected
        assert redact.held(form) == ("POSTGRES_PASSWORD" if WORDS[text] else None)


@pytest.mark.parametrize("value", ["p" * 16, "postgres1", "post-gres"])
def test_long_secret_or_one_with_other_characters_is_found_inside_of_words(value, monkeypatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", value)
    assert redact.redact(f"/x{value}y") == "/x[redacted POSTGRES_PASSWORD]y"


def test_existing_path_is_not_a_secret(tmp_path, monkeypatch) -> None:
    for name in ("PASSWORD_STORE_DIR", "MY_SECRETS_DIR", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, str(tmp_path))
        assert redact.redact(f"{tmp_path}/run") == f"{tmp_path}/run" and redact.held(str(tmp_path)) is None
        monkeypatch.setenv(name, f"{tmp_path}/gone")
        assert redact.held(f"{tmp_path}/gone") == name
    monkeypatch.chdir(tmp_path)
    Path("existing").touch()
    monkeypatch.setenv("API_KEY", "existing")
    assert redact.held("key=existing") == "API_KEY"


def test_texts_written_by_durable_are_redacted(planted: dict[str, str], tmp_path: Path) -> None:
    for number, value in enumerate(planted.values()):
        durable.write_text(tmp_path / f"{number}.txt", f"a {value} b")
        durable.write_json(tmp_path / f"{number}.json", {"a": [value]})
        durable.append_line(tmp_path / "log.txt", f"a {value} b")
        json.loads((tmp_path / f"{number}.json").read_text())
    assert leaks(*written(tmp_path)) == set()


def test_streams_are_redacted_and_restored(planted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with redact.shown():
        sys.stdout.write("\n".join(planted.values()))
        sys.stderr.writelines(planted.values())
        logging.getLogger("lora_ft").warning("%s", list(planted.values()))
    assert (sys.stdout, sys.stderr) == before
    assert leaks(*capsys.readouterr()) == set()


def test_traceback_of_a_bug_is_redacted(planted: dict[str, str]) -> None:
    code = (
        "import os, sys; from lora_ft.cli import entry\n"
        "from lora_ft.cli import composition\n"
        "def fail(*_): raise ZeroDivisionError(*os.environ.values())\n"
        "composition.run = fail\n"
        "entry.run('train', ['data.path=x'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr and "[redacted HF_TOKEN]" in ended.stderr
    assert leaks(ended.stdout, ended.stderr) == set()


def _overrides(tmp_path: Path, rows: Path) -> list[str]:
    base = tmp_path / "llama" if (tmp_path / "llama").is_dir() else tiny_folder(tmp_path, "llama")
    return ["model=local", f"model.path={base}", f"data.path={rows}", "data.eval_fraction=0.4",
            "train.max_steps=1", "train.tokens_per_step=64", "track=tensorboard", "device=cpu"]  # fmt: skip


def _call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        entry.run("train", [*arguments])
    return int(ended.value.code or 0)


def _bad_rows(tmp_path: Path) -> Path:
    """Write rows with errors whose messages quote the rows."""
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"prompt": v, "completion": "", v: v}) + "\n" for v in CANARIES.values()))
    return path


@pytest.mark.closes("G01")
@pytest.mark.parametrize(("sweep", "outcome"), [(False, "ends"), (True, "fails")], ids=["run", "sweep"])
def test_no_secret_reaches_a_file_or_the_screen(
    sweep: bool, outcome: str, planted: dict[str, str], tmp_path: Path, monkeypatch, capfd
) -> None:
    rows = rows_file(tmp_path) if outcome == "ends" else _bad_rows(tmp_path)
    overrides = _overrides(tmp_path, rows)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    several = ["-m", "adapter.lora_alpha=8,16", "hydra.sweep.dir=sweep"] if sweep else ["hydra.run.dir=run"]
    # an unresolved reference may stand in multirun.yaml: it is a name, not a value
    code = _call(*overrides, *several, "hydra.job.env_copy=[HOME]")
    assert code == (0 if outcome == "ends" else DataError.exit_code)
    shown = capfd.readouterr()
    texts = written(tmp_path / "here")
    assert leaks(*texts, shown.out, shown.err) == set()
    if outcome == "fails":
        assert "[redacted HF_TOKEN]" in shown.err + shown.out
    if sweep:
        assert (tmp_path / "here" / "sweep" / "multirun.yaml").is_file()


@pytest.mark.closes("G01")
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.system=the key is {HF_TOKEN}"],
        ["data.system={HF_TOKEN}", "data.system=taken back"],
        ["data.path=https://me:{OPENAI_API_KEY}@host/rows.jsonl"],
        ["adapter.target_modules=[q_proj,{NPM_AUTH}]"],
        ["data.columns.{NPM_AUTH}=text"],
        ["hydra.run.dir=runs/${{oc.env:NPM_AUTH}}"],
        ["-m", "hydra.sweep.dir=runs/${{oc.env:NPM_AUTH}}"],
        ["-m", "experiment=mine"],
        ["-m", "data.system=choice(a,{HF_TOKEN})"],
        ["-m", "hydra.job.env_copy=[HF_TOKEN]"],
        ["-m", "+hydra.job.env_set.OTHER={HF_TOKEN}"],
        ["seed={HF_TOKEN}"],
        ["adapter.{NPM_AUTH}=3"],
        ["experiment=mine"],
    ],
    ids=" ".join,
)
def test_secret_in_a_setting_is_refused_before_anything_is_written(
    overrides: list[str], planted: dict[str, str], tmp_path: Path, monkeypatch, capfd
) -> None:
    """The exit code is 9, or 2 for an unknown setting or wrong type; the message does not hold the secret."""
    (tmp_path / "experiment").mkdir()
    configured = "# @package _global_\ndata: {system: '${oc.env:HF_TOKEN}'}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(configured)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    typed = [override.format(**planted) for override in overrides]
    code = _call("--config-dir", str(tmp_path), "model.path=base", "data.path=rows.jsonl", *typed)
    shown = capfd.readouterr()
    malformed = overrides[0].startswith(("seed=", "experiment={", "adapter.{", "data.columns.{"))
    assert code == (2 if malformed and code == 2 else 9), shown.err
    assert leaks(shown.out, shown.err) == set()
    assert list(Path.cwd().rglob("*")) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [("data.path=https://host/{NPM_AUTH}", "data.path"), ("data.system={HF_TOKEN}", "data.system"),
     ("adapter.target_modules=[q_proj,{NPM_AUTH}]", "adapter.target_modules"),
      ("hydra.run.dir={NPM_AUTH}", "hydra.run.dir"),
     ("data.system='the password is postgres'", "data.system")],
)  # fmt: skip
def test_setting_that_holds_a_secret_is_named(override, key, planted, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.chdir(tmp_path)
    assert _call("model.path=base", "data.path=rows.jsonl", override.format(**planted)) == 9
    assert capfd.readouterr().err.startswith(f"lora-ft: {key} holds a secret (")


def test_common_words_and_folders_in_secret_variables_are_no_secrets(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("MY_SECRETS_DIR", str(tmp_path))
    here = tmp_path / "postgres"
    here.mkdir()
    monkeypatch.chdir(here)
    assert _call("model.path=base", f"data.path={tmp_path}/postgres_rows.jsonl") != 9
    assert "secret (" not in capfd.readouterr().err


def test_secret_in_the_path_of_the_current_folder_is_refused(planted, tmp_path, monkeypatch, capfd) -> None:
    here = tmp_path / CANARIES["NPM_AUTH"]
    here.mkdir()
    monkeypatch.chdir(here)
    assert _call("model.path=base", "data.path=rows.jsonl") == 9
    assert leaks(*capfd.readouterr()) == set() and list(here.iterdir()) == []


def test_cfg_flag_shows_no_secrets(planted: dict[str, str], tmp_path: Path, capfd) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndata: {system: '${oc.env:HF_TOKEN}'}\n")
    assert _call("--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job", "--resolve") == 0
    shown = capfd.readouterr()
    assert "[redacted HF_TOKEN]" in shown.out and leaks(*shown) == set()
