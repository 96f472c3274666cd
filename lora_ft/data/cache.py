"""Cache tokenized rows between runs, by the hash of everything that they depend on.

    ~/.cache/lora_ft/rows/3f9a....safetensors      ids int32 [tokens], supervised uint8 [tokens],
                                                   documents int32 [documents, 5] (data/examples.py)

The key covers the rows, the tokenizer, the template, options, the code of this folder and the versions of libraries. A
damaged file is replaced. A cache that cannot be written is a warning. Files that no run has read for a month are
removed when a file is added, and the oldest ones beyond 20 GB.
"""

import datetime
import hashlib
import json
import logging
import struct
import time
from collections import Counter
from functools import cache
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from lora_ft import config
from lora_ft.data import columns
from lora_ft.data.columns import Columns
from lora_ft.io import durable

log = logging.getLogger(__name__)

_UNUSED_SECONDS = 30 * 86400
_LEFT_OVER_SECONDS = 86400  # of temporary files of a process that was killed
_MOST_BYTES = 20 << 30


def folder() -> Path:
    return durable.cache_folder("rows")


def key(rows: str, tokenizer: Any, data: config.Data) -> str:
    """Return the hexadecimal sha256 of everything that the tokenized rows depend on; `rows` is the rows' own digest."""
    digest = hashlib.sha256(_code().encode())
    options = [rows, tokenizer.chat_template, tokenizer.special_tokens_map, data.system, data.train_on.value,
               data.turns.value, data.template, str(data.train_on_thoughts).lower(), data.strict]  # fmt: skip
    if "strftime_now" in str(tokenizer.chat_template):
        options.append(datetime.date.today().isoformat())  # such a template may render today's date
    digest.update(json.dumps(options, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Return the hash of this folder's source, and the versions of the libraries that render and tokenize."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    versions = [packages.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return " ".join([digest.hexdigest(), *versions])


def load(name: str) -> tuple[Columns, dict[str, Counter[str]]] | None:
    """Open the columns that are stored under a key, with the counts stored beside; None if missing or damaged."""
    path = folder() / f"{name}.safetensors"
    try:
        stored, metadata = columns.load(path)
        about = json.loads(metadata["about"])
        if about["sha256"] != columns.checksum(stored):
            raise ValueError("wrong checksum")
        counts = {name: Counter(found) for name, found in about["counts"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        log.warning("damaged row cache, tokenizing again: %s (%s)", path, error)
        return None
    durable.mark_used(path)
    return stored, counts


def store(name: str, stored: Columns, counts: dict[str, Counter[str]]) -> None:
    """Store the columns of examples under a key, with counts of rows. Logs a warning if it cannot."""
    path = folder() / f"{name}.safetensors"
    try:
        durable.make_folder(folder())
        about = {"sha256": columns.checksum(stored), "counts": counts}
        columns.save(path, stored, {"about": json.dumps(about)})
        _prune(path)
    except OSError as error:
        log.warning("rows are not cached: %s", error)


def _prune(new: Path) -> None:
    """Remove files that were not used for a month, then the oldest until the others take at most _MOST_BYTES."""
    found = sorted(((path.stat(), path) for path in folder().iterdir() if path != new), key=lambda f: -f[0].st_mtime)
    total, now = new.stat().st_size, time.time()
    for stat, path in found:
        total += stat.st_size
        is_left_over = durable.final_name(path.name) != path.name
        if now - stat.st_mtime > (_LEFT_OVER_SECONDS if is_left_over else _UNUSED_SECONDS) or total > _MOST_BYTES:
            durable.remove(path)
