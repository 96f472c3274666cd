"""Masks on the chat templates of thirteen real models: the supervised text is exactly the answers, after the prompts.

The expected texts are written down here; the prompts come from transformers, which renders each conversation again.
"""

import json
from typing import Any

import pytest
from real_templates import FOLDER, TOKENS, real_tokenizer

from lora_ft.config import Data
from lora_ft.data.dataset import Dataset, prepare
from lora_ft.data.rendering import DATE
from lora_ft.errors import DataError

TOOLS = [{
    "type": "function",
    "function": {
        "name": "add_up",
        "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "Numbers."}},
                       "required": ["of"]},
    },
}]  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(of: str, number: int) -> dict[str, Any]:
    function = {"name": "add_up", "arguments": {"of": of}}
    return {"tool_calls": [{"type": "function", "id": f"call0000{number}", "function": function}]}


def result(text: str, number: int) -> dict[str, Any]:
    return {"role": "tool", "name": "add_up", "tool_call_id": f"call0000{number}", "content": text}


FIRST, SECOND = user("First question?"), user("Second question?")
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [FIRST, says("First answer."), SECOND, says("Second answer.")],
    "system": [{"role": "system", "content": "Answer briefly."}, FIRST, says("First answer."), SECOND,
               says("Second answer.")],
    "thoughts": [FIRST, says("First answer.", reasoning_content="First thought."), SECOND,
                 says("Second answer.", reasoning_content="Second thought.")],
    "one thought": [FIRST, says("First answer."), SECOND, says("Second answer.", reasoning_content="A thought.")],
    "calls": [FIRST, says("", **calls("1 2", 1)), result("3", 1), says("", **calls("3 4", 2)), result("7", 2),
              says("It is 7.")],
    "call with content": [FIRST, says("I add them.", **calls("1 2", 1)), result("3", 1), says("It is 3.")],
    "call with thought": [FIRST, says("", reasoning_content="I need a sum.", **calls("1 2", 1)), result("3", 1),
                          says("It is 3.", reasoning_content="Done.")],
}  # fmt: skip
PLAIN = ["First answer.", "Second answer."]


def ended(end: str, texts: list[str]) -> list[str]:
    return [text + end for text in texts]


def tagged(before: str, after: str, end: str) -> dict[str, list[str]]:
    """Return the expected texts of chats with thoughts between these tags; a prompt may have the first."""
    return {
        "thoughts": [f"{before}First thought.{after}First answer.{end}",
                     f"{before}Second thought.{after}Second answer.{end}"],
        "one thought": [f"First answer.{end}", f"{before}A thought.{after}Second answer.{end}"],
    }  # fmt: skip


def called(call: Any, end: str, thought: tuple[str, str] | None = None, content: str | None = None) -> Any:
    """Return the expected texts of chats with tool calls; `call` writes one with its end."""
    expected = {"calls": [call("1 2"), call("3 4"), f"It is 7.{end}"]}
    if content is not None:
        expected["call with content"] = [content + call("1 2").lstrip("\n"), f"It is 3.{end}"]
    if thought:
        before, after = thought
        expected["call with thought"] = [
            f"{before}I need a sum.{after}{call('1 2')}",
            f"{before}Done.{after}It is 3.{end}",
        ]
    return expected


def hermes(of: str) -> str:
    return f'<tool_call>\n{{"name": "add_up", "arguments": {{"of": "{of}"}}}}\n</tool_call><|im_end|>'


def function_tags(prefix: str, newline: str, end: str) -> Any:
    def call(of: str) -> str:
        value = f"{newline}{of}{newline}"
        return (f"<{prefix}tool_call>\n<function=add_up>\n<parameter=of>{value}</parameter>\n</function>\n"
                f"</{prefix}tool_call>{end}")  # fmt: skip

    return call


def harmony_call(of: str) -> str:
    return f' to=functions.add_up<|channel|>commentary json<|message|>{{"of": "{of}"}}<|call|>'


