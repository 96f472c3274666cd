"""What may leave: files of known names and sizes, without a secret and without a path of this machine.

    check(folder, {"/home/me/models/tiny"})
    SecurityError: tokenizer_config.json holds what looks like a secret (Hugging Face token): nothing was sent

Everything in a package is searched that a person could have put a text into: whole text files, the header of a
safetensors file, the metadata of a GGUF file. What is found is named by file and kind, never shown.
"""

import fnmatch
import struct
from collections.abc import Iterator
from pathlib import Path

from lora_ft.errors import SecurityError
from lora_ft.io import redact
from lora_ft.models import gguf
from lora_ft.publishing import sums

TEXT_BYTES = 64 * 2**20  # the largest tokenizers have 35 MB
WEIGHTS_BYTES = 16 * 2**30

_WEIGHTS = (".safetensors", ".gguf")
_ALLOWED = (
    "adapter_config.json", "adapter_model.safetensors", "lora_ft.json", "probe.safetensors", "README.md", "SHA256SUMS",
    "loss.png", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "adapter.gguf", "mlx/adapters.safetensors", "mlx/adapter_config.json",
)  # fmt: skip


def check(folder: Path, places: set[str]) -> None:
    """Search a package before it is sent; `places` are paths of this machine that nothing may name.

    Raises SecurityError, which names the file and what kind of thing it holds.
    """
    for name in sorted(sums.names(folder)):
        path = folder / name
        if not any(_matches(name, pattern) for pattern in _ALLOWED):
            raise SecurityError(f"{name} is no file of a published adapter: nothing was sent")
        most, size = (WEIGHTS_BYTES if path.suffix in _WEIGHTS else TEXT_BYTES), path.stat().st_size
        if size > most:
            raise SecurityError(f"{name} has {size:,} bytes, more than the {most:,} of its kind: nothing was sent")
        for text in _texts(path):
            if kind := redact.held(text):
                raise SecurityError(f"{name} holds what looks like a secret ({kind}): nothing was sent")
            if any(place in text for place in places):
                raise SecurityError(f"{name} names a folder or file of this machine: nothing was sent")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            yield file.read(length).decode("utf-8", errors="replace")
    elif path.suffix == ".gguf":
        found = gguf.read(path)
        yield "\n".join(_strings([*found.metadata.items(), *found.tensors]))
    else:
        yield path.read_text("utf-8", errors="replace")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _strings(child)


def local_places(*paths: str | Path | None) -> set[str]:
    """Those of the given paths that are absolute, the home folder and the current one, where they are telling.

    A path of one part (/root, /tmp) is a word that any vocabulary may hold.
    """
    known = [path for given in (*paths, Path.home(), Path.cwd()) if given and (path := Path(given)).is_absolute()]
    return {str(place) for path in known for place in (path, path.resolve()) if len(place.parts) > 2}
