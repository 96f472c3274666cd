"""Thoughts of answers: read in every form, written where the template has a place, learned as the settings say."""

import json
from typing import Any

import pytest
from real_templates import real_tokenizer
from tiny import CHATML, tiny_tokenizer

from lora_ft.config import Data, TrainOn
from lora_ft.data import thoughts
from lora_ft.data.dataset import prepare, prepare_rows
from lora_ft.data.read import read
from lora_ft.data.statistics import measure, warnings
from lora_ft.errors import ConfigError, DataError

QUESTION = {"role": "user", "content": "Which number is Lima?"}
PARTS = [{"type": "thinking", "thinking": "I count to 1."}, {"type": "text", "text": "Number 1."}]
FORMS = {
    "part": {"content": PARTS},
    "two parts": {"content": [{"type": "thinking", "thinking": "I count "}, {"type": "thinking", "thinking": "to 1."},
                              PARTS[1]]},
    "reasoning_content": {"content": "Number 1.", "reasoning_content": "I count to 1."},
    "reasoning": {"content": "Number 1.", "reasoning": "\nI count to 1.\n"},
    "thinking": {"content": "Number 1.", "thinking": "I count to 1."},
    "two fields": {"content": "Number 1.", "thinking": "I count to 1.", "reasoning_content": "I count to 1. "},
    "text": {"content": "<think>\nI count to 1.\n</think>\n\nNumber 1."},
    "text without the opening tag": {"content": "I count to 1.\n</think>\n\nNumber 1."},
    "text and field": {"content": "<think>I count to 1.</think>Number 1.", "reasoning_content": "I count to 1."},
}  # fmt: skip


def write(folder: Any, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(**answer: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", **answer}]}


def learned(folder: Any, tokenizer: Any, *rows: Any, **settings: Any) -> list[str]:
    made = prepare(Data(path=write(folder, *rows), eval_fraction=0, max_length=8192, **settings), tokenizer)
    return [tokenizer.decode(document.ids[document.supervised]) for document in made.train]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "gpt_oss", "ministral3_reasoning", "deepseek_r1_distill"])
def test_every_form_of_a_thought_is_learned_as_the_template_writes_it(name, form, tmp_path):
    expected = {
        "qwen3": "<think>\nI count to 1.\n</think>\n\nNumber 1.<|im_end|>",
        "qwen2_5": "<think>\nI count to 1.\n</think>\n\nNumber 1.<|im_end|>",
        "gpt_oss": "<|channel|>analysis<|message|>I count to 1.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Number 1.<|return|>",
        "ministral3_reasoning": "[THINK]I count to 1.[/THINK]Number 1.</s>",
        "deepseek_r1_distill": "I count to 1.\n</think>\n\nNumber 1.<｜end▁of▁sentence｜>",
    }[name]
    assert learned(tmp_path, real_tokenizer(name), chat(**FORMS[form])) == [expected]


def test_only_what_changes_the_text_of_a_row_is_counted(tmp_path):
    counted = {}
    for name in ("qwen3", "qwen2_5", "gpt_oss"):
        for form in ("thinking", "text"):
            data = Data(path=write(tmp_path, chat(**FORMS[form])), eval_fraction=0)
            counted[name, form] = dict(prepare(data, real_tokenizer(name)).report.converted)
    written = {"chats whose thoughts are written into the text of answers, since the template has no other place": 1}
    taken = {"chats whose thoughts are taken from the text of answers": 1}
    assert counted == {
        ("qwen3", "thinking"): {}, ("qwen3", "text"): {}, ("qwen2_5", "thinking"): written, ("qwen2_5", "text"): {},
        ("gpt_oss", "thinking"): {}, ("gpt_oss", "text"): taken,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"needs a conversion .*, which data\.strict=true refuses"):
        learned(tmp_path, real_tokenizer("qwen2_5"), chat(**FORMS["thinking"]), strict=True)


def test_a_tag_inside_an_answer_is_text(tmp_path):
    answer = "The tag <think> opens a thought and </think> ends it."
    assert learned(tmp_path, real_tokenizer("qwen2_5"), chat(content=answer), train_on_thoughts="false") == [
        f"{answer}<|im_end|>"
    ]


