"""Streamed rows: the order by its definition, exact resume, errors, and little memory."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from finished import call
from tiny import tiny_folder, tiny_tokenizer

import lora_ft
from lora_ft import config
from lora_ft.config import Data, TooLong
from lora_ft.data import parsing
from lora_ft.data.dataset import prepare, tokenized
from lora_ft.data.read import read
from lora_ft.data.sampler import derive, shuffled
from lora_ft.data.streamed import Position, Stream
from lora_ft.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(path: Path, numbers: range) -> str:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n} {'and ' * (n % 5)}so."} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def streamed(data: Data, tokens: int = 60, seed: int = 3, tokenizer: object = TOKENIZER) -> Stream:
    none = read(Data(path=data.path, max_rows=1, eval_fraction=0)).rows.select(np.zeros(0, np.int64))
    return Stream(data, tokenizer, tokenized, seed, tokens, none)


def number(source: str) -> int:
    return int(source.rpartition(":")[2]) - 1


def by_definition(lengths: list[int], buffer: int, tokens: int, seed: int) -> list[list[int]]:
    """Return the steps of two epochs, each row alone."""
    steps: list[list[int]] = []
    for epoch in range(2):
        taken = None
        for block in range(-(-len(lengths) // buffer)):
            rows = range(block * buffer, min((block + 1) * buffer, len(lengths)))
            for place in shuffled(len(rows), derive(seed, "stream", epoch, block)).tolist():
                if taken is None or taken + lengths[rows[place]] > tokens:
                    steps.append([])
                    taken = 0
                steps[-1].append(rows[place])
                taken += lengths[rows[place]]
    return steps


@pytest.mark.parametrize("buffer", [1, 4, 7, 23, 50])
@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.nightly)])
def test_steps_are_blocks_in_turn_each_in_its_own_order(buffer, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "_CHUNK_ROWS", 3)
    data = Data(path=lines(tmp_path / "rows.jsonl", range(23)), eval_fraction=0)
    lengths = [len(e.ids) for e in prepare(data, TOKENIZER).train]
    expected = by_definition(lengths, buffer, 60, 3)
    data.stream, data.shuffle_buffer, data.workers = True, buffer, workers
    stream = streamed(data)
    found = [[number(e.source) for e in stream.step(n)] for n in range(len(expected))]
    stream.close()
    assert found == expected
    assert sorted(row for step in found for row in step) == sorted([*range(23)] * 2)


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 11])
def test_a_stream_goes_on_from_a_position(stop, tmp_path):
    data = Data(path=lines(tmp_path / "rows.jsonl", range(23)), stream=True, shuffle_buffer=5, workers=0)
    whole, part = streamed(data), streamed(data)
    expected = [[e.source for e in whole.step(n)] for n in range(16)]
    for n in range(stop):
        part.step(n)
    position, again = part.position_of(stop), streamed(data)
    again.seek(Position(**json.loads(json.dumps(vars(position)))), stop)
    assert again.position_of(stop) == position
    assert [[e.source for e in again.step(n)] for n in range(stop, 16)] == expected[stop:]
    assert [e.source for e in again.step(15)] == expected[15] and again.position_of(15) != again.position_of(16)
    with pytest.raises(ValueError, match="step 14 of a stream was asked for after step 15"):
        again.step(14)


def test_rows_are_read_only_as_they_are_needed(tmp_path, monkeypatch):
    data = Data(path="endless", stream=True, shuffle_buffer=6, workers=0)
    monkeypatch.setattr(parsing, "_CHUNK_ROWS", 2)
    taken = []

    def endless(*_: object):
        for n in range(10**9):
            taken.append(n)
            yield f"f:{n + 1}", {"text": f"{n} and"}

    monkeypatch.setattr("lora_ft.data.streamed.records", endless)
    monkeypatch.setattr("lora_ft.data.parsing.records", endless)
    monkeypatch.setattr("lora_ft.data.read._check_splits", lambda data: None)
    stream = streamed(data, tokens=1)
    assert sorted(number(stream.step(n)[0].source) for n in range(6)) == list(range(6))
    assert max(taken) < 14, "a block, and the next one as far as this one was taken"


def test_a_bad_row_is_refused_when_the_block_before_it_begins(tmp_path):
    path = Path(lines(tmp_path / "rows.jsonl", range(10)))
    with path.open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    stream = streamed(Data(path=str(path), stream=True, shuffle_buffer=4, workers=0), tokens=1)
    assert len([stream.step(n) for n in range(3)]) == 3
    with pytest.raises(DataError, match=r"1 bad row:\n .*rows\.jsonl:11: completion: is missing"):
        [stream.step(n) for n in range(3, 11)]


def test_an_eval_row_among_the_streamed_rows_is_refused(tmp_path):
    lines(tmp_path / "eval.jsonl", range(8, 9))
    data = Data(path=lines(tmp_path / "rows.jsonl", range(12)), eval_path=str(tmp_path / "eval.jsonl"), stream=True,
                shuffle_buffer=5, workers=0)  # fmt: skip
    dataset = prepare(data, TOKENIZER)
    assert (len(dataset.train), len(dataset.eval), dataset.report.is_stream) == (5, 1, True)
    assert str(dataset.report).startswith("the first 6 rows")
    stream = Stream(data, TOKENIZER, tokenized, 0, 1, dataset.eval_rows)
    with pytest.raises(
        DataError, match=r"1 eval rows are training rows too:\n .*eval\.jsonl:1 is also .*rows\.jsonl:9"
    ):
        [stream.step(n) for n in range(12)]


def test_a_hub_dataset_is_streamed_with_the_values_that_are_stored(tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": str(n), **({"name": "x"} if n % 2 else {})},
                          {"role": "assistant", "content": "Yes."}]} for n in range(9)]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    load = datasets.load_dataset

    def load_dataset(path, name, *, split, revision, streaming):
        assert streaming
        return load("parquet", data_files=str(tmp_path / "rows.parquet"), split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Data(path="org/rows", eval_fraction=0, stream=True, shuffle_buffer=4, workers=0)
    assert [row.messages for row in read(data).rows] == [row["messages"] for row in rows[:4]]
    none = read(data).rows.select(np.zeros(0, np.int64))
    stream = Stream(data, TOKENIZER, tokenized, 0, 10**6, none)
    assert sorted(e.source for e in stream.step(0)) == [f"org/rows:row {n}" for n in range(1, 10)]


def test_rows_that_are_all_left_out_end_the_stream_with_an_error(tmp_path):
    data = Data(path=lines(tmp_path / "rows.jsonl", range(12)), stream=True, shuffle_buffer=5, workers=0, max_length=8,
                too_long=TooLong.drop)  # fmt: skip
    with pytest.raises(DataError, match="no row is left to train on"):
        streamed(data).step(0)


def settings(tmp_path: Path, *overrides: str) -> config.TrainRun:
    base = tmp_path / "llama" if (tmp_path / "llama").is_dir() else tiny_folder(tmp_path, "llama")
    lines(tmp_path / "eval.jsonl", range(100, 104))
    words = [
        f"model.path={base}", f"data.path={lines(tmp_path / 'rows.jsonl', range(40))}", "data.stream=true",
        "data.shuffle_buffer=7", f"data.eval_path={tmp_path / 'eval.jsonl'}", "data.workers=0", "device=cpu",
        "train.max_steps=9", "train.tokens_per_step=100", "train.save_every_steps=1", "train.samples=1", "adapter.r=4",
        "data.max_length=200",
    ]  # fmt: skip
    return lora_ft.compose("train", [*words, *overrides])


def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    class Stop(lora_ft.Callback):
        def on_step(self, state, metrics):
            if metrics["step"] == 4:
                raise KeyboardInterrupt

    whole = lora_ft.train(settings(tmp_path), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lora_ft.train(settings(tmp_path), folder=tmp_path / "part", callbacks=[Stop()])
    resumed = lora_ft.train(settings(tmp_path, "resume=auto"), folder=tmp_path / "part")
    assert resumed.result.adapter_sha256 == whole.result.adapter_sha256
    assert [line.get("loss") for line in resumed.history] == [line.get("loss") for line in whole.history]
    assert whole.result.steps == 9


def test_check_and_eval_say_that_the_rows_are_streamed(tmp_path, capfd):
    cfg = settings(tmp_path)
    run = lora_ft.train(cfg, folder=tmp_path / "run")
    words = [f"model.path={cfg.model.path}", f"data.path={cfg.data.path}", "data.stream=true", "device=cpu",
             "data.shuffle_buffer=7", "data.max_length=200",
             f"data.eval_path={cfg.data.eval_path}", "train.max_steps=9"]  # fmt: skip
    capfd.readouterr()
    assert call("check", *words) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "stream the figures are those of the first 7 rows" in shown and "steps 9 of at most" in shown
    assert call("eval", f"run={run.folder}", "device=cpu", "eval.max_new_tokens=2") == 0
    assert json.loads((run.folder / "eval.json").read_text())["rows"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_steps=null"], "data.stream=true needs train.max_steps"),
        (["data.deduplicate=true"], "data.deduplicate needs all rows"),
        (["data.eval_path=null"], "set data.eval_path to a file of eval rows, or data.eval_fraction=0"),
        (
            ["train.tokens_per_microbatch=99"],
            r"data\.max_length=200 allows rows .*tokens_per_microbatch: lower it to 99",
        ),
        (["data.max_length=1024"], r"data\.max_length=1024 allows rows .* the context of the model: lower it to 256"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_a_stream_are_refused(overrides, message, tmp_path):
    cfg = settings(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        lora_ft.train(cfg, folder=tmp_path / "run")
