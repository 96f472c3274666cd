"""Settings of several sources: on the command line, in files, in Python, and what is refused."""

from pathlib import Path

import pytest

import lora_ft
from lora_ft import config, mixing, validation
from lora_ft.cli import completion, entry, overrides
from lora_ft.errors import ConfigError

TWO = ["data.sources.chat.path=chat.jsonl", "data.sources.wiki.path=wiki.txt"]
MIXED = [*TWO, "data.mix.chat=0.7", "data.mix.wiki=0.3"]


def composed(*words: str) -> config.Data:
    return lora_ft.compose("train", list(words)).data


def test_source_inherits_settings_of_data_and_overrides_them() -> None:
    data = composed(*MIXED, "data.max_length=99", "data.system=Be short.", "data.columns.prompt=question",
                    "data.sources.wiki.format=text", "data.sources.wiki.system=null", "data.sources.wiki.max_rows=7",
                    "data.sources.chat.columns.completion=my answer")  # fmt: skip
    columns = {"prompt": "question"}
    assert mixing.sources(data) == {
        "chat": config.Data(
            path="chat.jsonl", max_length=99, system="Be short.", columns={**columns, "completion": "my answer"}
        ),
        "wiki": config.Data(path="wiki.txt", max_length=99, columns=columns, format=config.Format.text, max_rows=7),
    }
    assert mixing.shares(data) == {"chat": 0.7, "wiki": 0.3}


def test_data_without_sources_is_one_source_without_a_name() -> None:
    data = composed("data.path=rows.jsonl")
    assert (mixing.sources(data), mixing.named(data)) == ({}, {"": data})


def test_order_of_the_sources_on_the_command_line_changes_nothing() -> None:
    one, other = composed(*MIXED), composed(*reversed(MIXED))
    assert list(mixing.sources(one).items()) == list(mixing.sources(other).items())
    assert list(mixing.shares(one).items()) == list(mixing.shares(other).items())


def test_shares_are_relative_to_their_sum() -> None:
    assert mixing.shares(composed(*TWO, "data.mix={chat: 3, wiki: 1}")) == {"chat": 0.75, "wiki": 0.25}


@pytest.mark.parametrize("text", ["It's (mine), ${x}.txt", "a=b", " lead"])
def test_text_of_a_source_is_taken_literally(text: str) -> None:
    assert composed(*MIXED, f"data.sources.wiki.path={text}").sources["wiki"]["path"] == text


def test_choice_of_the_group_data_can_be_a_source(tmp_path: Path) -> None:
    data = composed("data@data.sources.talk=chatterbot", "data.sources.talk.max_rows=3", "data.mix.talk=1")
    talk = mixing.sources(data)["talk"]
    assert talk == config.Data(path="package:chatterbot_corpus/data/english", deduplicate=True, max_rows=3)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mixed.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - /data@data.sources.chat: chat\n"
        "data:\n  sources:\n    chat: {path: chat.jsonl}\n    wiki:\n      path: wiki.txt\n"
        "  mix: {chat: 0.7, wiki: 0.3}\n"
    )
    of_file = lora_ft.compose("train", ["experiment=mixed"], config_dir=tmp_path).data
    assert mixing.sources(of_file)["chat"].format is config.Format.messages
    other = lora_ft.compose("train", ["experiment=mixed", "data@data.sources.chat=alpaca"], config_dir=tmp_path).data
    assert mixing.sources(other)["chat"].format is config.Format.alpaca
    assert mixing.shares(other) == {"chat": 0.7, "wiki": 0.3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources.wiki.pth=a"], "data.sources.wiki.pth is not a setting; nearest: data.sources.wiki.path"),
        (["data.sources.wiki.sources={a: {path: b}}"], "data.sources.wiki.sources is not a setting"),
        (["data.sources={wiki: {mix: {a: 1}}}"], "data.sources.wiki.mix is not a setting: a source has no sources"),
        (["data.sources={wiki: {max_row: 1}}"], "wiki.max_row is not a setting; nearest: data.sources.wiki"),
        (["data.sources.wiki.max_rows=0"], "data.sources.wiki.max_rows must be at least 1, got 0"),
        (["data.sources.wiki.max_rows=a"], "data.sources.wiki.max_rows: Value 'a' of type 'str' could not be"),
        (["data.sources.wiki.format=book"], "data.sources.wiki.format: Invalid value 'book', expected one of [auto,"),
        (["data.sources.wiki.columns=a"], "data.sources.wiki.columns: "),
        (["data.sources.wiki=a"], "data.sources.wiki must be a mapping like {a:b}, got a"),
        (["data.sources=a"], "data.sources must be a mapping like {a:b}, got a"),
        (["data.sources={7up: {path: a}}"], "data.sources.7up: the name of a source has letters, digits, _ and -"),
        (["data.mix.wiki=-1"], "data.mix.wiki must be at least 0, got -1"),
        (["data.mix.wiki=inf"], "data.mix.wiki must be finite, got inf"),
        (["data.mix.wiki=nan"], "data.mix.wiki must be finite, got nan"),
        (["data.mix.wiki=much"], "data.mix.wiki must be a number, got much"),
        (["data.mix.wiki=null"], "data.mix.wiki must be a number, got null"),
        (["data.mix_until=last"], "data.mix_until must be one of first, all, got last"),
    ],
)  # fmt: skip
def test_wrong_settings_of_a_source_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(*MIXED, *words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.mix.news=1"], "data.mix.news=1 is the share of no source: data.sources has chat, wiki"),
        (["data.sources.news.path=a"], "data.mix has no share for the source news: set data.mix.news=SHARE, 0 to"),
        (
            ["data.sources.a.path=a", "data.sources.b.path=b"],
            "data.mix has no share for the sources a, b: set data.mix.a",
        ),
        (["data.path=c.txt"], "data.path=c.txt is the path of no source: make it one, data.sources.NAME.path=c.txt"),
        (["data.mix={chat: 0, wiki: 0}"], "data.mix must have a share above 0, got 0 for chat, wiki"),
        (["data.sources.news.max_rows=2", "data.mix.news=1"], "data.sources.news.path is empty"),
        (["data.mix.wiki=0", "data.sources.wiki.eval_fraction=0"], "data.mix.wiki=0 needs eval rows"),
        (["data.sources.chat.path=wiki.txt"], "data.sources.chat and data.sources.wiki read the same rows"),
        (["data.stream=true"], "data.stream=true reads the rows of one path, and data.sources has chat, wiki"),
        (
            ["data.sources.wiki.stream=true"],
            "data.sources.wiki.stream=true reads the rows of one path, and data",
        ),
        (["data.eval_path=b.txt"], "data.eval_path=b.txt would be the eval rows of each of chat, wiki"),
    ],
)
def test_mix_that_does_not_fit_its_sources_is_refused(words: list[str], message: str) -> None:
    cfg = lora_ft.compose("train", [*MIXED, *words])
    with pytest.raises(ConfigError) as error:
        validation.validate(cfg)
    assert message in str(error.value)


