"""Read several values of one setting: the texts of a `choice(...)`, and lists where a sweep was meant. No torch here.

data.system=choice(null,Be short.)      two jobs: without a system message, and with "Be short."
data.system=choice(It's (very) fine.)   literal text; with a comma inside, put it into quotes
adapter.r=[2,4]                         ConfigError: a sweep over these values is adapter.r=2,4
"""

import re
from collections.abc import Callable

from lora_ft.errors import ConfigError

_CHOICE = re.compile(r"choice\((?P<values>.*)\)", re.DOTALL)
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"
_LISTED = (r"\[(.*)\]", r"\((.*)\)", r"\{(.*)\}", r"'(.*)'", r'"(.*)"', r"choice\(\[(.*)\]\)")
_SPAN = re.compile(r"(-?\d+)\.\.\.?(-?\d+)")
_FUNCTION = re.compile(r"(range|interval)\(.*\)")


def values_of_choice(value: str) -> list[str] | None:
    """Return the values inside of `choice(...)` as typed, without blanks around them; None for another value."""
    found = _CHOICE.fullmatch(value.strip())
    return _split(found["values"]) if found else None


def translated_choice(values: list[str], is_optional: bool, quoted: Callable[[str], str]) -> str:
    """Return the texts of a `choice(...)` for Hydra, each quoted; `null` stays where the setting is optional.

    The values are separated by commas without choice(), which does not accept null.
    """
    return ",".join(v if v == "null" and is_optional else quoted(_unquoted(v)) for v in values)


def check_single(override: str, key: str, value: str, command: str) -> None:
    """Raise ConfigError if several values were meant for a setting, or a group, that takes one."""
    if meant := _meant(value.strip()):
        sweep = f"a sweep over them is {key}={meant}"
        if command != "sweep":
            sweep = f"lora-ft sweep {key}={meant} trains with each"
        raise ConfigError(f"{override}: {key} takes one value; {sweep}")
    if value.strip().startswith("glob("):
        raise ConfigError(f"{override}: glob() chooses files of a group such as quant; give the values: {key}=1,2")


def _meant(value: str) -> str | None:
    """Return the values as a sweep writes them; None for a value that is not several."""
    if span := _SPAN.fullmatch(value):
        return f"range({span[1]},{int(span[2]) + 1})"
    inner = next((m[1] for pattern in _LISTED if (m := re.fullmatch(pattern, value, re.DOTALL))), None)
    if inner is not None and _FUNCTION.fullmatch(inner.strip()):
        return inner.strip()
    text = value if inner is None else inner
    if re.search(r"[()\[\]{}:'\"]", text):
        return None
    values = [part for part in re.split(r"[,;\s]+", text) if part]
    is_sweep = inner is None and re.fullmatch(r"[^,;\s]+(\s*,\s*[^,;\s]+)*", text.strip())
    return ",".join(values) if len(values) > 1 and not is_sweep else None


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and of quotes around a value."""
    values, start, at, depth = [], 0, 0, 0
    while at < len(text):
        quoted = _QUOTED.match(text, at) if not text[start:at].strip() else None
        if quoted and re.match(r"\s*(,|$)", text[quoted.end() :]):
            at = quoted.end()
            continue
        depth += (text[at] in _OPENING) - (text[at] in _CLOSING and depth > 0)
        if text[at] == "," and not (depth and _closes(text, at)):
            values.append(text[start:at].strip())
            start, depth = at + 1, 0
        at += 1
    return [*values, text[start:].strip()]


def _closes(text: str, at: int) -> bool:
    """Return True if a bracket that was opened before this place is closed after it."""
    return any(character in _CLOSING for character in text[at:])


def _unquoted(value: str) -> str:
    if not (found := _QUOTED.fullmatch(value)):
        return value
    inner = found[1] if found[1] is not None else found[2]
    return re.sub(rf"\\([{value[0]}\\])", r"\1", inner)
