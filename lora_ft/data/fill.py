r"""Chat templates that only copy contents are rendered once for each shape of chat, and then filled in.

    ("user", "assistant")  ->  "<|im_start|>user\n" 0 "<|im_end|>\n<|im_start|>assistant\n" 1 "<|im_end|>\n"

Whether a template only copies is found by rendering it with contents that may be joined, stripped at both ends and
written, and that note anything else which is done with them: a length, a comparison, a search, a filter. A template
that looks at contents (Qwen3 searches them for </think>) is left to the plain way, which takes several times as long.
The probe is rendered under Jinja's sandbox, as transformers renders.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from lora_ft.data.rows import Message

Render = Callable[[list[Message], bool], str]
Fill = Callable[[list[str]], str]

# Private-use characters around the number of a message; an s behind it: without blanks at both ends.
_HOLE = re.compile("\ue000([0-9]+)(s?)\ue001")
# All that a template might change on its way out: blanks around, quotes, escapes, markup, format signs, other scripts.
_TRYING = "\u2003\n<b>&amp;{} \\n\t\"'%s {{{{ }}}} é你👋 </s>\r\n "

# What reads no text: these look at types, at numbers, or at the length and order of the messages.
_FILTERS = frozenset(("trim", "length", "count", "first", "last", "list", "reverse", "selectattr", "rejectattr"))
_TESTS = frozenset(("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "number"))
_GLOBALS = ("namespace", "dict", "range", "raise_exception")
# These make plain text of what they join, and what happens to it next would go unseen.
_JOINS = (nodes.Concat, nodes.AssignBlock, nodes.FilterBlock)


class Filler:
    """Texts of chats, each shape rendered once; `render` is the plain way, which settles what a text has to be."""

    def __init__(self, template: str, variables: dict[str, Any], render: Render) -> None:
        self._render, self._variables = render, variables
        self._probe = _probe_template(template)
        self._shapes: dict[tuple[tuple[str, ...], bool], Fill | None] = {}

    def text(self, roles: tuple[str, ...], contents: list[str], generation_prompt: bool) -> str | None:
        """The text of a chat of plain messages; None where the template needs the plain way."""
        shape = (roles, generation_prompt)
        if shape not in self._shapes:
            self._shapes[shape] = self._form(roles, generation_prompt)
        fill = self._shapes[shape]
        return fill(contents) if fill else None

    def _form(self, roles: tuple[str, ...], generation_prompt: bool) -> Fill | None:
        if self._probe is None:
            return None
        trying = [_TRYING.format(i) for i in range(len(roles))]
        try:
            written = self._probe.render(
                messages=_chat(roles, [_Opaque(f"\ue000{i}\ue001") for i in range(len(roles))]),
                tools=None, documents=None, add_generation_prompt=generation_prompt, **self._variables,
            )  # fmt: skip
            expected = self._render(_chat(roles, trying), generation_prompt)
        except (_Inspected, jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, SyntaxError,
                RecursionError):  # fmt: skip
            return None
        fill = _filling(written)
        return fill if fill(trying) == expected else None


def _chat(roles: tuple[str, ...], contents: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def is_plain(message: Message) -> bool:
    """Whether a message is a role and a text, in this order, and nothing else that a template might show."""
    return [*message] == ["role", "content"] and type(message["content"]) is str and type(message["role"]) is str


def _filling(written: str) -> Fill:
    literals, holes = _HOLE.split(written)[::3], [(int(m[1]), bool(m[2])) for m in _HOLE.finditer(written)]
    form = "%s".join(literal.replace("%", "%%") for literal in literals)
    return lambda contents: form % tuple([contents[i].strip() if strip else contents[i] for i, strip in holes])


class _Inspected(Exception):
    """A template did more with a content than to write it."""


class _Opaque(str):
    """Text that may be joined and written, and stripped while it is a content and no more."""

    __slots__ = ()

    def __add__(self, other: str) -> "_Opaque":
        return _Opaque(str.__add__(self, other))

    def __radd__(self, other: str) -> "_Opaque":
        return _Opaque(str.__add__(other, self))

    def strip(self, characters: str | None = None, /) -> "_Opaque":
        hole = _HOLE.fullmatch(self)
        if hole is None or characters is not None:
            raise _Inspected
        return _Opaque(f"\ue000{hole[1]}s\ue001")


def _inspected(*args: Any, **kwargs: Any) -> Any:
    raise _Inspected


# str() of it is how Jinja writes, and gives plain text.
for _name in vars(str).keys() - vars(_Opaque).keys() - {"__new__", "__str__", "__getattribute__"}:
    setattr(_Opaque, _name, _inspected)


def _probe_template(template: str) -> jinja2.Template | None:
    """The template under transformers' own environment, watched; None where its text shows that it cannot be."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    environment = _cached_compile_jinja_template("").environment
    environment.intercepted_binops = frozenset("%")
    environment.call_binop = _watched_operator(environment.call_binop)
    try:
        if any(_unwatched(environment.parse(template))):
            return None
        probe = environment.from_string(template)
    except (jinja2.TemplateError, SyntaxError, RecursionError):
        return None
    for table, allowed in ((environment.filters, _FILTERS), (environment.tests, _TESTS)):
        table.update({name: _watched(function) for name, function in table.items() if name not in allowed})
    environment.call = _watched_call(environment)
    environment.getitem = _watched_look_up(environment.getitem)
    return probe


def _unwatched(parsed: nodes.Template) -> Iterator[nodes.Node]:
    """What of a template could read a content without the content noticing."""
    yield from parsed.find_all(_JOINS)
    for comparison in parsed.find_all(nodes.Compare):
        # `content in "some text"` asks the text, which does not tell; a list asks its items.
        for left, operand in zip([comparison.expr, *(o.expr for o in comparison.ops)], comparison.ops, strict=False):
            listed = isinstance(operand.expr, nodes.List | nodes.Tuple)
            if operand.op in ("in", "notin") and not isinstance(left, nodes.Const) and not listed:
                yield comparison


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that sees numbers and plain text only; lists may hold contents."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not all(type(value) in (str, int, float, bool, type(None)) for value in (*args, *kwargs.values())):
            raise _Inspected
        return function(*args, **kwargs)

    return watched


def _watched_operator(operate: Callable[..., Any]) -> Callable[..., Any]:
    def watched(context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int) and isinstance(right, int)):  # "%s" % content
            raise _Inspected
        return operate(context, operator, left, right)

    return watched


def _watched_look_up(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def watched(value: Any, key: Any) -> Any:
        if isinstance(key, _Opaque):  # where a value takes no such key, Jinja reads the text and looks for an attribute
            raise _Inspected
        return look_up(value, key)

    return watched


def _watched_call(environment: Any) -> Callable[..., Any]:
    """Calls of dictionaries' methods, of strip, and of what stores, counts or raises; others might read contents."""
    call, known = environment.call, [environment.globals[name] for name in _GLOBALS]

    def watched(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(getattr(function, "__self__", None), dict | _Opaque) or any(function is g for g in known)):
            raise _Inspected
        return call(context, function, *args, **kwargs)

    return watched