def test_mix_without_sources_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mix\.chat=1 is the share of no source: data\.sources is empty"):
        validation.validate(lora_ft.compose("train", ["data.path=a", "data.mix.chat=1"]))


def test_paths_of_sources_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wiki.txt").touch()
    found = {name: source["path"] for name, source in composed(*MIXED).sources.items()}
    assert found == {"chat": "chat.jsonl", "wiki": str(tmp_path / "wiki.txt")}


def test_eval_rows_of_any_source_count() -> None:
    without = ["data.eval_fraction=0", "train.keep=best"]
    with pytest.raises(ConfigError, match=r"train\.keep=best and train.patience need eval rows"):
        validation.validate(lora_ft.compose("train", [*MIXED, *without]))
    validation.validate(lora_ft.compose("train", [*MIXED, *without, "data.sources.wiki.eval_path=b.txt"]))


def test_config_survives_conversion_to_plain_values() -> None:
    cfg = lora_ft.compose("train", [*MIXED, "data.mix_until=all"])
    plain = validation.to_plain(cfg)
    assert plain["data"]["sources"] == {"chat": {"path": "chat.jsonl"}, "wiki": {"path": "wiki.txt"}}
    assert validation.from_plain(config.TrainRun, plain) == cfg
    cfg.data.sources["wiki"]["format"] = config.Format.text  # as one may write it in Python
    assert validation.to_plain(cfg)["data"]["sources"]["wiki"]["format"] == "text"
    assert validation.typed(cfg, config.TrainRun).data.sources["wiki"]["format"] == "text"


def test_settings_and_choices_of_a_source_complete() -> None:
    keys = completion.reply("lora-ft train data.sources.wiki.eval_", "")
    assert keys == [f"data.sources.wiki.eval_{name}=" for name in ("fraction", "split", "path")]
    assert completion.reply("lora-ft train data.sources.wiki.format=te", "") == ["data.sources.wiki.format=text "]
    assert completion.reply("lora-ft train data@data.sources.wiki=te", "") == ["data@data.sources.wiki=text "]
    assert "data.mix_until=" in completion.reply("lora-ft train data.m", "")


def test_overrides_of_sources_can_be_typed_again() -> None:
    typed = [*MIXED, "data.sources.chat.columns.prompt=my question", "data.sources.wiki.max_rows=3",
             "+data@data.sources.talk=chatterbot"]  # fmt: skip
    assert list(overrides.as_typed("train", overrides.translate("train", typed, sweep=False))) == typed


def test_cfg_job_shows_the_sources(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.run("train", [*MIXED, "--cfg", "job", "--package", "data.mix"])
    assert ended.value.code == 0
    assert capfd.readouterr().out == "# @package data.mix\nchat: 0.7\nwiki: 0.3\n"
