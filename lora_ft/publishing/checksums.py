"""SHA256SUMS: the list that makes a folder a package and shows whether it is complete.

    7f83b165...  adapter_config.json             the format of `sha256sum -c SHA256SUMS`
    9a0f1c22...  mlx/adapters.safetensors

A package is complete if every file is listed and every listed file has its checksum.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath

from lora_ft.errors import MismatchError
from lora_ft.io import untrusted

FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MOST_BYTES = 2**20
_WRITTEN_BY_HUB = ".gitattributes"


def is_package(names: set[str]) -> bool:
    """Return whether files with these names were sent by `lora-ft publish`."""
    from lora_ft.adapters.provenance import RECORD  # loads torch, which the destinations do not need otherwise

    return {FILE, RECORD} <= names


def file_names(folder: Path) -> set[str]:
    """Return all files below a folder as POSIX paths; SecurityError for a link that leaves the folder."""
    found = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    for path in found:
        untrusted.check_place(path, folder)
    return {path.relative_to(folder).as_posix() for path in found}


def compute(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder in the order of names, without SHA256SUMS itself."""
    return {name: sha256(folder / name) for name in sorted(file_names(folder) - {FILE, _WRITTEN_BY_HUB})}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(checksums: dict[str, str]) -> str:
    """Return the text of SHA256SUMS for checksums by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items()))


def parse(text: str, source: str) -> dict[str, str]:
    """Return the checksums by name that a text lists; MismatchError for a line of another form or an unsafe path."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match or not _is_safe_path(match[2]):
            raise MismatchError(f"{source}:{number} is not a sha256 and the path of a file below its folder")
        found[match[2]] = match[1]
    return found


def _is_safe_path(text: str) -> bool:
    """Return whether a text is a normalized POSIX path that stays below its folder."""
    path = PurePosixPath(text)
    is_unsafe = path.is_absolute() or ".." in path.parts or path.as_posix() != text or text == "."
    return not is_unsafe and "\\" not in text and text.isprintable()


def read(folder: Path) -> dict[str, str]:
    """Return the checksums that the folder's SHA256SUMS lists; MismatchError if there is none."""
    path = folder / FILE
    if not path.is_file():
        raise MismatchError(f"{folder} has no {FILE}: it is not a package of lora-ft publish, or it is incomplete")
    untrusted.check_place(path, folder)
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise MismatchError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB")
    return parse(data.decode("utf-8", errors="replace"), str(path))


def check(folder: Path) -> dict[str, str]:
    """Return the checksums of a complete folder; MismatchError names missing, unlisted and changed files."""
    listed, found = read(folder), compute(folder)
    changed = {name for name in listed.keys() & found.keys() if listed[name] != found[name]}
    kinds = {"missing": listed.keys() - found.keys(), "not listed": found.keys() - listed.keys(), "changed": changed}
    if problems := [f"{kind}: {', '.join(sorted(names)[:5])}" for kind, names in kinds.items() if names]:
        raise MismatchError(f"{folder} does not match its {FILE}: {'; '.join(problems)}")
    return listed
