"""Broken chat templates: each is found before anything is trained."""

import json
from itertools import cycle

import pytest
from test_data_templates import tokenizer_of
from tiny import CHATML

from lora_ft.config import Data, TrainOn, Turns
from lora_ft.data.dataset import prepare
from lora_ft.errors import DataError

ROWS = [
    {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital\nof France?"},
        {"role": "assistant", "content": "Paris.\n\n    if x < 1:\n        ask('why?')"},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "<think>\nI am.\n</think>\n\nYes, \"sure\" & certain!"},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "<think>\nItaly.\n</think>\n\nRome?"},
    ]},
]  # fmt: skip

CONTENT, END, NEXT = "message['content']", "'<|im_end|>'", "{{ '<|im_start|>assistant\n' }}"
ANSWER = "message['role'] == 'assistant'"
LOOP = "{% for message in messages %}"


def content(expression: str) -> str:
    return CHATML.replace(CONTENT, f"({expression})")


def answers(expression: str) -> str:
    return content(f"{expression} if {ANSWER} else {CONTENT}")


def questions(expression: str) -> str:
    return content(f"{CONTENT} if {ANSWER} else {expression}")


def ends(expression: str) -> str:
    return CHATML.replace(END, f"({expression})")


def over(messages: str) -> str:
    return CHATML.replace("in messages", f"in {messages}")


NO_END = r"puts no end token after the answer"
NO_PROMPT = "does not begin an answer with its own generation prompt"
NO_ANSWER = "changes or drops the answer"
NO_MESSAGE = "changes, moves or drops a message before the answer"
LOST = f"{NO_ANSWER}|{NO_MESSAGE}"  # answers are also part of the history of the last one
NO_SYSTEM = "changes or drops the system message"
TWO_BOS = r"writes \d beginning-of-text tokens, more than it needs"
BROKEN = {
    # The end of an answer.
    "no end token": (ends("''"), NO_END),
    "no end token after answers": (ends(f"'' if {ANSWER} else {END}"), NO_END),
    "no end token after the last message": (ends(f"'' if loop.last else {END}"), f"{NO_END}|{NO_PROMPT}"),
    "an end token misspelt": (ends("'<|im_endd|>'"), r"adds '<\|im_endd\|>' to the answer"),
    "an end token of another model": (ends("'</s>'"), r"adds '</s>' to the answer"),
    "an undefined end token": (CHATML.replace(END, "end_token"), "refuses the row: 'end_token' is undefined"),
    "an end token that begins turns": (
        ends("'<|im_start|>'"), r"ends the answer with <\|im_start\|>, which is not an end-of-turn token"),
    "an end token that begins texts": (
        ends(f"bos_token if {ANSWER} else {END}"), r"ends the answer with <\|endoftext\|>, which is not an end"),
    "two end tokens": (ends("'<|im_end|><|im_end|>'"), r"ends the answer with <\|im_end\|> twice"),
    "words after the end": (ends("'<|im_end|> (end)'"), r"adds '\(end\)' to the answer"),
    "words between the end and another": (ends("'<|im_end|> (end)<|pad|>'"), r"adds '\(end\)' to the answer"),
    "words instead of the end": (ends(f"'</assistant>' if {ANSWER} else {END}"), "adds '</assistant>' to the answer"),
    # The BOS token.
    "two BOS": ("{{ bos_token + bos_token }}" + CHATML, TWO_BOS),
    "two BOS on two lines": ("{{ bos_token }}\n{{ bos_token }}" + CHATML, TWO_BOS),
    "a BOS in each message": (CHATML.replace(LOOP, LOOP + "{{ bos_token }}"), NO_PROMPT),
    "a BOS in each turn": (
        CHATML.replace(LOOP, LOOP + "{{ bos_token }}").replace(NEXT, "{{ bos_token }}" + NEXT), TWO_BOS),
    # The prompt.
    "another role in the prompt": (CHATML.replace("start|>assistant", "start|>bot"), NO_PROMPT),
    "an extra space in the prompt": (CHATML.replace("assistant\n", "assistant\n "), NO_PROMPT),
    "a thought opened in the prompt": (CHATML.replace("assistant\n", "assistant\n<thinking>\n"), NO_PROMPT),
    "roles swapped": (
        CHATML.replace("message['role']", "{'user': 'assistant', 'assistant': 'user'}.get(message['role'], 'system')"),
        NO_PROMPT),
    "an inverted generation prompt": (CHATML.replace("if add_gen", "if not add_gen"), "adds 'assistant' to"),
    "a constant prompt": (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), "adds 'assistant' to"),
    "another system message in the prompt": (
        "{% if add_generation_prompt %}Answer.{% else %}Learn.{% endif %}" + CHATML, NO_PROMPT),
    # The answer.
    "answers dropped": (answers("''"), LOST),
    "answers in capitals": (answers(f"{CONTENT} | upper"), LOST),
    "answers cut": (answers(f"{CONTENT}[:12]"), LOST),
    "answers without punctuation": (answers(f"{CONTENT}.strip('?!.')"), LOST),
    "answers on one line": (answers(f"{CONTENT}.split() | join(' ')"), LOST),
    "answers escaped": (answers(f"{CONTENT} | e"), LOST),
    "answers in JSON": (answers(f"{CONTENT} | tojson"), LOST),
    "answers with words replaced": (answers(f"{CONTENT} | replace('Rome', 'Milan')"), LOST),
    "answers without thoughts": (answers(f"{CONTENT}.split('</think>')[-1]"), LOST),
    "answers twice": (answers(f"{CONTENT} + {CONTENT}"), "writes the answer twice"),
    "the question in the answer": (
        answers(f"(messages[loop.index0 - 1].content + ' ' if loop.index0 else '') + {CONTENT}"),
        r"writes message \d after the prompt, where it would be learned"),
    "the same answer for all rows": (answers("'As an AI, I do not know.'"), LOST),
    "a misspelt key": (content("message['contents']"), f"{LOST}|refuses the row"),
    # Messages before the answer.
    "the system message dropped": (over("messages if message.role != 'system'"), NO_SYSTEM),
    "the system message replaced": (content(f"'Help.' if message.role == 'system' else {CONTENT}"), NO_SYSTEM),
    "questions dropped": (over("messages if message.role != 'user'"), NO_MESSAGE),
    "questions in capitals": (questions(f"{CONTENT} | upper if message.role == 'user' else {CONTENT}"), NO_MESSAGE),
    "questions cut": (questions(f"{CONTENT} | truncate(15)"), NO_MESSAGE),
    "earlier questions dropped": (over("messages[:1] + messages[1:][-2:]"), f"{NO_MESSAGE}|{NO_PROMPT}"),
    "earlier answers dropped": (over(f"messages if loop.last or not ({ANSWER})"), f"{NO_MESSAGE}|refuses"),
    "history reversed": (over("messages[:-1] | reverse | list + messages[-1:]"), f"{NO_MESSAGE}|{NO_PROMPT}"),
    "history sorted": (over("messages | sort(attribute='role', reverse=true)"), f"{NO_MESSAGE}|{NO_PROMPT}"),
    # The template itself.
    "an empty template": ("{# nothing #}", NO_ANSWER),
    "constant text": ("<|im_start|>user\nHi<|im_end|>\n", NO_ANSWER),
    "a refusal": ("{{ raise_exception('no system role') }}", "refuses the row: no system role"),
    "no end of a loop": (LOOP, "refuses the row: Unexpected end of template"),
    "an unknown filter": (answers(f"{CONTENT} | shout"), "refuses the row: No filter named 'shout'"),
    "an unknown function": (answers("shout()"), "refuses the row: 'shout' is undefined"),
    "an attribute of nothing": ("{{ settings.system.text }}" + CHATML, "refuses the row: 'settings' is undefined"),
    "text and a number": (content(f"{CONTENT} + 1"), "refuses the row: can only concatenate str"),
    "a division by zero": ("{{ 1 / 0 }}" + CHATML, "refuses the row: division by zero"),
}  # fmt: skip


