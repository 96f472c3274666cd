"""Read values of rows that are JSON in a text, or that are numbers where text is meant.

    decoded("tools", '[{"name": "add"}]')      ->  [{"name": "add"}]
    as_text("output", 7, ledger)               ->  "7"

Functions raise RowError, which names the wrong column, message or key.
"""

import json
import math

from lora_ft.data.files import parse_json
from lora_ft.data.rows import Ledger, RowError

_STRICT_JSON = json.JSONEncoder(allow_nan=False, default=str)  # built once: json.dumps builds one for each message


def decoded(name: str, text: str) -> object:
    """Return the value of a JSON text."""
    try:
        found = parse_json(text)
    except json.JSONDecodeError as error:
        raise RowError(name, f"is not JSON: {error.msg} at character {error.pos + 1}", text) from None
    except RowError as error:
        raise RowError(name, str(error), text) from None
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(name, "holds half of a surrogate pair, which is not a character", text) from None
    return found


def as_text(name: str, value: object, ledger: Ledger) -> object:
    """Return the JSON text of a number, of true or of false, and count it; any other value is returned unchanged.

    A decimal that is whole has two meanings, since pandas stores integers as decimals beside empty cells.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(name, f"must be text or a finite number, got {value}")
    if isinstance(value, float) and value.is_integer():
        reason = (
            f"{value} may be a decimal, or an integer that pandas stored beside empty cells: store text or integers, "
            "or take the decimal by data.prompt and data.answer"
        )
        raise RowError(name, reason)
    if isinstance(value, bool | int | float):
        ledger.convert(name, "numbers, true or false read as text", value)
        return json.dumps(value)
    return value


def check_finite(name: str, value: object) -> None:
    """Raise RowError for NaN and infinities: a template would write them as JSON, and the model would learn that."""
    try:
        _STRICT_JSON.encode(value)
    except ValueError:
        raise RowError(name, "must not contain NaN or Infinity, which JSON does not have", value) from None


def type_name(value: object) -> str:
    """Return the type of a value in the words of JSON."""
    name = type(value).__name__
    return {"NoneType": "null", "str": "text", "dict": "object"}.get(name, name)
