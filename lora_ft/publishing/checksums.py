"""SHA256SUMS: the list of a package's files with their checksums, by which anybody can check that it is complete.

    7f83b165...  adapter_config.json             the format of `sha256sum -c SHA256SUMS`
    9a0f1c22...  mlx/adapters.safetensors

A package is complete if every file is listed and every listed file has its checksum.
"""

import re
from pathlib import Path, PurePosixPath

from lora_ft.errors import MismatchError
from lora_ft.io import untrusted
from lora_ft.io.hashing import sha256

FILE = "SHA256SUMS"
RECORD = "lora_ft.json"  # adapters.provenance.RECORD; importing that module loads torch
WRITTEN_BY_HUB = ".gitattributes"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def is_package(names: set[str]) -> bool:
    """Return True if files with these names were sent by `lora-ft publish`."""
    return {FILE, RECORD} <= names


def file_names(folder: Path) -> set[str]:
    """Return all files below a folder as POSIX paths; raises SecurityError for a link that leads out of the folder."""
    found = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    for path in found:
        untrusted.check_place(path, folder)
    return {path.relative_to(folder).as_posix() for path in found}


def compute(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder in the order of names, without SHA256SUMS itself."""
    return {name: sha256(folder / name) for name in sorted(file_names(folder) - {FILE, WRITTEN_BY_HUB})}


def render(checksums: dict[str, str]) -> str:
    """Return the text of SHA256SUMS for checksums by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items()))


def parse(text: str, source: str) -> dict[str, str]:
    """Return the checksums by name that a text lists; raises MismatchError for an invalid line or an unsafe path."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match or not _is_safe_path(match[2]):
            raise MismatchError(f"{source}:{number} must be a sha256, two spaces and a path below the folder")
        found[match[2]] = match[1]
    return found


def _is_safe_path(text: str) -> bool:
    """Return True for a normalized POSIX path that stays below its folder."""
    path = PurePosixPath(text)
    is_unsafe = path.is_absolute() or ".." in path.parts or path.as_posix() != text or text == "."
    return not is_unsafe and "\\" not in text and text.isprintable()


def read(folder: Path) -> dict[str, str]:
    """Return the checksums that the folder's SHA256SUMS lists; raises MismatchError if the folder has no such file."""
    path = folder / FILE
    if not path.is_file():
        raise MismatchError(f"{folder} has no {FILE}: it is not a package of lora-ft publish, or it is incomplete")
    untrusted.check_place(path, folder)
    return parse(path.read_text("utf-8", errors="replace"), str(path))


def check(folder: Path) -> dict[str, str]:
    """Return the checksums of a complete folder; raises MismatchError for missing, unlisted and changed files."""
    listed, found = read(folder), compute(folder)
    changed = {name for name in listed.keys() & found.keys() if listed[name] != found[name]}
    faults = {"missing": listed.keys() - found.keys(), "not listed": found.keys() - listed.keys(), "changed": changed}
    if problems := [f"{fault}: {', '.join(sorted(names)[:5])}" for fault, names in faults.items() if names]:
        raise MismatchError(f"{folder} does not match its {FILE}: {'; '.join(problems)}")
    return listed
