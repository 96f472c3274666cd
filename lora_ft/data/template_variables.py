"""Variables of a chat template: `data.template.enable_thinking=false`.

check(tokenizer, {"enable_thinking": False})       ConfigError unless the template reads a variable of this name
defaults(template, {"enable_thinking": False})     the same template; where nobody sets the variable it is false

The second is saved with an adapter and with a merged model, so that other programs render the prompts of the training:

    {%- set enable_thinking = enable_thinking if enable_thinking is defined else false -%}{%- if tools %} ...
"""

import copy
import difflib
import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from lora_ft.errors import ConfigError

Variables = Mapping[str, Any]
"""Values by name: true, false, numbers, text or null."""

_ASKS = ("defined", "undefined", "default", "d")  # tests and filters of Jinja
_DEFAULT = re.compile(r'(?:\{%- set (\w+) = \1 if \1 is defined else (?:[\w.+-]+|"(?:[^"\\]|\\.)*") -%\})+')
# Set from the row, by transformers or by this package.
_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt", "kwargs", "self", "loop"))


def read_by(tokenizer: Any) -> set[str]:
    """Return the variables that a tokenizer's chat template reads and that a user may set; {} for a broken template."""
    templates = tokenizer.chat_template or ""
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    taken = (
        _GIVEN | set(tokenizer.special_tokens_map) | set(inspect.signature(tokenizer.apply_chat_template).parameters)
    )
    return {name for text in texts for name in _settable(without_defaults(text))} - taken


@cache
def _settable(template: str) -> frozenset[str]:
    """Return the names that a template reads from its caller.

    A name that the template assigns somewhere is its own, unless it asks whether the caller defined it.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template).environment
        tree = environment.parse(template)
        read = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
    except (jinja2.TemplateError, SyntaxError, RecursionError):
        return frozenset()  # rendering reports it, with the row
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    asked = {node.node.name for node in tree.find_all((nodes.Test, nodes.Filter))
             if node.name in _ASKS and isinstance(node.node, nodes.Name)}  # fmt: skip
    return frozenset(read - (assigned - asked))


def check(tokenizer: Any, variables: Variables) -> None:
    """Raise ConfigError for a variable that the tokenizer's chat template does not read, or that is not the user's."""
    if not variables:
        return
    if not tokenizer.chat_template:
        raise ConfigError(f"data.template.{next(iter(variables))}: the tokenizer has no chat template to set it in")
    read = read_by(tokenizer)
    known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
    for name in variables:
        if name in read:
            continue
        if name in _GIVEN or name in tokenizer.special_tokens_map:
            raise ConfigError(
                f"data.template.{name} is set from the rows and the tokenizer; of other variables {known}"
            )
        near = difflib.get_close_matches(name, read, n=1)
        raise ConfigError(
            f"data.template.{name}: the chat template reads no variable of this name; {known}"
            + (f"; nearest: {near[0]}" if near else "")
        )


def defaults(template: Any, variables: Variables) -> Any:
    """Return a template (or templates by name) in which variables that nobody sets have these values."""
    if isinstance(template, dict):
        return {name: defaults(text, variables) for name, text in template.items()}
    return "".join(map(_default, sorted(variables.items()))) + without_defaults(template) if template else template


def without_defaults(template: Any) -> Any:
    """Return a template (or templates by name) without what `defaults` wrote."""
    if isinstance(template, dict):
        return {name: without_defaults(text) for name, text in template.items()}
    found = _DEFAULT.match(template or "")
    return template[found.end() :] if found else template


def _default(variable: tuple[str, Any]) -> str:
    name, value = variable
    literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return f"{{%- set {name} = {name} if {name} is defined else {literal} -%}}"


def with_defaults(tokenizer: Any, variables: Variables) -> Any:
    """Return a tokenizer whose template has these defaults: the same object if nothing changes."""
    template = defaults(tokenizer.chat_template, variables)
    if template == tokenizer.chat_template:
        return tokenizer
    made = copy.copy(tokenizer)
    made.chat_template = template
    return made
