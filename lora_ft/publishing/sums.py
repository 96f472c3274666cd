"""SHA256SUMS: what makes a folder a package, and lets anybody tell whether it is whole.

    7f83b165...  adapter_config.json             as `sha256sum -c SHA256SUMS` reads it
    9a0f1c22...  mlx/adapters.safetensors

A package is complete where every file is listed and every listed file is there with its sum.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath

from lora_ft.errors import MismatchError
from lora_ft.io import untrusted

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MOST_BYTES = 2**20
_OF_THE_HUB = ".gitattributes"


def is_package(names: set[str]) -> bool:
    """Whether files of these names are what `lora-ft publish` sends."""
    from lora_ft.adapters.provenance import RECORD  # loads torch, which a place has no need of otherwise

    return {SUMS, RECORD} <= names


def is_name(text: str) -> bool:
    """Whether a text is the POSIX path of a file below a folder, written in the one way there is."""
    path = PurePosixPath(text)
    odd = path.is_absolute() or ".." in path.parts or path.as_posix() != text or text == "."
    return not odd and "\\" not in text and text.isprintable()


def names(folder: Path) -> set[str]:
    """Files of a folder and the folders in it, as POSIX paths; SecurityError for one that leads out of it."""
    found = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    for path in found:
        untrusted.check_place(path, folder)
    return {path.relative_to(folder).as_posix() for path in found}


def measured(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder by name, but of the sums themselves; in the order of names."""
    return {name: sha256(folder / name) for name in sorted(names(folder) - {SUMS, _OF_THE_HUB})}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(sums: dict[str, str]) -> str:
    """The text of the file for sums by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def parse(text: str, place: str) -> dict[str, str]:
    """The sums by name that a text lists; MismatchError where it is no list of sums of files below its folder."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match or not is_name(match[2]):
            raise MismatchError(f"{place}:{number} is not a sha256 and the name of a file below its folder")
        found[match[2]] = match[1]
    return found


def read(folder: Path) -> dict[str, str]:
    """What the folder's own list says; MismatchError where it has none."""
    path = folder / SUMS
    if not path.is_file():
        raise MismatchError(f"{folder} has no {SUMS}: it is no package that lora-ft publish made, or not whole")
    untrusted.check_place(path, folder)
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise MismatchError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB")
    return parse(data.decode("utf-8", errors="replace"), str(path))


def check(folder: Path) -> dict[str, str]:
    """The sums of a folder that is whole; MismatchError names what is missing, not listed, or has other bytes."""
    listed, found = read(folder), measured(folder)
    problems = [
        f"{what} {', '.join(files[:5])}"
        for what, files in (
            ("missing", sorted(listed.keys() - found.keys())),
            ("not listed", sorted(found.keys() - listed.keys())),
            ("of other bytes", sorted(name for name in listed.keys() & found.keys() if listed[name] != found[name])),
        )
        if files
    ]
    if problems:
        raise MismatchError(f"{folder} is not what its {SUMS} says: {'; '.join(problems)}")
    return listed
