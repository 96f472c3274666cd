"""Tokenized rows kept between runs, under the hash of everything they are made from.

    ~/.cache/lora_ft/rows/3f9a....safetensors      ids int32 [tokens], supervised uint8 [tokens],
                                                   bounds int64 [documents, 4]: row, length, prompt_end, answer_start

Rows, tokenizer, template, options, this folder's code and the versions of the libraries enter the key: a change of
any is a miss. A damaged file is made again; a cache that cannot be written costs a warning.
"""

import datetime
import hashlib
import json
import logging
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data.rows import Example, Row
from lora_ft.io import durable

log = logging.getLogger(__name__)


def folder() -> Path:
    return durable.cache_folder("rows")


def key(rows: list[Row], tokenizer: Any, data: config.Data) -> str:
    """Hexadecimal sha256 of all that the tokenized rows depend on."""
    digest = hashlib.sha256(_code().encode())
    options = [tokenizer.chat_template, tokenizer.special_tokens_map, data.system, data.train_on.value]
    if "strftime_now" in str(tokenizer.chat_template):
        options.append(datetime.date.today().isoformat())  # what such a template renders is good for a day
    digest.update(json.dumps(options, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        values = [row.messages, row.answer, row.plain_prompt, sorted(row.context), sorted(row.excluded), row.tools]
        digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """This folder's source and the versions of the libraries that render and tokenize."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    versions = [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return " ".join([digest.hexdigest(), *versions])


def load(name: str, rows: list[Row]) -> list[Example] | None:
    """Load the examples of rows that are stored under a key; None if there are none, or none that verify."""
    path = folder() / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            ids, supervised, bounds = (file.get_tensor(n) for n in ("ids", "supervised", "bounds"))
            intact = file.metadata()["sha256"] == _checksum(ids, supervised, bounds)
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        log.warning("cached rows are damaged and made again: %s (%s)", path, error)
        return None
    if not intact:
        log.warning("cached rows are damaged and made again: %s (checksum)", path)
        return None
    ends = np.cumsum(bounds[:, 1])
    return [
        Example(
            ids[end - length : end],
            supervised[end - length : end].astype(np.bool_),
            rows[row].source,
            row,
            prompt_end,
            answer_start,
        )
        for end, (row, length, prompt_end, answer_start) in zip(ends.tolist(), bounds.tolist(), strict=True)
    ]


def store(name: str, examples: list[Example]) -> None:
    """Keep examples under a key; a folder that cannot be written costs a warning."""
    ids = np.concatenate([d.ids for d in examples])
    supervised = np.concatenate([d.supervised for d in examples]).astype(np.uint8)
    bounds = np.array([(d.row, len(d.ids), d.prompt_end, d.answer_start) for d in examples], dtype=np.int64)
    arrays = {"ids": (ids, "I32"), "supervised": (supervised, "U8"), "bounds": (bounds, "I64")}
    specs = [durable.TensorSpec(n, code, array.shape, array.nbytes) for n, (array, code) in arrays.items()]
    buffers = [array.tobytes() for array, _ in arrays.values()]
    try:
        durable.make_folder(folder())
        durable.write_tensors(
            folder() / f"{name}.safetensors", specs, buffers, {"sha256": _checksum(ids, supervised, bounds)}
        )
    except OSError as error:
        log.warning("rows are not cached: %s", error)


def _checksum(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
