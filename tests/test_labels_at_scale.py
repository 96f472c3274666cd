"""Labels of many rows, of streamed rows and of several sources: the same as those of a plain loop, or a clear error."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import call
from tiny import tiny_folder, tiny_tokenizer

from lora_ft import mixing
from lora_ft.config import Data
from lora_ft.data import columns, dataset, labels, mixed_dataset, parsing
from lora_ft.data.dataset import prepare, tokenized
from lora_ft.data.read import read
from lora_ft.data.streamed import Stream
from lora_ft.errors import ConfigError, DataError
from lora_ft.evaluation.class_set import label_set, labelled

TOKENIZER = tiny_tokenizer()
PAIRS = {"prompt": "{text}", "answer": "{label}"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, words: list[Any]) -> str:
    rows = [{"text": f"{path.stem} {number}", "label": word} for number, word in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "FIRST_ROWS", 10)
    monkeypatch.setattr(parsing, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(columns, "_MOST_IN_MEMORY", 500)


# --- many rows ---


@pytest.mark.parametrize("given", ["auto", ["c", "b", "a", "d"], {"a": "x", "b": "y", "c": "x"}], ids=str)
@pytest.mark.parametrize("processes", [0, 2])
def test_labels_of_chunks_are_those_of_a_loop(given: Any, processes: int, tmp_path: Path, small_chunks: None) -> None:
    words = ["b", "a", "a", *"ca" * 20, "b", "c"]
    data = Data(path=write(tmp_path / "rows.jsonl", words), labels=given, workers=processes, **PAIRS)
    found = read(data)
    mapped = [given.get(word, word) if isinstance(given, dict) else word for word in words]
    assert [row.answer for row in found.rows] == mapped
    assert [found.rows.words[number] for number in found.rows.labels] == mapped
    trained = Counter(row.answer for row in found.training_rows)
    order = {"auto": ["a", "b", "c"]}.get(str(given)) or list(dict.fromkeys(labels.of(data).names))
    assert prepare(data, TOKENIZER).report.labels == {label: trained[label] for label in order}


def test_labels_of_rows_that_are_left_out_do_not_count(tmp_path: Path, small_chunks: None) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {n % 9}", "label": "ab"[n % 9 % 2]} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(path=str(path), labels="auto", eval_fraction=0, deduplicate=True, **PAIRS)
    assert prepare(data, TOKENIZER).report.labels == {"a": 5, "b": 4}


def test_many_different_answers_end_the_reading(tmp_path: Path, small_chunks: None) -> None:
    path = write(tmp_path / "rows.jsonl", list(range(3000)))
    with pytest.raises(DataError, match="rows have more than 1,000 different answers"):
        read(Data(path=path, labels="auto", workers=0, **PAIRS))


def test_other_labels_are_other_rows_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples depend on the text of the labels, and on nothing else of data.labels."""
    monkeypatch.setattr(dataset, "_CACHED_FROM_ROWS", 1)
    path = write(tmp_path / "rows.jsonl", ["0", "1"] * 6)
    made = {}
    maps = {"first": {0: "no", 1: "yes"}, "swapped": {0: "yes", 1: "no"}}
    for name, given in {**maps, "none": None, "auto": "auto", "again": maps["first"]}.items():
        made[name] = prepare(Data(path=path, labels=given, **PAIRS), TOKENIZER)
    assert {name: found.report.cached for name, found in made.items()} == {
        "first": False, "swapped": False, "none": False, "auto": True, "again": True,
    }  # fmt: skip
    assert made["first"].report.sha256 == made["again"].report.sha256 != made["swapped"].report.sha256
    assert made["again"].report.labels == made["first"].report.labels


# --- streamed rows ---


def streamed(tmp_path: Path, words: list[str], given: Any, evaluated: list[str] | None = None, **options: Any) -> Data:
    held_out = write(tmp_path / "eval.jsonl", evaluated) if evaluated else None
    return Data(path=write(tmp_path / "rows.jsonl", words), eval_path=held_out, eval_fraction=0, labels=given,
                stream=True, shuffle_buffer=4, workers=0, **PAIRS, **options)  # fmt: skip


def stream_of(data: Data) -> Stream:
    made = prepare(data, TOKENIZER)
    assert made.eval_rows is not None
    return Stream(labels.of_stream(data, made.answers), TOKENIZER, tokenized, 0, 60, made.eval_rows)


def test_labels_of_a_stream_are_those_of_its_eval_rows(tmp_path: Path) -> None:
    data = streamed(tmp_path, list("aaaaaabb"), "auto", ["b", "a", "c"])
    assert prepare(data, TOKENIZER).report.labels == {"a": 4, "b": 0, "c": 0}  # of the first block
    assert stream_of(data).step(0)


@pytest.mark.parametrize(
    ("words", "place"),
    [("aazaaa", "rows.jsonl:3: label: z is not a label of the eval rows"), ("aaaaaz", "label: z is")],
)
def test_a_streamed_row_with_another_label_is_named(words: str, place: str, tmp_path: Path) -> None:
    data = streamed(tmp_path, list(words), "auto", ["a", "b"])
    with pytest.raises(DataError, match=place):
        stream = stream_of(data)
        for number in range(6):
            stream.step(number)