# A tokenizer whose tokens span line breaks, letters and the end of a thought.
SPANNING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("answer", ["ab", "a", "\u00e9"])
def test_a_mask_ends_with_the_thought_also_where_a_token_would_span_it(answer, tmp_path):
    from test_data_templates import merging_tokenizer

    tokenizer = merging_tokenizer()
    thought = "<think>\nb\n</think>\n\n"
    context = f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{thought}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought + answer}]}
    data = Data(path=write(tmp_path, row), eval_fraction=0, train_on_thoughts="false")
    (document,) = prepare(data, tokenizer).train
    start = int(document.supervised.argmax())
    assert document.ids[:start].tolist() == tokenizer(context, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(document.ids[start:]) == f"{answer}<|im_end|>"
    assert (
        document.supervised[start:].all()
        and tokenizer.decode(document.ids[: document.answer_start]) + thought == context
    )
    whole = tokenizer(context + answer, add_special_tokens=False)["input_ids"]
    if answer == "ab":
        assert whole[:start] != document.ids[:start].tolist(), "a token must span the end, or the test proves nothing"


OPENING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")


def opening_tokenizer() -> Any:
    """Return a tokenizer whose generation prompt ends inside a thought, of which its chats show nothing."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OPENING.replace(
        "message['content']",
        "(message['content'].split('</think>')[-1] if message.role == 'assistant' else message.content)",
    )
    return tokenizer


@pytest.mark.parametrize("train_on_thoughts", ["true", "false", "nonempty"])
def test_an_answer_continues_a_prompt_that_opens_a_thought(train_on_thoughts, tmp_path):
    tokenizer = opening_tokenizer()
    rows = [chat(content="Number 1.", thinking="I count."), chat(content="Number 1.")]
    data = Data(path=write(tmp_path, *rows), eval_fraction=0, train_on_thoughts=train_on_thoughts)
    made = prepare(data, tokenizer)
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert [tokenizer.decode(d.ids) for d in made.train] == [
        f"{prompt}I count.\n</think>\n\nNumber 1.<|im_end|>", f"{prompt}\n</think>\n\nNumber 1.<|im_end|>",
    ]  # fmt: skip
    for document in made.train:
        assert document.ids[: document.answer_start].tolist() == tokenizer(prompt)["input_ids"]
    with_thought, without = (tokenizer.decode(d.ids[d.supervised]) for d in made.train)
    answer = "Number 1.<|im_end|>"
    assert with_thought == (answer if train_on_thoughts == "false" else f"I count.\n</think>\n\n{answer}")
    assert without == (f"\n</think>\n\n{answer}" if train_on_thoughts == "true" else answer)
    assert made.report.converted == {
        "answers without a thought after a prompt that opens one: an empty thought comes before them": 1
    }
    with pytest.raises(DataError, match=r"rows\.jsonl:2: thought: needs a conversion"):
        prepare(Data(path=data.path, eval_fraction=0, strict=True), tokenizer)


def test_learning_every_token_leaves_out_no_thought(tmp_path):
    tokenizer = real_tokenizer("qwen3")
    with pytest.raises(ConfigError, match=r"data\.train_on=all learns every token, but data\.train_on_thoughts=false"):
        learned(tmp_path, tokenizer, chat(content="a"), train_on=TrainOn.all, train_on_thoughts="false")
    (text,) = learned(tmp_path, tokenizer, chat(content="a"), train_on=TrainOn.all)
    assert text.endswith("assistant\n<think>\n\n</think>\n\na<|im_end|>")


def warned(folder: Any, tokenizer: Any, *rows: Any, **settings: Any) -> list[str]:
    data = Data(path=write(folder, *rows), eval_fraction=0, max_length=8192, **settings)
    found = read(data)
    dataset = prepare_rows(found, data, tokenizer)
    return [w for w in warnings(measure(found, dataset, data, tokenizer), dataset.report, data) if "thought" in w]


def test_rows_without_thoughts_for_a_template_that_asks_for_them_are_a_warning(tmp_path):
    bare, full = [chat(content=f"Number {i}.") for i in range(3)], [chat(**FORMS["thinking"])]
    qwen, off = real_tokenizer("qwen3"), {"enable_thinking": False}
    (warning,) = warned(tmp_path, qwen, *bare)
    assert warning == (
        "3 of 3 chats have no thought, and the chat template asks for one: their answers are learned after an empty "
        "thought, which data.train_on_thoughts=nonempty does not learn; data.template.enable_thinking=false trains and "
        "asks without thoughts"
    )
    (warning,) = warned(tmp_path, qwen, *bare, train_on_thoughts="true")
    assert "the model would learn to stop thinking (data.train_on_thoughts=nonempty learns no empty thought)" in warning
    assert warned(tmp_path, qwen, *bare, template=off) == warned(tmp_path, qwen, *bare, *full) == []
    (warning,) = warned(tmp_path, real_tokenizer("gpt_oss"), *bare)  # it writes no empty thought
    assert "would learn to stop thinking" in warning and "data.template" not in warning
    (warning,) = warned(tmp_path, real_tokenizer("deepseek_r1_distill"), *bare)
    assert "which data.train_on_thoughts=nonempty does not learn; train on rows with thoughts" in warning
    for name in ("qwen2_5", "granite3_3", "deepseek_v3_1", "gemma3"):
        assert warned(tmp_path, real_tokenizer(name), *bare) == []
    assert len(warned(tmp_path, real_tokenizer("granite3_3"), *bare, template={"thinking": True})) == 1


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_variables_reach_training_and_evaluation_prompts(variables, tmp_path):
    tokenizer = real_tokenizer("qwen3")
    data = Data(path=write(tmp_path, *(chat(content=f"Number {i}.") for i in range(4))), eval_fraction=0.5,
                template=variables)  # fmt: skip
    found = read(data)
    made = prepare_rows(found, data, tokenizer)
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False, **variables)
    assert {tokenizer.decode(d.ids[: d.answer_start]) for d in [*made.train, *made.eval]} == {prompt}
    assert {tokenizer.decode(p.prompt_ids) for p in made.eval_prompts} == {prompt}
    seen = measure(found, made, data, tokenizer)
    assert seen.prompts == len(made.train) and seen.other_prompts == []


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("<think>\nhm\n</think>\n\nFour.", "", "Four."),
        ("hm\n</think>\n\nFour.", "<|im_start|>assistant\n<think>\n", "Four."),
        ("<think>\nhm and no end", "", ""),
        ("hm and no end", "<|im_start|>assistant\n<think>\n", ""),
        ("Four.", "<|im_start|>assistant\n", "Four."),
        ("[THINK]hm[/THINK]Four.", "", "Four."),
    ],
)
def test_metrics_compare_answers_without_thoughts(text, prompt, answer):
    assert thoughts.after(text, prompt) == answer
