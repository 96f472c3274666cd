"""Variables of chat templates: checked, given to every rendering, and saved as the template's defaults."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import TOKENS, real_tokenizer
from tiny import tiny_tokenizer

import lora_ft
from lora_ft import config, validation
from lora_ft.data import template_variables
from lora_ft.data.rendering import render
from lora_ft.errors import ConfigError

CHAT = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen2_5", set()),
        ("deepseek_v3_1", {"thinking", "enable_thinking"}),
        ("gpt_oss", {"builtin_tools", "model_identity", "reasoning_effort"}),
        ("llama3_2", {"custom_tools", "date_string", "tools_in_user_message"}),
        ("deepseek_r1_distill", set()),
    ],
)
def test_a_template_reads_the_variables_that_it_does_not_set_itself(name, read):
    assert template_variables.read_by(real_tokenizer(name)) == read


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"enable_thnking": False},
            "reads no variable of this name; it reads enable_thinking; nearest: enable_thinking",
        ),
        ({"messages": "a"}, r"data\.template\.messages is set from the rows and the tokenizer"),
        ({"bos_token": "a"}, r"data\.template\.bos_token is set from the rows and the tokenizer"),
        ({"add_generation_prompt": True}, "is set from the rows and the tokenizer"),
        ({"content": "a"}, "reads no variable of this name"),  # set by the template itself
    ],
)
def test_other_names_are_refused_with_those_that_the_template_reads(variables, message):
    with pytest.raises(ConfigError, match=message):
        template_variables.check(real_tokenizer("qwen3"), variables)


def test_variables_need_a_chat_template():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="it reads none"):
        template_variables.check(tokenizer, {"enable_thinking": False})
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"data\.template\.enable_thinking: the tokenizer has no chat template"):
        template_variables.check(tokenizer, {"enable_thinking": False})


SWITCHES = {
    "qwen3": {"enable_thinking": False},
    "qwen3_5_think": {"enable_thinking": False},
    "deepseek_v3_1": {"thinking": True},
    "gpt_oss": {"reasoning_effort": "high", "model_identity": 'I am "it"\\ {{ x }} %} 👋\n'},
    "llama3_2": {"date_string": "01 Jan 2020"},
    "granite3_3": {"thinking": True},
    "seed_oss": {"thinking_budget": 512},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_saved_defaults_render_what_the_variables_render(name, tmp_path):
    tokenizer, variables = real_tokenizer(name), SWITCHES[name]
    expected = render(CHAT, tokenizer, True, variables=variables)
    assert expected != render(CHAT, tokenizer, True)
    saved = template_variables.with_defaults(tokenizer, variables)
    saved.save_pretrained(tmp_path)
    read = type(tokenizer).from_pretrained(tmp_path)
    assert read.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=False, **({} if "date_string" in variables else {"date_string": "x"})
    ) == expected.replace("26 Jul 2024", "x")
    assert tokenizer.chat_template == template_variables.without_defaults(read.chat_template), "the base's is unchanged"
    assert template_variables.read_by(read) == template_variables.read_by(tokenizer)


def test_a_value_that_is_given_overrides_a_saved_default():
    tokenizer = real_tokenizer("qwen3")
    saved = template_variables.with_defaults(tokenizer, {"enable_thinking": False})
    thinking = render(CHAT, tokenizer, True)
    assert render(CHAT, saved, True) != thinking == render(CHAT, saved, True, variables={"enable_thinking": True})


VALUES = st.one_of(st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())


@settings(deadline=None)
@given(VALUES, VALUES)
def test_a_saved_default_has_the_value_and_is_replaced_by_another(first, second):
    template = "{{ v is none }} {{ v is boolean }} {{ v is string }} {{ v }}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for value in (first, second):
        tokenizer.chat_template = template_variables.defaults(tokenizer.chat_template, {"v": value, "w": "a"})
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
            f"{value is None} {isinstance(value, bool)} {isinstance(value, str)} {value}"
        )
        assert template_variables.without_defaults(tokenizer.chat_template) == template
    assert template_variables.defaults(tokenizer.chat_template, {}) == template


def test_named_templates_get_their_defaults_each():
    templates = {"default": "{{ v }}", "tool_use": "{{ v }}{{ tools }}"}
    made = template_variables.defaults(templates, {"v": 1})
    assert made.keys() == templates.keys() and all("set v = v if v is defined else 1" in text for text in made.values())
    assert template_variables.without_defaults(made) == templates


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["data.template.enable_thinking=false"], {"enable_thinking": False}),
        (["data.template.enable_thinking=null"], {"enable_thinking": None}),
        (["data.template.thinking_budget=512", "data.template.date_string=26 Jul 2024"],
         {"thinking_budget": 512, "date_string": "26 Jul 2024"}),
        (["data.template={enable_thinking: true, temperature: 0.5}"], {"enable_thinking": True, "temperature": 0.5}),
    ],
)  # fmt: skip
def test_variables_are_typed_on_the_command_line(typed, expected):
    cfg = lora_ft.compose("train", ["data.path=rows.jsonl", "model=smollm2_135m", *typed])
    assert cfg.data.template == expected
    assert validation.from_plain(config.TrainRun, validation.to_plain(cfg)).data.template == expected


def test_a_variable_is_a_single_value():
    with pytest.raises(ConfigError, match=r"data\.template must be a mapping to true, false, numbers, text or null"):
        lora_ft.compose("train", ["data.template.tools=[1,2]"])


@pytest.mark.parametrize("name", TOKENS)
def test_every_template_renders_the_same_without_variables(name):
    tokenizer = real_tokenizer(name)
    assert template_variables.with_defaults(tokenizer, {}) is tokenizer