def test_labels_of_a_stream_without_eval_rows_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.stream=true .* data.labels=auto .* there are none: name the labels"):
        prepare(streamed(tmp_path, list("aabb"), "auto"), TOKENIZER)
    named = streamed(tmp_path, list("aaaab"), ["a", "b"])  # the first block has one label only
    assert prepare(named, TOKENIZER).answers == ["a", "b"]
    assert stream_of(named).step(0)


def test_eval_rows_of_one_label_are_too_few_for_a_stream(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every eval row has the label a: two are needed"):
        prepare(streamed(tmp_path, list("aaaa"), "auto", ["a", "a"]), TOKENIZER)


# --- several sources ---


@pytest.fixture
def mixed(tmp_path: Path) -> Data:
    """Two sources with labels, each in its own way, and one without."""
    chats = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    first, second = write(tmp_path / "a.jsonl", ["no", "yes"] * 5), write(tmp_path / "b.jsonl", [1, 0] * 6)
    return Data(
        sources={"a": {"path": first, "labels": ["no", "yes"], **PAIRS},
                 "b": {"path": second, "labels": {0: "no", 1: "yes"}, "system": "Be brief.", **PAIRS},
                 "chat": {"path": str(tmp_path / "chat.jsonl")}},
        mix={"a": 1, "b": 1, "chat": 2}, eval_fraction=0.4,
    )  # fmt: skip


def test_labels_of_sources_are_counted_together_and_scored_by_each_own_settings(mixed: Data) -> None:
    made = mixed_dataset.prepare(mixed, TOKENIZER)
    of_sources = {name: report.labels for name, report in made.report.sources.items()}
    assert of_sources["chat"] is None and made.answers == ["no", "yes"]
    assert made.report.labels == {word: of_sources["a"][word] + of_sources["b"][word] for word in ("no", "yes")}
    prompts = labelled(list(made.eval_prompts), mixed)
    assert [p.part for p in prompts] == sorted(p.part for p in made.eval_prompts if p.part != "chat")
    whole = label_set(prompts, ["no", "yes"], TOKENIZER, mixed, None, 100)
    alone = [
        label_set(list(prepare(source, TOKENIZER).eval_prompts), ["no", "yes"], TOKENIZER, source, None, 100)
        for name, source in mixing.sources(mixed).items()
        if name != "chat"
    ]
    assert whole.references.tolist() == [number for each in alone for number in each.references]
    theirs = [prompt for each in alone for prompt in each.probabilities.__self__.prompts]
    for prompt, expected in zip(whole.probabilities.__self__.prompts, theirs, strict=True):
        assert prompt.prompt_ids.tolist() == expected.prompt_ids.tolist() and prompt.label_ids == expected.label_ids


def test_sources_with_different_labels_are_refused(mixed: Data) -> None:
    mixed.sources["b"]["labels"] = {0: "no", 1: "maybe"}
    with pytest.raises(DataError, match=r"data.sources.b has the labels no, maybe, and data.sources.a has no, yes: "):
        mixed_dataset.prepare(mixed, TOKENIZER)


def test_the_map_of_a_source_replaces_that_of_all_sources() -> None:
    both = Data(labels={0: "no", 1: "yes"}, sources={"a": {"path": "f", "labels": {"n": "no", "y": "yes"}}})
    assert mixing.sources(both)["a"].labels == {"n": "no", "y": "yes"}


def test_a_run_on_several_sources_reports_the_rows_with_labels(mixed: Data, tmp_path: Path) -> None:
    tiny_folder(tmp_path, "llama")
    sources = [f"data.sources.{name}.{key}={value if isinstance(value, str) else json.dumps(value)}".replace('"', "")
               for name, source in mixed.sources.items() for key, value in source.items()]  # fmt: skip
    run = tmp_path / "run"
    assert call("train", "model=local", f"model.path={tmp_path / 'llama'}", *sources, "data.mix={a: 1, b: 1, chat: 2}",
                "data.eval_fraction=0.4", "train.max_steps=2", "train.tokens_per_step=120", "train.samples=0",
                "train.best_metric=macro_f1", "adapter.r=2", f"hydra.run.dir={run}") == 0  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    made = mixed_dataset.prepare(mixed, TOKENIZER)
    num_labelled = len(labelled(list(made.eval_prompts), mixed))
    assert int(np.sum(result["classification"]["confusion"])) == num_labelled < len(made.eval_prompts)
    assert json.loads((run / "adapter" / "lora_ft.json").read_text())["labels"] == ["no", "yes"]
    assert call("eval", f"run={run}", "eval.samples=0", "eval.metrics=[macro_f1]") == 0
    evaluated = json.loads((run / "eval.json").read_text())["adapter"]
    assert evaluated["macro_f1"] == pytest.approx(result["metrics"]["macro_f1"])