THINK = ("<think>\n", "\n</think>\n\n")
EOS = "<｜end▁of▁sentence｜>"
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
ALWAYS = {"plain": PLAIN, "system": PLAIN}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "deepseek_r1_distill": {
        **{name: ended(EOS, texts) for name, texts in ALWAYS.items()}, **tagged("", "\n</think>\n\n", EOS)},
    "deepseek_v3_1": {name: ended(EOS, texts) for name, texts in ALWAYS.items()},
    "gemma3": {
        **{name: ended("<end_of_turn>", texts) for name, texts in ALWAYS.items()}, **tagged(*THINK, "<end_of_turn>")},
    "gpt_oss": {
        **{name: [f"{FINAL}{text}<|return|>" for text in texts] for name, texts in ALWAYS.items()},
        "thoughts": [f"{ANALYSIS}First thought.<|end|><|start|>assistant{FINAL}First answer.<|return|>",
                     f"{ANALYSIS}Second thought.<|end|><|start|>assistant{FINAL}Second answer.<|return|>"],
        "one thought": [f"{FINAL}First answer.<|return|>",
                        f"{ANALYSIS}A thought.<|end|><|start|>assistant{FINAL}Second answer.<|return|>"],
        "calls": [harmony_call("1 2"), harmony_call("3 4"), f"{FINAL}It is 7.<|return|>"],
        # The template writes the text before a call as a thought.
        "call with content": [f"{ANALYSIS}I add them.<|end|><|start|>assistant{harmony_call('1 2')}",
                              f"{FINAL}It is 3.<|return|>"],
        "call with thought": [f"{ANALYSIS}I need a sum.<|end|><|start|>assistant{harmony_call('1 2')}",
                              f"{ANALYSIS}Done.<|end|><|start|>assistant{FINAL}It is 3.<|return|>"],
    },
    "granite3_3": {
        **{name: ended("<|end_of_text|>", texts) for name, texts in ALWAYS.items()},
        **tagged(*THINK, "<|end_of_text|>")},
    "llama3_2": {
        **{name: ended("<|eot_id|>", texts) for name, texts in ALWAYS.items()}, **tagged(*THINK, "<|eot_id|>"),
        **called(lambda of: f'{{"name": "add_up", "parameters": {{"of": "{of}"}}}}<|eot_id|>', "<|eot_id|>")},
    "ministral3_reasoning": {
        **{name: ended("</s>", texts) for name, texts in ALWAYS.items()}, **tagged("[THINK]", "[/THINK]", "</s>"),
        **called(lambda of: f'[TOOL_CALLS]add_up[ARGS]{{"of": "{of}"}}</s>', "</s>", ("[THINK]", "[/THINK]"),
                 "I add them.")},
    "mistral_nemo": {
        "plain": ended("</s>", PLAIN),
        "system": ended("</s>", PLAIN),  # put into the first question, since the template moves it to the last one
        **tagged(*THINK, "</s>"),
        "calls": [
            '[TOOL_CALLS][{"name": "add_up", "arguments": {"of": "1 2"}, "id": "call00001"}]</s>',
            '[TOOL_CALLS][{"name": "add_up", "arguments": {"of": "3 4"}, "id": "call00002"}]</s>', "It is 7.</s>"]},
    "phi3_5": {  # the end-of-text token after the last answer follows a line break
        **{name: ended("<|end|>\n<|endoftext|>", texts) for name, texts in ALWAYS.items()},
        **tagged(*THINK, "<|end|>\n<|endoftext|>")},
    "qwen2_5": {
        **{name: ended("<|im_end|>", texts) for name, texts in ALWAYS.items()}, **tagged(*THINK, "<|im_end|>"),
        **called(hermes, "<|im_end|>", content="I add them.\n"),
        "call with thought": [f"<think>\nI need a sum.\n</think>\n\n\n{hermes('1 2')}",
                              "<think>\nDone.\n</think>\n\nIt is 3.<|im_end|>"]},
    "qwen3": {
        **{name: ended("<|im_end|>", texts) for name, texts in ALWAYS.items()}, **tagged(*THINK, "<|im_end|>"),
        **called(hermes, "<|im_end|>", THINK, "I add them.\n")},
    "qwen3_5_think": {
        **{name: ended("<|im_end|>", texts) for name, texts in ALWAYS.items()},
        **tagged("", "\n</think>\n\n", "<|im_end|>"),
        **called(function_tags("", "\n", "<|im_end|>"), "<|im_end|>", ("", "\n</think>\n\n"), "I add them.\n\n")},
    "seed_oss": {
        **{name: ended("<seed:eos>", texts) for name, texts in ALWAYS.items()},
        **tagged("<seed:think>", "</seed:think>\n", "<seed:eos>"),
        **called(function_tags("seed:", "", "<seed:eos>"), "<seed:eos>", ("<seed:think>", "</seed:think>\n"),
                 "I add them.\n\n")},
}  # fmt: skip
# What these templates cannot write, and the error.
REFUSED = {
    ("deepseek_r1_distill", "calls"): "drops the answer's call of add_up",
    ("deepseek_v3_1", "thoughts"): (
        "asks for an answer without a thought, and the row has one: change data.template.enable_thinking or "
        "data.template.thinking"),
    ("deepseek_v3_1", "calls"): "drops the tool add_up",
    ("gemma3", "calls"): "drops the answer's call of add_up",
    ("granite3_3", "calls"): "drops the answer's call of add_up",
    ("llama3_2", "call with content"): "changes or drops the answer",
    ("llama3_2", "call with thought"): "changes or drops the answer|drops the thought",
    ("mistral_nemo", "call with content"): "changes or drops the answer",
    ("phi3_5", "calls"): "drops the answer's call of add_up",
}  # fmt: skip


