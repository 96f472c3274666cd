"""Labels of rows: read from settings or found in the rows, checked in every row, tokenized after each prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from lora_ft.config import Data, Format
from lora_ft.data import label_prompts
from lora_ft.data.dataset import prepare
from lora_ft.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
TEMPLATES = {"prompt": "{text}", "answer": "{label}"}


def write(folder: Path, labels: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"text": f"{name} {i}", "label": label}) + "\n" for i, label in enumerate(labels))
    )
    return str(path)


def data(folder: Path, rows: list[Any], **options: Any) -> Data:
    return Data(path=write(folder, rows), **{"eval_fraction": 0.0} | TEMPLATES | options)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("auto", {"bad": 1, "good": 2}),
        (["good", "bad"], {"good": 2, "bad": 1}),
        (["good", "bad", "so so"], {"good": 2, "bad": 1, "so so": 0}),
        ({"good": "positive", "bad": "negative"}, {"positive": 2, "negative": 1}),
        ({"good": "1", "bad": 0}, {"1": 2, "0": 1}),
    ],
)
def test_labels_are_counted_in_order(tmp_path: Path, given: Any, found: dict[str, int]) -> None:
    prepared = prepare(data(tmp_path, ["good", "bad", "good"], labels=given), TOKENIZER)
    assert prepared.report.labels == found and prepared.answers == list(found)


def test_a_map_replaces_the_values_of_rows_by_labels(tmp_path: Path) -> None:
    mapped = prepare(data(tmp_path, [0, 1, 1], labels={0: "no", 1: "yes"}), TOKENIZER)
    named = prepare(data(tmp_path, ["no", "yes", "yes"], labels=["no", "yes"]), TOKENIZER)
    assert [e.ids.tolist() for e in mapped.train] == [e.ids.tolist() for e in named.train]
    assert mapped.report.labels == {"no": 1, "yes": 2}


def test_labels_found_in_numbers_are_in_their_order(tmp_path: Path) -> None:
    assert prepare(data(tmp_path, [10, 9, 2, "none"], labels="auto"), TOKENIZER).answers == ["2", "9", "10", "none"]


def test_blanks_and_whole_floats_are_read_and_counted(tmp_path: Path) -> None:
    rows = data(tmp_path, [0.0, " 1 ", 1], labels={0: "no", 1: "yes"})
    report = prepare(rows, TOKENIZER).report
    assert report.labels == {"no": 1, "yes": 2}
    assert report.converted == {"labels read as whole numbers": 1, "labels with whitespace around them": 1}
    rows.strict = True
    with pytest.raises(DataError, match=r"rows.jsonl:1: label: needs a conversion"):
        prepare(rows, TOKENIZER)


@pytest.mark.parametrize("labels", [["no", "yes"], {"no": "no", "yes": "yes"}])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("maybe", "maybe is not one of data.labels: no, yes"),
        ("No", "No is not one of data.labels: no, yes"),
        (" ", r"is empty \(data.labels=no, yes\)"),
        (None, r"is missing or null \(data.labels=no, yes\)"),
        (1, "1 is not one of data.labels: no, yes"),
        (["no"], r"must be text or a number, got list \(data.labels=no, yes\)"),
        (True, "true is not one of data.labels: no, yes"),
    ],
)
def test_a_wrong_label_is_named_with_its_row_and_setting(tmp_path: Path, labels: Any, wrong: Any, reason: str) -> None:
    training = write(tmp_path, ["no", "yes", "no"])
    evaluated = write(tmp_path, ["no", wrong], "more.jsonl")
    rows = Data(path=training, eval_path=evaluated, labels=labels, **TEMPLATES)
    with pytest.raises(DataError, match=f"1 bad row:\n.*more.jsonl:2: label: {reason}"):
        prepare(rows, TOKENIZER)


def test_an_eval_label_that_no_training_row_has_is_named(tmp_path: Path) -> None:
    evaluated = write(tmp_path, ["yes", "maybe"], "more.jsonl")
    rows = data(tmp_path, ["no", "yes", "no"], labels="auto", eval_path=evaluated)
    with pytest.raises(
        DataError, match=r"more.jsonl:2: label: maybe is not a label of the training rows \(no, yes\); "
    ):
        prepare(rows, TOKENIZER)


@pytest.mark.parametrize("labels", ["auto", ["no", "yes"]])
def test_training_rows_of_one_class_are_refused(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(DataError, match="every training row has the label yes: two are needed"):
        prepare(data(tmp_path, ["yes", "yes"], labels=labels), TOKENIZER)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ("yes", "must be a list like"),
        (["yes"], "must name at least two labels"),
        ([], "must name at least two labels"),
        ({}, "must name at least two labels"),
        ({0: "yes", 1: "yes"}, "must name at least two labels"),
        (["yes", "no", "yes"], "has yes twice"),
        (["yes", None], "must be text or a number, got None"),
        (["yes", " "], "must be text or a number, got ' '"),
        ({0: ["yes"], 1: "no"}, "must be text or a number"),
    ],
)
def test_malformed_labels_are_refused(tmp_path: Path, labels: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"data.labels.*{reason}"):
        prepare(data(tmp_path, ["yes", "no"], labels=labels), TOKENIZER)


def test_too_many_different_answers_are_no_labels(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="the rows have more than 1,000 different answers: answers of their own, not labels"
    ):
        prepare(data(tmp_path, list(range(1001)), labels="auto"), TOKENIZER)


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: data.labels: needs rows with a prompt and an answer"):
        prepare(Data(path=str(path), format=Format.text, labels="auto"), TOKENIZER)


def test_labels_of_chats_are_their_last_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        [("user", "Hi"), ("assistant", "Hello"), ("user", f"Is {i} odd?"), ("assistant", "yes" if i % 2 else "no")]
        for i in range(4)
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    path.write_text("\n".join(lines))
    assert prepare(Data(path=str(path), labels="auto", eval_fraction=0.0), TOKENIZER).answers == ["no", "yes"]


@pytest.mark.parametrize("has_template", [True, False])
def test_label_ids_are_those_of_a_row_with_this_label(tmp_path: Path, has_template: bool) -> None:
    """Labels that begin others, of several tokens, and after a prompt that is truncated."""
    tokenizer = tiny_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    labels = ["good", "good enough", "go", "0", "very quick foxes, and brown"]
    kept = data(tmp_path, labels, labels=labels, eval_path=write(tmp_path, labels[::-1], "more.jsonl"))
    prompts = prepare(kept, tokenizer).eval_prompts
    made = label_prompts.make([p.row for p in prompts], [p.prompt_ids for p in prompts], labels, tokenizer, kept)
    assert len({ids for ids in made[0].label_ids}) == len(labels)
    for number, label in enumerate(labels):
        same_label = write(tmp_path, [label] * len(labels), "more.jsonl")
        expected = prepare(Data(path=kept.path, eval_path=same_label, labels=labels, **TEMPLATES), tokenizer).eval
        for prompt, example in zip(made, expected, strict=True):
            assert [*prompt.prompt_ids, *prompt.label_ids[number]] == example.ids.tolist()
            assert example.supervised[len(prompt.prompt_ids) :].all()
            assert prompt.label_ids[number][-1] == tokenizer.eos_token_id or not has_template
    assert made[0].longest == len(made[0].prompt_ids) + max(map(len, made[0].label_ids))


def test_a_template_that_changes_the_text_after_some_labels_is_rendered_for_each(tmp_path: Path) -> None:
    """The template writes the length of the answer's prompt after it: the text after the prompt differs by row."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' and messages[0]['content'] | length > 14 %}{{ ' !' }}{% endif %}"
        "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    labels = ["no", "yes"]
    path = tmp_path / "rows.jsonl"
    texts = ["short", "a text that is longer", "short again"]
    path.write_text("".join(json.dumps({"text": text, "label": "yes"}) + "\n" for text in texts))
    kept = Data(path=write(tmp_path, labels, "training.jsonl"), eval_path=str(path), labels=labels, **TEMPLATES)
    prompts = prepare(kept, tokenizer).eval_prompts
    made = label_prompts.make([p.row for p in prompts], [p.prompt_ids for p in prompts], labels, tokenizer, kept)
    ends = [[tokenizer.decode(ids).strip() for ids in prompt.label_ids] for prompt in made]
    assert ends == [
        ["no<|im_end|>", "yes<|im_end|>"],
        ["no !<|im_end|>", "yes !<|im_end|>"],
        ["no<|im_end|>", "yes<|im_end|>"],
    ]


def test_no_prompts_give_no_label_prompts() -> None:
    assert label_prompts.make([], [], ["no", "yes"], TOKENIZER, Data()) == []


def test_label_prompts_share_equal_ids(tmp_path: Path) -> None:
    kept = data(tmp_path, ["no", "yes"], labels=["no", "yes"], eval_path=write(tmp_path, ["no"] * 3, "more.jsonl"))
    prompts = prepare(kept, TOKENIZER).eval_prompts
    made = label_prompts.make([p.row for p in prompts], [p.prompt_ids for p in prompts], ["no", "yes"], TOKENIZER, kept)
    assert len({id(ids) for prompt in made for ids in prompt.label_ids}) == 2
    assert all(isinstance(prompt.prompt_ids, np.ndarray) for prompt in made)
