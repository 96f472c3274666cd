"""Convert rows of Arrow to Python's own values.

Arrow has one schema for all rows: an object has the keys of all others at its position, null where it had none. These
nulls are dropped. A null that was written into an object on purpose looks the same and is dropped too. Values of
Arrow's type JSON, in which `datasets` stores objects with different keys, are decoded.
"""

import json
from collections.abc import Callable
from typing import Any

from lora_ft.io import untrusted


def values_of(batch: Any, parse_json: Callable[[str], Any] = json.loads) -> list[dict[str, Any]]:
    """Return the rows of a batch or table.

    Raises ValueError and others for values that Python cannot represent, and the errors of `parse_json`.
    """
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field.type, parse_json))}
    rows = map(untrusted.without_filled_nulls, batch.to_pylist())
    return [{**row, **{name: decode(row[name]) for name, decode in decoders.items()}} for row in rows]


def _decoder(kind: Any, parse_json: Callable[[str], Any]) -> Callable[[Any], Any] | None:
    """Return a function that decodes the values of type JSON inside of a value; None for a type without any."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.JsonType):
        return lambda text: None if text is None else parse_json(text)
    if types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _decoder(field.type, parse_json))}
        return (lambda value: value and _decoded(value, fields)) if fields else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        decode = _decoder(kind.value_type, parse_json)
        return (lambda items: items and [decode(item) for item in items]) if decode else None
    return None


def _decoded(value: dict[str, Any], fields: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {name: fields[name](inner) if name in fields else inner for name, inner in value.items()}
