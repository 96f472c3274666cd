"""Cache tokenized rows between runs, by the hash of everything that they depend on.

    ~/.cache/lora_ft/rows/3f9a....safetensors      ids int32 [tokens], supervised uint8 [tokens],
                                                   documents int32 [documents, 5] (data/examples.py)

The key covers the rows, the tokenizer, the template, options, the code of this folder and the versions of libraries. A
damaged file is replaced. A cache that cannot be written is a warning.
"""

import datetime
import hashlib
import json
import logging
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.numpy
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data.columns import Columns, InMemory
from lora_ft.data.examples import Examples
from lora_ft.data.rows import Ledger, Row
from lora_ft.io import durable

log = logging.getLogger(__name__)

_NAMES = ("ids", "supervised", "documents")


def folder() -> Path:
    return durable.cache_folder("rows")


def key(rows: list[Row], tokenizer: Any, data: config.Data) -> str:
    """Return the hexadecimal sha256 of everything that the tokenized rows depend on."""
    digest = hashlib.sha256(_code().encode())
    options = [tokenizer.chat_template, tokenizer.special_tokens_map, data.system, data.train_on.value,
               data.turns.value, data.strict]  # fmt: skip
    if "strftime_now" in str(tokenizer.chat_template):
        options.append(datetime.date.today().isoformat())  # such a template may render today's date
    digest.update(json.dumps(options, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        values = [row.messages, row.answer, row.plain_prompt, sorted(row.context), sorted(row.excluded), row.tools]
        digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Return the hash of this folder's source, and the versions of the libraries that render and tokenize."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    versions = [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return " ".join([digest.hexdigest(), *versions])


def load(name: str, rows: list[Row], ledger: Ledger) -> Examples | None:
    """Load the examples that are stored under a key, and count what was; None if the file is missing or damaged."""
    path = folder() / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in _NAMES}
            about = json.loads(file.metadata()["about"])
            if about["sha256"] != _checksum(*arrays.values()):
                raise ValueError("wrong checksum")
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("damaged row cache, tokenizing again: %s (%s)", path, error)
        return None
    ledger.count(about["left_out"], about["converted"])
    return Examples(InMemory(arrays), [row.source for row in rows])


def store(name: str, stored: Columns, ledger: Ledger) -> None:
    """Store the columns of examples under a key, with counts. Logs a warning if the folder cannot be written."""
    arrays = {name: stored.read(name, 0, stored.count(name)) for name in _NAMES}
    try:
        durable.make_folder(folder())
        # One entry: safetensors writes several in any order, and equal rows should give equal files.
        counts = {"left_out": ledger.left_out, "converted": ledger.converted}
        about = json.dumps({"sha256": _checksum(*arrays.values()), **counts})
        data = safetensors.numpy.save(arrays, {"about": about})
        durable.write_bytes(folder() / f"{name}.safetensors", data)
    except OSError as error:
        log.warning("rows are not cached: %s", error)


def _checksum(*arrays: NDArray[Any]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
