"""Filled-in chats equal rendered ones, for templates that only copy; those that look at contents are left alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_templates import FAMILIES, THINKING, tokenizer_of
from tiny import CHATML

from lora_ft.config import Data
from lora_ft.data.chat_template import render, scripts
from lora_ft.data.fill import Filler, is_plain
from lora_ft.data.rows import Ledger, Row

AWKWARD = st.text("ab1 \n\t\u2003%s{}'\"\\<&>é€😀\ue000\ue001", min_size=1, max_size=12).filter(str.strip)


def filler_of(template, render_plain=None):
    tokenizer = tokenizer_of(template)

    def plain(messages, prompt):
        return render(messages, tokenizer, prompt)

    variables = {**tokenizer.special_tokens_map, "date_string": "26 Jul 2024"}
    return Filler(template, variables, render_plain or plain), plain


def chat(contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def filled(filler, messages, prompt):
    return filler.text(tuple(m["role"] for m in messages), [m["content"] for m in messages], prompt)


FILLERS = {family: filler_of(template) for family, (template, *_) in FAMILIES.items()}


@settings(deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(AWKWARD, min_size=1, max_size=5), st.booleans())
def test_a_filled_chat_is_the_rendered_one_whatever_its_contents(family, contents, prompt):
    filler, plain = FILLERS[family]
    assert filled(filler, chat(contents), prompt) == plain(chat(contents), prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_only_copies_is_rendered_once_for_each_shape(family):
    rendered = []
    tokenizer = tokenizer_of(FAMILIES[family][0])

    def counted(messages, prompt):
        rendered.append(messages)
        return render(messages, tokenizer, prompt)

    filler, _ = filler_of(FAMILIES[family][0], counted)
    for text in ("a", "b", "c"):
        for contents in ([text], [text, "answer"]):
            assert filled(filler, chat(contents), False)
    assert len(rendered) == 2


ONE = "{% for m in messages %}"
# The chats of the probe hold no z, so that only what watches it can tell.
LOOKS = {
    "search": THINKING,
    "length": ONE + "{{ m.content|length }}{% endfor %}",
    "truth": ONE + "{% if m.content %}x{% endif %}{% endfor %}",
    "equality": ONE + "{{ m.content == 'z' }}{% endfor %}",
    "equality from the left": ONE + "{{ 'z' == m.content }}{% endfor %}",
    "equality of messages": ONE + "{{ m == {'role': 'user', 'content': 'z'} }}{% endfor %}",
    "order": ONE + "{{ 'b' > m.content }}{% endfor %}",
    "membership": ONE + "{{ m.content in 'xyz' }}{% endfor %}",
    "membership in a list": ONE + "{{ m.content in ['y', 'z'] }}{% endfor %}",
    "membership through a name": "{% set known = 'xyz' %}" + ONE + "{{ m.content not in known }}{% endfor %}",
    "key": ONE + "{{ {'z': 1}.get(m.content) }}{% endfor %}",
    "key of a list": "[{% for m in messages %}{{ messages[m.content] is defined }}{% endfor %}]",
    "key of a loop": ONE + "{{ loop[m.content] }}{% endfor %}",
    "clock": "{{ strftime_now('%H') }}{{ messages[0].content }}",
    "slice": ONE + "{{ m.content[:1] }}{% endfor %}",
    "method": ONE + "{{ m.content.upper() }}{% endfor %}",
    "method of a literal": ONE + "{{ 'xyz'.startswith(m.content) }}{% endfor %}",
    "join of a literal": ONE + "{% if ''.join([m.content]) == 'z' %}x{% endif %}{% endfor %}",
    "strip of other characters": ONE + "{{ m.content.strip('a') }}{% endfor %}",
    "strip of a joined text": ONE + "{{ (m.content + 'b')|trim }}{% endfor %}",
    "look at a joined text": ONE + "{% set t = 'x' + m.content %}{% if 'xz' in t %}y{% endif %}{% endfor %}",
    "look at a text joined in front": ONE + "{% set t = m.content + 'x' %}{% if 'zx' in t %}y{% endif %}{% endfor %}",
    "look through ~": ONE + "{% set t = 'x' ~ m.content %}{% if 'xz' in t %}y{% endif %}{% endfor %}",
    "look through %": ONE + "{% set t = '%s' % m.content %}{% if 'z' in t %}y{% endif %}{% endfor %}",
    "look through % of several": ONE + "{% set t = '%s%s' % (m.content, 1) %}{{ 'z' in t }}{% endfor %}",
    "look through format": ONE + "{% if 'z' in '{}'.format(m.content) %}y{% endif %}{% endfor %}",
    "look through a block": ONE + "{% set t %}{{ m.content }}{% endset %}{% if 'z' in t %}y{% endif %}{% endfor %}",
    "look through a macro": "{% macro w(t) %}{{ t }}{% endmacro %}" + ONE + "{{ w(m.content)|upper }}{% endfor %}",
    "filtered block": ONE + "{% filter replace('z', 'y') %}{{ m.content }}{% endfilter %}{% endfor %}",
    "filter": ONE + "{{ m.content|upper }}{% endfor %}",
    "filter of a list": "{{ messages|map(attribute='content')|join }}",
    "selection": "{{ messages|selectattr('content', 'equalto', 'z')|list|length }}",
    "selection by truth": "{{ messages|selectattr('content')|list|length }}",
    "json": ONE + "{{ m.content|tojson }}{% endfor %}",
    "json of the chat": "{{ messages|tojson }}",
    "test": ONE + "{{ m.content is upper }}{% endfor %}",
    "iteration": ONE + "{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "change in a loop": ONE + "{{ loop.changed(m.content) }}{% endfor %}",
    "refusal": "{{ raise_exception('no') }}",
    "broken": ONE,
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_a_template_that_looks_at_contents_is_not_filled(look):
    filler, _ = filler_of(LOOKS[look])
    assert filled(filler, chat(["a", "b"]), False) is None


# What templates do with roles, positions and their own variables stays open to them.
OPEN = (
    "{{ bos_token }}{% set ns = namespace(seen=false) %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% else %}{% set system = none %}"
    "{% endif %}{% if system is not none %}{{ 'S: ' + system|trim + '\n' }}{% endif %}{% if tools %}{{ tools|tojson }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.content is string and not m.tool_calls %}"
    "{{ m.role|upper + ': ' + m.get('content').strip() + ('' if loop.last else '\n') }}{% endif %}"
    "{% if 'tool_calls' in m or m.role in ['tool'] %}{% set ns.seen = true %}{% endif %}{% endfor %}"
    "{% if ns.seen %}tools{% endif %} 100 %s {{ messages|length }}{{ date_string }}"
)
FILLERS["open"] = filler_of(OPEN)


@settings(deadline=None, max_examples=30)
@given(st.lists(AWKWARD, min_size=2, max_size=4))
def test_a_template_may_look_at_all_but_contents(contents):
    messages = [{"role": "system", "content": contents[0]}, *chat(contents[1:])]
    filler, plain = FILLERS["open"]
    assert filled(filler, messages, False) == plain(messages, False)


def test_a_template_that_the_plain_way_renders_to_something_else_is_not_filled():
    filler, _ = filler_of(CHATML, lambda messages, prompt: "something else")
    assert filled(filler, chat(["a"]), False) is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a", "name": "Ann"},
        {"content": "a", "role": "user"},
        {"role": "user", "content": ["a"]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
    ],
)
def test_a_message_of_more_than_role_and_text_is_not_plain(message):
    assert not is_plain(message)


def test_messages_with_more_than_role_and_text_are_rendered_with_all_they_have():
    template = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(template)
    named = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    rows = [Row("1", chat(["a", "b"]), "b"), Row("2", named, "b")]
    texts = [script.turns[0].through for _, script in scripts(rows, Data(), tokenizer, Ledger())]
    assert texts == ["user: a<|im_end|>assistant: b<|im_end|>", "Ann: a<|im_end|>assistant: b<|im_end|>"]
