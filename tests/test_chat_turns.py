"""Chats whose turns do not alternate: what is trained on them with several templates, and what the report counts."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_templates import tokenizer_of as tiny_with
from test_template_matrix import FAMILIES, tokenizer_of
from tiny import CHATML, tiny_model

from lora_ft.chat import Session, prompt_ids
from lora_ft.config import Data, Sampling, TrainOn, Turns
from lora_ft.data.chat_template import trials_of
from lora_ft.data.dataset import prepare, prepare_rows
from lora_ft.data.fitting import fit
from lora_ft.data.read import read
from lora_ft.data.statistics import measure
from lora_ft.errors import ConfigError, DataError

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}

# Like the templates of Gemma 2 and Mistral: they refuse all but strict alternation, and a system message.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Drops system messages without an error, wherever they are.
SILENT = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")


@cache
def tokenizer(name):
    templates = {"alternating": ALTERNATING, "silent": SILENT}
    return tiny_with(templates[name]) if name in templates else tokenizer_of(FAMILIES[name], "tiny")


def chat(letters):
    """Return messages by the first letters of their roles; the n-th has the text "<role>n."."""
    return [{"role": ROLES[letter], "content": f"{ROLES[letter]}{n}."} for n, letter in enumerate(letters)]


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(folder, name, *rows, **settings):
    """Return the dataset of rows, which are chats by letters or whole rows."""
    whole = [{"messages": chat(row)} if isinstance(row, str) else row for row in rows]
    return prepare(Data(path=str(write(folder, *whole)), eval_fraction=0, **settings), tokenizer(name))


def shown(name, documents):
    """Return each document as text with what is learned in ⟦⟧, without the control tokens of ChatML."""
    texts = []
    for document in documents:
        text, before = "", False
        for token, learned in [*zip(document.ids.tolist(), document.supervised.tolist(), strict=True), (None, False)]:
            text += ("⟦" if learned else "⟧") if learned != before else ""
            text += "" if token is None else tokenizer(name).decode([token])
            before = learned
        for token, short in (("<|im_start|>", ""), ("<|im_end|>", "|"), ("<|endoftext|>", "")):
            text = text.replace(token, short)
        texts.append(text.replace("\n", " ").replace("  ", " / "))
    return texts


KEPT = "kept as they are"
JOINED = "joined by a blank line"
CASES = {
    # name: template, roles, documents, counts
    "user at the end": (
        "chatml", "uau", ["user user0.| assistant ⟦assistant1.|⟧"], "chats cut after their last answer"),
    "two users and a system message at the end": (
        "alternating", "uauus", ["user user0.| model ⟦assistant1.|⟧"], "chats cut after their last answer"),
    "two users kept": (
        "chatml", "uua", ["user user0.| user user1.| assistant ⟦assistant2.|⟧"],
        f"chats with two user messages in a row, {KEPT}"),
    "two users joined": (
        "alternating", "uua", ["user user0. / user1.| model ⟦assistant2.|⟧"],
        f"chats with two user messages in a row, {JOINED}"),
    "three users joined later": (
        "alternating", "uauuua",
        ["user user0.| model ⟦assistant1.|⟧ user user2. / user3. / user4.| model ⟦assistant5.|⟧"],
        f"chats with two user messages in a row, {JOINED}"),
    "two answers kept": (
        "chatml", "uaa", ["user user0.| assistant ⟦assistant1.|⟧ assistant ⟦assistant2.|⟧"],
        f"chats with two assistant messages in a row, {KEPT}"),
    "two answers joined": (
        "alternating", "uaaua",
        ["user user0.| model ⟦assistant1. / assistant2.|⟧ user user3.| model ⟦assistant4.|⟧"],
        f"chats with two assistant messages in a row, {JOINED}"),
    "two answers joined where only the last has a thought": (
        "qwen3", "uaa", ["user user0.| assistant ⟦<think> / </think> / assistant1. / assistant2.|⟧"],
        f"chats with two assistant messages in a row, {JOINED}"),
    "two answers joined where no prompt separates them": (
        "mistral", "uaa", ["[INST] user0.[/INST]⟦ assistant1. / assistant2.|⟧"],
        f"chats with two assistant messages in a row, {JOINED}"),
    "later system message kept": (
        "chatml", "uasua",
        ["user user0.| assistant ⟦assistant1.|⟧ system system2.| user user3.| assistant ⟦assistant4.|⟧"],
        "chats with a later system message, kept in its place"),
    "later system message put into the next question": (
        "alternating", "uasua",
        ["user user0.| model ⟦assistant1.|⟧ user system2. / user3.| model ⟦assistant4.|⟧"],
        "chats with a later system message, put into the message of a user"),
    "later system message put into the question before it": (
        "alternating", "usa", ["user user0. / system1.| model ⟦assistant2.|⟧"],
        "chats with a later system message, put into the message of a user"),
    "later system message that would be an answer": (
        "mistral", "uasua", ["[INST] user0.[/INST]⟦ assistant1.|⟧[INST] system2. / user3.[/INST]⟦ assistant4.|⟧"],
        "chats with a later system message, put into the message of a user"),
    "later system message that is dropped": (
        "silent", "uasua", ["user user0.| assistant ⟦assistant1.|⟧ user system2. / user3.| assistant ⟦assistant4.|⟧"],
        "chats with a later system message, put into the message of a user"),
    "assistant first": (
        "chatml", "aua", ["assistant assistant0.| user user1.| assistant ⟦assistant2.|⟧"],
        "chats that begin with the assistant, whose first words are not supervised"),
    "assistant first after a system message": (
        "chatml", "saua", ["system system0.| assistant assistant1.| user user2.| assistant ⟦assistant3.|⟧"],
        "chats that begin with the assistant, whose first words are not supervised"),
    "assistant first, refused": (
        "alternating", "aua", ["user user1.| model ⟦assistant2.|⟧"],
        "chats without the assistant's first words, which the chat template refuses"),
    "system message refused": (
        "alternating", "suaua", ["user system0. / user1.| model ⟦assistant2.|⟧ user user3.| model ⟦assistant4.|⟧"],
        "system messages put into the first message of the user"),
    "system message dropped": (
        "silent", "sua", ["user system0. / user1.| assistant ⟦assistant2.|⟧"],
        "system messages put into the first message of the user"),
    "system message refused by Gemma": (
        "gemma", "sua",
        ["<start_of_turn>user system0. / user1.<end_of_turn> <start_of_turn>model ⟦assistant2.<end_of_turn>⟧"],
        "system messages put into the first message of the user"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_disorder_is_repaired_as_its_template_allows_and_counted(case, tmp_path):
    name, letters, documents, counted = CASES[case]
    dataset = made(tmp_path, name, letters, "ua")
    assert shown(name, dataset.train)[:-1] == documents
    assert dataset.report.converted == {counted: 1}
    assert dataset.report.left_out == {}


def test_several_disorders_of_one_chat_are_counted_each(tmp_path):
    dataset = made(tmp_path, "alternating", "ssauusuaau")
    assert shown("alternating", dataset.train) == [
        "user system0. / system1. / user3. / user4. / system5. / user6.| model ⟦assistant7. / assistant8.|⟧"
    ]
    assert dataset.report.converted == {
        "chats cut after their last answer": 1,
        "chats without the assistant's first words, which the chat template refuses": 1,
        "chats with a later system message, put into the message of a user": 1,
        "system messages put into the first message of the user": 1,
        f"chats with two user messages in a row, {JOINED}": 1,
        f"chats with two assistant messages in a row, {JOINED}": 1,
    }


LEFT_OUT = {
    "uau": "ending without an answer", "aua": "beginning with the assistant",
    "uua": "with two messages of one role in a row", "uaa": "with two messages of one role in a row",
    "ssua": "with two messages of one role in a row", "uasua": "with a system message after the first message",
    "u": "ending without an answer", "uta": "with the result of a tool that no message called",
    "sua": "with a system message, which the chat template does not take",
}  # fmt: skip


def test_drop_leaves_out_and_counts_every_row_that_strict_refuses(tmp_path):
    dataset = made(tmp_path, "alternating", *LEFT_OUT, "ua", turns=Turns.drop)
    assert shown("alternating", dataset.train) == ["user user0.| model ⟦assistant1.|⟧"]
    assert sum(dataset.report.left_out.values()) == len(LEFT_OUT)
    assert dataset.report.left_out == {reason: [*LEFT_OUT.values()].count(reason) for reason in LEFT_OUT.values()}
    assert dataset.report.converted == {}
    with pytest.raises(DataError, match=r"9 bad rows") as caught:
        made(tmp_path, "alternating", *LEFT_OUT, "ua", turns=Turns.strict)
    assert "message 3: the chat must end with an assistant message, it ends with user; data.turns=" in str(caught.value)


@pytest.mark.parametrize("letters", [*LEFT_OUT])
def test_strict_data_refuses_every_repair(letters, tmp_path):
    with pytest.raises(DataError, match="1 bad row") as caught:
        made(tmp_path, "alternating", letters, "ua", strict=True)
    assert ("data.strict=true refuses" in str(caught.value)) == (letters not in ("u", "uta"))


def test_a_file_without_a_good_row_is_an_error_that_counts_what_was_left_out(tmp_path):
    with pytest.raises(DataError, match=r"every row is left out: 2 ending without an answer, 1 beginning with"):
        made(tmp_path, "chatml", "u", "uau", "aua", turns=Turns.drop)


def test_a_system_message_between_answers_is_refused_where_it_cannot_be_put_into_a_question(tmp_path):
    with pytest.raises(DataError, match="takes no later system message, and this one is not next to a message of the"):
        made(tmp_path, "alternating", "uasa", "ua")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"role": "assistant", "content": "b", "train": False}, "only one of them is learned"),
        ({"role": "assistant", "content": "b", "name": "x"}, "cannot be joined because of name"),
        ({"role": "assistant", "content": "b", "reasoning_content": "hm"}, "because of reasoning_content"),
    ],
)
def test_messages_that_cannot_be_joined_without_a_change_are_refused(second, reason, tmp_path):
    messages = [*chat("ua"), second]
    with pytest.raises(DataError, match=rf"takes no two assistant messages in a row, and these .*{reason}"):
        made(tmp_path, "alternating", {"messages": messages})


@pytest.mark.parametrize("train_on", TrainOn)
def test_a_joined_answer_is_learned_as_one(train_on, tmp_path):
    dataset = made(tmp_path, "alternating", "uauaa", train_on=train_on)
    last = "model ⟦assistant3. / assistant4.|⟧"
    assert shown("alternating", dataset.train)[0].endswith(last if train_on is not TrainOn.all else last[7:])


@pytest.mark.parametrize("name", ["chatml", "alternating", "silent", "qwen3", "llama2"])
def test_prompts_of_repaired_chats_are_those_of_inference(name, tmp_path):
    rows = [{"messages": chat(letters)} for letters in ("suaua", "uuaua", "aua", "uasua", "suaa")]
    data = Data(path=str(write(tmp_path, *rows)), eval_fraction=0)
    found = read(data)
    seen = measure(found, prepare_rows(found, data, tokenizer(name)), data, tokenizer(name))
    assert (seen.prompts, seen.other_prompts) == (len(rows), [])


@pytest.mark.parametrize("name", ["chatml", "alternating", "silent", "gemma"])
def test_a_system_message_reaches_the_chat_in_the_form_of_training(name, tmp_path):
    (document,) = made(tmp_path, name, "ua", system="Be brief.").train
    session = Session(tiny_model("llama"), tokenizer(name), "Be brief.", Sampling(), 0)
    prompt = prompt_ids(session, {"role": "user", "content": "user0."}).tolist()
    assert document.ids.tolist()[: len(prompt)] == prompt
    assert "Be brief." in tokenizer(name).decode(prompt)
    if name != "chatml":
        session.data = replace(session.data, turns=Turns.strict)
        if name == "silent":
            prompt = prompt_ids(session, {"role": "user", "content": "user0."}).tolist()
            assert "Be brief." not in tokenizer(name).decode(prompt)
        else:
            with pytest.raises(ConfigError, match="the chat template refuses this conversation"):
                prompt_ids(session, {"role": "user", "content": "user0."})


def test_the_reference_of_a_joined_answer_is_the_whole_answer(tmp_path):
    path = write(tmp_path, *({"messages": chat(letters)} for letters in ("uaa", "uaua")))
    dataset = prepare(Data(path=str(path), eval_fraction=0.99), tokenizer("alternating"))
    answers = {prompt.source[-1]: prompt.answer for prompt in dataset.eval_prompts}
    assert answers.items() <= {"1": "assistant1.\n\nassistant2.", "2": "assistant3."}.items() and answers


def test_counts_are_kept_with_cached_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_ft.data.dataset._CACHED_FROM_ROWS", 1)
    first, second = (made(tmp_path, "alternating", "uua", "sua", "ua").report for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    assert second.converted == first.converted != {}
    with pytest.raises(DataError, match=r"data\.strict=true refuses"):
        made(tmp_path, "alternating", "uua", "sua", "ua", strict=True)
    dropped = [made(tmp_path, "alternating", "uua", "sua", "ua", turns=Turns.drop).report for _ in range(2)]
    assert dropped[1].cached and dropped[0].left_out == dropped[1].left_out
    assert len(dropped[1].left_out) == 2


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(
    letters=st.text("sua", min_size=1, max_size=8).filter(lambda letters: not re.search("as+(a|$)", letters)),
    name=st.sampled_from(["alternating", "silent", "chatml"]),
)
def test_a_fitted_chat_keeps_every_text_and_the_prompt_of_a_part_is_part_of_the_whole(letters, name):
    messages = chat(letters)
    start = letters.find("u")
    if start < 0:
        return
    accepts = trials_of(tokenizer(name)).accepts
    whole = fit(messages, accepts)
    dropped = {i for i, place in enumerate(whole.index) if place is None}
    assert dropped <= {i for i in range(start) if letters[i] == "a"}
    texts = "\n\n".join(message["content"] for message in whole.messages).split("\n\n")
    assert sorted(texts) == sorted(m["content"] for i, m in enumerate(messages) if i not in dropped)
    for end in range(start + 1, len(letters)):
        if letters[end] == "a" and letters[end - 1] == "u":
            assert fit(messages[:end], accepts).messages == whole.messages[: whole.index[end]]
