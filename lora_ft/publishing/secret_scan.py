"""Search a package for private data before it is sent.

    check(folder, {"/home/me/models/tiny"})
    SecurityError: tokenizer_config.json holds what looks like a secret (Hugging Face token): nothing was sent

Only files with known names may be sent, and only without secrets and paths of this machine. The search covers whole
text files, the header of a safetensors file and the metadata of a GGUF file. The error names the file and the type of
the secret, never the secret.
"""

import fnmatch
import struct
from collections.abc import Iterator
from pathlib import Path

from lora_ft.errors import SecurityError
from lora_ft.io import redact
from lora_ft.models.gguf import reader
from lora_ft.publishing import checksums

_ALLOWED = (
    "adapter_config.json", "adapter_model.safetensors", "lora_ft.json", "probe.safetensors", "README.md", "SHA256SUMS",
    "loss.png", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "adapter.gguf", "mlx/adapters.safetensors", "mlx/adapter_config.json",
)  # fmt: skip


def check(folder: Path, local_paths: set[str]) -> None:
    """Raise SecurityError if the package has an unexpected file, a secret, or the name of one of `local_paths`."""
    for name in sorted(checksums.file_names(folder)):
        file = folder / name
        if not any(_matches(name, pattern) for pattern in _ALLOWED):
            raise SecurityError(f"{name} is not a file that a published adapter may have: nothing was sent")
        for text in _texts(file):
            if kind := redact.held(text):
                raise SecurityError(f"{name} holds what looks like a secret ({kind}): nothing was sent")
            if any(path in text for path in local_paths):
                raise SecurityError(f"{name} names a folder or file of this machine: nothing was sent")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            yield file.read(length).decode("utf-8", errors="replace")
    elif path.suffix == ".gguf":
        found = reader.read(path)
        yield "\n".join(_strings([*found.metadata.items(), *found.tensors]))
    else:
        yield path.read_text("utf-8", errors="replace")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _strings(child)


def local_paths(*paths: str | Path | None) -> set[str]:
    """Return the absolute paths among the given ones, the home folder and the current folder, resolved and as given.

    A path with one part (/root, /tmp) is skipped, because a vocabulary may hold it as a word.
    """
    known = [path for given in (*paths, Path.home(), Path.cwd()) if given and (path := Path(given)).is_absolute()]
    return {str(form) for path in known for form in (path, path.resolve()) if len(form.parts) > 2}
