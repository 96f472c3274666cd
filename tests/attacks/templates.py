"""Attacks by chat templates, which come with a tokenizer and render every row."""

from tiny import tiny_tokenizer

from attacks import Attack, Paths
from lora_ft import config
from lora_ft.data.chat_template import trials_of, turns
from lora_ft.data.rows import Ledger, Row
from lora_ft.errors import DataError, LoraFtError, SecurityError

_CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def _render(template: str) -> object:
    tokenizer, ledger = tiny_tokenizer(), Ledger()
    tokenizer.chat_template = template
    rows = [Row(f"rows.jsonl:{i}", _CHAT, "4") for i in range(3)]
    rendered = list(turns(rows, config.Data(), tokenizer, ledger, trials_of(tokenizer, config.Data())))
    ledger.raise_bad()
    return rendered


def _attack(name: str, template: str, says: str, error: type[LoraFtError] = SecurityError) -> Attack:
    def run(paths: Paths) -> object:
        return _render(template.replace("CANARY", str(paths.canary)).replace("OUTSIDE", str(paths.outside)))

    return Attack(name, lambda paths: None, run, error, says)


# Jinja's sandbox renders an unsafe attribute as empty text and raises an error only when it is used.
_EMPTY = "changes or drops the answer"
_UNSAFE = "accesses Python internals"
_OS = "__init__.__globals__['__builtins__']['open']('CANARY', 'w')"

ATTACKS = [
    _attack("template: a class", "{{ ''.__class__ }}", _EMPTY, DataError),
    _attack("template: all classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", _UNSAFE),
    _attack("template: globals of a function", f"{{{{ raise_exception.{_OS} }}}}", _UNSAFE),
    _attack("template: globals of a class", f"{{{{ cycler.{_OS} }}}}", _UNSAFE),
    _attack("template: a format", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", _UNSAFE),
    _attack("template: a format of mappings", "{{ '{m.__class__}'.format_map({'m': messages}) }}", _EMPTY, DataError),
    _attack("template: map by attribute", "{{ messages | map(attribute='__class__') | list }}", _EMPTY, DataError),
    _attack("template: code of a function", "{{ raise_exception.__code__.co_consts }}", _UNSAFE),
    _attack("template: changing the chat", "{{ messages.append(messages[0]) }}", _UNSAFE),
    _attack("template: a file", "{% include 'OUTSIDE/model.safetensors' %}", "refuses the row", DataError),
    _attack("template: a recursive macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the row",
            DataError),
    _attack("template: a long range", "{% for i in range(10**9) %}{% endfor %}", "refuses the row", DataError),
    _attack("template: 20,000 nested parentheses", "{{ " + "(" * 20_000 + " }}", "refuses the row", DataError),
    _attack("template: thirty nested loops",
            "".join(f"{{% for a{i} in messages %}}" for i in range(30)) + "{% endfor %}" * 30,
            "refuses the row", DataError),
]  # fmt: skip