def prepared(folder, template, train_on=TrainOn.answers):
    """Prepare the rows with data.turns=strict: by default a system message that is dropped is part of a question."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = Data(path=str(path), eval_fraction=0, train_on=train_on, turns=Turns.strict)
    return prepare(data, tokenizer_of(template))


@pytest.mark.closes("A04", "A05", "A06", "A07", "A08", "A09")
@pytest.mark.parametrize(("name", "train_on"), [*zip(BROKEN, cycle(TrainOn))])
def test_a_broken_template_is_reported(name, train_on, tmp_path):
    template, message = BROKEN[name]
    with pytest.raises(DataError, match=rf"1 bad row:\n  .*rows\.jsonl:1: chat template: ({message})"):
        prepared(tmp_path, template, train_on)


# Similar changes that break nothing.
CORRECT = {
    "ChatML": CHATML,
    "contents stripped": content(f"{CONTENT} | trim"),
    "answers stripped of line ends": answers(f"{CONTENT}.strip('\n')"),
    "history marked": content(f"{CONTENT} + (' (earlier)' if {ANSWER} and not loop.last else '')"),
    "earlier thoughts dropped": content(f"{CONTENT} if loop.last else {CONTENT}.split('</think>')[-1]"),
    "thoughts on one line": answers(CONTENT + ".replace('<think>\n', '<think>').replace('\n</think>', '</think>')"),
    "one BOS": "{{ bos_token }}" + CHATML,
    "whitespace after the end": ends(END + " + '  \n'"),
    "closing words before the end": answers(f"{CONTENT} + '</assistant>'"),
    "closing words on separate lines": answers(f"{CONTENT} + '\n\n### End\n'"),
    "two ends, each its own": ends(f"'<|pad|><|im_end|>' if {ANSWER} else {END}"),
    "no generation prompt": CHATML.replace(NEXT, ""),
    "undefined variables tested": "{% if settings is defined and settings.x %}x{% endif %}" + CHATML,
}  # fmt: skip


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_template_is_accepted(name, tmp_path):
    rows = prepared(tmp_path, CORRECT[name]).train
    assert sum(int((row.ids[row.supervised] == 2).sum()) for row in rows) == 3


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_may_begin_with_bos_and_an_empty_thought(special, tmp_path):
    """SmolLM2's BOS begins each turn; <think> may be a special token."""
    thinking = "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    turn = "'<|im_start|>' + message['role'] + '\n'"
    template = CHATML.replace(NEXT, thinking).replace(turn, f"{turn} + ('<think>\n\n</think>\n\n' if {ANSWER} else '')")
    tokenizer = tokenizer_of(template)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    path = tmp_path / "rows.jsonl"
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    rows = prepare(Data(path=str(path), eval_fraction=0), tokenizer).train
    learned = [tokenizer.decode(row.ids[row.supervised]) for row in rows]
    assert "".join(learned) == "b<|im_end|>d<|im_end|>"