def prepared(folder: Any, name: str, chat: list[dict[str, Any]], **settings: Any) -> tuple[Any, Dataset]:
    tokenizer = real_tokenizer(name)
    row = {"messages": chat} | ({"tools": TOOLS} if any("tool_calls" in m for m in chat) else {})
    (folder / "row.jsonl").write_text(json.dumps(row))
    data = Data(path=str(folder / "row.jsonl"), eval_fraction=0, max_length=8192, **settings)
    return tokenizer, prepare(data, tokenizer)


def learned(tokenizer: Any, dataset: Dataset) -> list[tuple[str, str]]:
    """Return the decoded text before each run of supervised tokens, and the run."""
    found = []
    for document in dataset.train:
        mask = [False, *document.supervised.tolist(), False]
        starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
        for start in starts:
            end = mask.index(False, start + 1) - 1
            ids = document.ids.tolist()
            found.append((ids[:start], tokenizer.decode(ids[start:end])))
    return found


def prompts(name: str, tokenizer: Any, chat: list[dict[str, Any]]) -> list[str]:
    """Return the prompt before each answer, rendered by transformers alone."""
    tools = TOOLS if any("tool_calls" in m for m in chat) else None
    with_thoughts = [
        m | {key: m["reasoning_content"] for key in ("thinking",) if "reasoning_content" in m} for m in chat
    ]
    return [
        tokenizer.apply_chat_template(
            with_thoughts[:i], tools=tools, add_generation_prompt=True, tokenize=False, date_string=DATE
        )
        for i, message in enumerate(chat) if message["role"] == "assistant"
    ]  # fmt: skip


def test_each_file_is_listed_with_its_source():
    page = (FOLDER / "README.md").read_text("utf-8")
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(TOKENS) == set(EXPECTED)
    assert all(f"| `{name}.jinja` |" in page for name in TOKENS)


CASES = [(name, chat) for name, chats in EXPECTED.items() for chat in chats]


@pytest.mark.closes("A06", "A08")
@pytest.mark.parametrize(("name", "chat"), CASES)
def test_exactly_the_answers_are_supervised(name, chat, tmp_path):
    tokenizer, dataset = prepared(tmp_path, name, CHATS[chat])
    assert [text for _, text in learned(tokenizer, dataset)] == EXPECTED[name][chat]


# In which history shows no thoughts, so that prompts need no form of them.
COMPARED = [
    case for case in CASES if case[1] in ("plain", "system", "calls", "call with content")
    and case != ("mistral_nemo", "system")
]  # fmt: skip


@pytest.mark.parametrize(("name", "chat"), [*COMPARED, ("qwen3", "thoughts"), ("gpt_oss", "call with thought")])
def test_the_ids_before_an_answer_are_the_prompt_at_inference(name, chat, tmp_path):
    tokenizer, dataset = prepared(tmp_path, name, CHATS[chat], train_on_thoughts="true")
    expected = prompts(name, tokenizer, CHATS[chat])
    assert [before for before, _ in learned(tokenizer, dataset)] == [
        tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in expected
    ]


@pytest.mark.parametrize(("name", "chat"), REFUSED)
def test_what_a_template_cannot_write_is_refused(name, chat, tmp_path):
    with pytest.raises(DataError, match=REFUSED[name, chat]):
        prepared(tmp_path, name, CHATS[chat])


THINKERS = {
    "deepseek_r1_distill": ("\n</think>\n\n", "First thought.\n</think>\n\n"),
    "gpt_oss": ("", f"{ANALYSIS}First thought.<|end|>"),
    "ministral3_reasoning": ("", "[THINK]First thought.[/THINK]"),
    "qwen3": ("<think>\n\n</think>\n\n", "<think>\nFirst thought.\n</think>\n\n"),
    "qwen3_5_think": ("\n</think>\n\n", "First thought.\n</think>\n\n"),
    "seed_oss": ("", "<seed:think>First thought.</seed:think>\n"),
}


@pytest.mark.parametrize("name", THINKERS)
def test_thoughts_are_supervised_as_the_setting_says(name, tmp_path):
    empty, thought = THINKERS[name]
    for chat, written in (("plain", empty), ("thoughts", thought)):
        by_setting = {}
        for setting in ("true", "false", "nonempty"):
            tokenizer, dataset = prepared(tmp_path, name, CHATS[chat][:2], train_on_thoughts=setting)
            (document,) = dataset.train
            ids, mask = document.ids.tolist(), document.supervised.tolist()
            start = document.answer_start
            context = [token for token, is_learned in zip(ids[start:], mask[start:], strict=True) if not is_learned]
            by_setting[setting] = (ids, tokenizer.decode(context))
        assert by_setting["true"][1] == ""
        assert by_setting["false"][1] == written
        assert by_setting["nonempty"][1] == ("" if chat == "thoughts" else written)
        texts = {tokenizer.decode(ids) for ids, _ in by_setting.values()}
        assert len(texts) == 1, "the setting changes the mask only"
