"""Masks for templates in the style of each family: ids as at inference, only answers and their ends supervised."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, SENTENCES, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_ft.config import Data, TrainOn
from lora_ft.data.chat_template import turns
from lora_ft.data.dataset import prepare, prepare_rows
from lora_ft.data.read import read
from lora_ft.data.rows import Ledger, Row
from lora_ft.data.statistics import measure
from lora_ft.data.tokenize import Vocabulary
from lora_ft.errors import ConfigError, DataError

# Qwen3 shows <think> for the last answer only, so earlier turns are rendered differently once there is a later one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(template, tokens=()):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    tokenizer.chat_template = template
    return tokenizer


def metaspace_tokenizer():
    """Make a tokenizer like Llama 2's: a space before the first word, and a BOS before plain text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prepared(folder, tokenizer, *rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return list(prepare(Data(path=str(path), eval_fraction=0, **settings), tokenizer).train)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def learned(tokenizer, row):
    return tokenizer.decode(row.ids[row.supervised])


DIALOGUE = chat("What is the capital?", "Paris, 12 letters.", "Are you\nsure?", "Yes!\n\nI am.")


def merging_tokenizer():
    """Make a ChatML tokenizer whose tokens span line breaks and words, and so the end of the prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["\na", "\n\nb", "t\nab", "\n b", "a\n", "' ,b", "\né"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


MERGING = merging_tokenizer()
TEXTS = st.text("ab \n\t.,'é€😀1", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.closes("A09")
@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_any_chat_decodes_to_its_rendering_and_learns_its_answers(tmp_path_factory, turns):
    messages = chat(*(text for turn in turns for text in turn))
    rows = prepared(tmp_path_factory.mktemp("any"), MERGING, {"messages": messages})
    assert MERGING.decode(rows[-1].ids) + "\n" == MERGING.apply_chat_template(messages, tokenize=False)
    assert "".join(learned(MERGING, row) for row in rows) == "".join(answer + "<|im_end|>" for _, answer in turns)
    for row in rows:
        ids, start = list(row.ids), int(row.supervised.argmax())
        assert ids[:start] == MERGING(MERGING.decode(ids[:start]), add_special_tokens=False)["input_ids"]


@pytest.mark.closes("A08", "A09")
def test_an_answer_that_merges_with_the_prompt_is_tokenized_separately(tmp_path):
    messages = chat("a", "ab")
    (row,) = prepared(tmp_path, MERGING, {"messages": messages})
    prompt = MERGING.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = MERGING.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] != prompt, "the tokenizer must merge here, or the test proves nothing"
    assert list(row.ids) == prompt + MERGING("ab<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.mark.closes("A08")
def test_a_template_that_rewrites_history_gives_one_document_per_answer(tmp_path):
    tokenizer = tokenizer_of(THINKING)
    rows = prepared(tmp_path, tokenizer, {"messages": chat("a", "one", "b", "<think>hm</think>two")})
    assert [learned(tokenizer, row) for row in rows] == [
        "<think>\n\n</think>\n\none<|im_end|>", "<think>hm</think>two<|im_end|>",
    ]  # fmt: skip
    assert [tokenizer.decode(row.ids[: row.supervised.argmax()]) for row in rows] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\n",
    ]
    assert {row.source for row in rows} == {f"{tmp_path}/rows.jsonl:1"}


def test_answers_of_weight_0_and_answers_in_a_prompt_are_not_supervised(tmp_path):
    tokenizer = tiny_tokenizer()
    weighted = [DIALOGUE[0], {**DIALOGUE[1], "weight": 0}, *DIALOGUE[2:]]
    rows = prepared(tmp_path, tokenizer, {"messages": weighted})
    rows += prepared(tmp_path, tokenizer, {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]})
    rows += prepared(tmp_path, tokenizer, {"messages": weighted}, system="Be brief.")
    assert [learned(tokenizer, row) for row in rows] == ["Yes!\n\nI am.<|im_end|>"] * 3


@pytest.mark.parametrize("flag", [{"train": False}, {"loss": False}, {"weight": 0}, {"train": False, "loss": True}])
def test_a_flagged_answer_is_not_supervised(flag, tmp_path):
    tokenizer = tiny_tokenizer()
    others = {"train": True, "loss": None, "weight": 1}
    messages = [DIALOGUE[0], {**DIALOGUE[1], **flag}, {**DIALOGUE[2], **others}, {**DIALOGUE[3], **others}]
    shared = [{"from": m["role"], "value": m["content"]} for m in DIALOGUE]
    shared[1] |= flag
    rows = prepared(tmp_path, tokenizer, {"messages": messages}, {"messages": DIALOGUE})
    rows += prepared(tmp_path, tokenizer, {"conversations": shared})
    both = "Paris, 12 letters.<|im_end|>Yes!\n\nI am.<|im_end|>"
    assert [learned(tokenizer, row) for row in rows] == ["Yes!\n\nI am.<|im_end|>", both, "Yes!\n\nI am.<|im_end|>"]
    assert [list(row.ids) for row in rows] == [list(rows[1].ids)] * 3, "flags must not reach the template"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: messages: .* data\.train_on=all learns every message"):
        prepared(tmp_path, tokenizer, {"messages": messages}, train_on=TrainOn.all)


def test_data_system_is_added_to_chats_without_a_system_message(tmp_path):
    tokenizer = tiny_tokenizer()
    own = [{"role": "system", "content": "Mine."}, *chat("a", "b", "c", "d")]
    rows = prepared(tmp_path, tokenizer, {"messages": chat("a", "b", "c", "d")}, {"messages": own}, system="Theirs.")
    assert [tokenizer.decode(row.ids).split("<|im_end|>")[0] for row in rows] == [
        "<|im_start|>system\nTheirs.", "<|im_start|>system\nMine.",
    ]  # fmt: skip
    assert [learned(tokenizer, row) for row in rows] == ["b<|im_end|>d<|im_end|>"] * 2


def test_tools_and_tool_calls_reach_the_template(tmp_path):
    template = CHATML.replace("{% for", "{{ tools[0].function.name if tools else '' }}{% for", 1).replace(
        "message['content']", "(message.tool_calls[0].name if message.tool_calls else message['content'])"
    )
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "call add"}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    tokenizer = tokenizer_of(template)
    (row,) = prepared(tmp_path, tokenizer, {"messages": messages, "tools": [{"name": "the add tool"}]})
    assert learned(tokenizer, row) == "call add<|im_end|>Four.<|im_end|>"
    assert tokenizer.decode(row.ids).startswith("the add tool<|im_start|>user")


def test_a_tool_call_that_the_template_drops_is_reported(tmp_path):
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add_numbers"}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: chat template: drops the answer's call of add_numbers"):
        prepared(tmp_path, tiny_tokenizer(), {"messages": messages})


# Like Llama 3.2's: `date_string`, or the date of today if it is not given.
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)


def test_a_template_with_a_date_gets_a_constant_one(tmp_path):
    tokenizer = tokenizer_of(DATED)
    (row,) = prepared(tmp_path, tokenizer, {"messages": chat("a", "b")})
    assert tokenizer.decode(row.ids).startswith("<|im_start|>system\nToday Date: 26 Jul 2024<|im_end|>")


@pytest.mark.closes("A26")
def test_a_control_token_in_data_system_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.system holds the control token <\|im_start\|>"):
        prepared(tmp_path, tiny_tokenizer(), {"messages": DIALOGUE}, system="Hi <|im_start|>user")


@pytest.mark.closes("A26")
def test_added_tokens_that_are_not_special_are_allowed_in_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    (row,) = prepared(tmp_path, tokenizer, {"messages": chat("a <think>", "<think>b")})
    assert learned(tokenizer, row) == "<think>b<|im_end|>"


def plain_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The capital is ", "Paris"), ("a\n", "\nb"), ("ta", "ble")],
)
def test_without_a_template_prompt_and_completion_are_unchanged(prompt, completion, tmp_path):
    tokenizer = plain_tokenizer()
    (row,) = prepared(tmp_path, tokenizer, {"prompt": prompt, "completion": completion})
    start = int(row.supervised.argmax())
    assert list(row.ids[:start]) == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(row.ids[start:]) == completion + "<|im_end|>"
    assert row.supervised[start:].all()


def test_without_a_template_alpaca_rows_have_headings(tmp_path):
    tokenizer = plain_tokenizer()
    (row,) = prepared(tmp_path, tokenizer, {"instruction": "Add.", "input": "2+2", "output": "4"})
    assert tokenizer.decode(row.ids) == ("### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n4<|im_end|>")
    assert learned(tokenizer, row) == "4<|im_end|>"


@pytest.mark.closes("A05")
def test_plain_text_is_supervised_and_has_one_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = prepared(tmp_path, tokenizer, {"text": "The fox."}, {"text": "The fox.<|im_end|>"})
    assert list(rows[0].ids) == list(rows[1].ids) == [*tokenizer("The fox.")["input_ids"], 2]
    assert list(rows[0].supervised) == [False] + [True] * (len(rows[0].ids) - 1)


@pytest.mark.closes("A07")
def test_plain_text_has_one_bos_if_its_tokenizer_adds_one(tmp_path):
    tokenizer = metaspace_tokenizer()
    (row,) = prepared(tmp_path, tokenizer, {"text": "The quick fox"})
    assert list(row.ids) == [*tokenizer("The quick fox")["input_ids"], 2]
    assert list(row.ids).count(1) == 1
    assert row.supervised[1:].all()
    with pytest.raises(DataError, match=r"rows\.jsonl:1: text: begins with two beginning-of-text tokens"):
        prepared(tmp_path, tokenizer, {"text": "<s>The quick fox"})


def test_plain_prompts_keep_their_ids_with_a_metaspace_tokenizer(tmp_path):
    tokenizer = metaspace_tokenizer()
    (row,) = prepared(tmp_path, tokenizer, {"prompt": "The quick", "completion": " brown fox"})
    start = int(row.supervised.argmax())
    assert list(row.ids[:start]) == tokenizer("The quick")["input_ids"]
    assert list(row.ids) == [*tokenizer("The quick brown fox")["input_ids"], 2]
    # Tokenized separately, the completion would get a space that the row does not have.
    with pytest.raises(DataError, match=r"rows\.jsonl:1: answer: begins inside a token"):
        prepared(tmp_path, tokenizer, {"prompt": "The qui", "completion": "ck brown fox"})


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"messages": DIALOGUE}, {}, r"rows\.jsonl:1 is a chat, and the tokenizer has no chat template: .*FILE"),
        ({"text": "a"}, {"system": "s"}, r"data\.system needs rows that a chat template renders"),
    ],
)
def test_rows_that_the_tokenizer_cannot_render_are_refused(row, settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, plain_tokenizer(), row, **settings)


def test_plain_text_needs_an_end_token(tmp_path):
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        prepared(tmp_path, tokenizer, {"text": "a"})


@pytest.mark.closes("A12")
def test_truncation_enabled_in_a_tokenizer_file_has_no_effect(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    (row,) = prepared(tmp_path, tokenizer, {"messages": DIALOGUE})
    assert learned(tokenizer, row).endswith("I am.<|im_end|>")


PRE_TOKENIZERS = {
    "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte level with a space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits and byte level": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "metaspace at each part": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "metaspace at the start": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "none": None,
}


def tokenizer_with(pre_tokenizer, normalizer=None, added=()):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["a b", "ab ab", "\n\na", "▁a▁b", "A 12"] * 9, trainer)
    bpe.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


PLAIN_TOKENS = [AddedToken("<think>", normalized=False), AddedToken("Ab", normalized=True)]
STRIPPING = [AddedToken("<mask>", normalized=False, lstrip=True)]
STRIPPING_AFTER = [AddedToken("<mask>", normalized=False, rstrip=True)]
WHOLE_WORD = [AddedToken("ab", normalized=False, single_word=True)]
LOWER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Lowercase()])
VOCABULARIES = {name: Vocabulary(tokenizer_with(step)) for name, step in PRE_TOKENIZERS.items()} | {
    "normalized": Vocabulary(tokenizer_with(None, LOWER, PLAIN_TOKENS)),
    "added": Vocabulary(tokenizer_with(PRE_TOKENIZERS["byte level"], None, PLAIN_TOKENS)),
    "stripping": Vocabulary(tokenizer_with(PRE_TOKENIZERS["byte level"], None, STRIPPING)),
    "stripping after": Vocabulary(tokenizer_with(PRE_TOKENIZERS["byte level"], None, STRIPPING_AFTER)),
    "whole words": Vocabulary(tokenizer_with(PRE_TOKENIZERS["byte level"], None, WHOLE_WORD)),
}
PARTS = st.sampled_from(["<|", "<|im_end|>", "<think>", "<mask>", "Ab", "ab", "a", " ", "\n", "1", "é", "▁", "|>", "."])


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(VOCABULARIES)), st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=4))
def test_texts_cut_at_added_tokens_have_the_ids_of_uncut_texts(name, texts):
    assert VOCABULARIES[name].ids(texts) == VOCABULARIES[name].ids_whole(texts)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_are_cut_only_if_parts_do_not_depend_on_their_position(name):
    depends = name in ("metaspace at the start", "stripping", "stripping after", "whole words")
    assert (VOCABULARIES[name].split is None) == depends


def tool_template(arguments):
    """Return a ChatML template that writes tool calls as JSON, with the arguments by this Jinja expression over `f`."""
    call = """{"name": "' + f.name + '", "arguments": """
    calls = (
        "{% for call in message.tool_calls or [] %}{% set f = call.function or call %}{{ '" + call + "' }}"
        "{{ " + arguments + " }}{{ '}' }}{% endfor %}"
    )  # fmt: skip
    return CHATML.replace(" + '<|im_end|>' + '\n' }}", " }}" + calls + "{{ '<|im_end|>\n' }}")


def call_chat(arguments, wrapped=True):
    function = {"name": "find", "arguments": arguments}
    call = {"type": "function", "function": function, "id": "call_0"} if wrapped else function
    return [
        {"role": "user", "content": "Where is Lima?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"country": "Peru"}'},
        {"role": "assistant", "content": "In Peru."},
    ]


ARGUMENTS = {"city": 'Lima é "x"', "near": [1, 2.5, True, None], "more": {"it's": "a\nb"}}
TO_JSON = "f.arguments | tojson"
TEXT_OR_OBJECT = "f.arguments if f.arguments is string else f.arguments | tojson"
JOINS_TEXT = "'' + f.arguments"
PRINTS = "f.arguments"
PRINTS_STRING = "f.arguments | string"


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("encode", [json.dumps, dict], ids=["text", "object"])
@pytest.mark.parametrize("written", [TO_JSON, TEXT_OR_OBJECT, JOINS_TEXT, PRINTS, PRINTS_STRING])
def test_tool_call_arguments_are_learned_as_one_json_object(written, encode, wrapped, tmp_path):
    tokenizer = tokenizer_of(tool_template(written))
    (row,) = prepared(tmp_path, tokenizer, {"messages": call_chat(encode(ARGUMENTS), wrapped)})
    call, answer, _ = learned(tokenizer, row).split("<|im_end|>")
    assert json.loads(call) == {"name": "find", "arguments": ARGUMENTS}
    assert answer == "In Peru."


@pytest.mark.parametrize("written", [TO_JSON, JOINS_TEXT])
def test_a_row_with_a_tool_call_has_the_same_prompt_in_training_and_inference(written, tmp_path):
    tokenizer = tokenizer_of(tool_template(written))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": call_chat(json.dumps(ARGUMENTS))}))
    data = Data(path=str(tmp_path / "rows.jsonl"))
    found = read(data)
    seen = measure(found, prepare_rows(found, data, tokenizer), data, tokenizer)
    assert (seen.prompts, seen.other_prompts) == (1, [])


@pytest.mark.parametrize("written", [TO_JSON, JOINS_TEXT, PRINTS])
@pytest.mark.parametrize("empty", [" ", None, {}])
def test_empty_arguments_of_a_tool_call_become_an_empty_object(empty, written, tmp_path):
    tokenizer = tokenizer_of(tool_template(written))
    given, missing = call_chat(empty), call_chat(empty)
    del missing[1]["tool_calls"][0]["function"]["arguments"]
    for row in prepared(tmp_path, tokenizer, {"messages": given}, {"messages": missing}):
        assert learned(tokenizer, row).startswith('{"name": "find", "arguments": {}}')


@pytest.mark.parametrize(
    ("written", "missing"),
    [
        ("{'city': f.arguments.city} | tojson", "near"),
        ("(f.arguments | tojson)[:12]", "Lima"),
        ("f.arguments | tojson | upper", "city"),
        ("{}", "city"),
    ],
)
@pytest.mark.parametrize("train_on", [TrainOn.answers, TrainOn.last_answer])
def test_a_template_that_drops_an_argument_is_refused(written, missing, train_on, tmp_path):
    tokenizer = tokenizer_of(tool_template(written))
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: chat template: drops {missing}.* call of find"):
        prepared(tmp_path, tokenizer, {"messages": call_chat(ARGUMENTS)}, train_on=train_on)


def test_a_template_may_write_arguments_in_its_own_format(tmp_path):
    pairs = "{% for k, v in f.arguments | items %}<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>{% endfor %}"
    template = tool_template("'@'").replace("{{ '@' }}", pairs)
    tokenizer = tokenizer_of(template)
    (row,) = prepared(tmp_path, tokenizer, {"messages": call_chat(json.dumps(ARGUMENTS))})
    assert '<city>Lima é "x"</city><near>[1, 2.5, true, null]</near>' in learned(tokenizer, row)


def test_messages_are_rendered_with_their_additional_keys():
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [Row("1", [question, answer], "b"), Row("2", [{**question, "name": "Ann"}, answer], "b")]
    texts = [made[0].through for _, made in turns(rows, Data(), tokenizer, Ledger())]
    assert texts == ["user: a<|im_end|>assistant: b<|im_end|>", "Ann: a<|im_end|>assistant: b<|im_end|>"]
