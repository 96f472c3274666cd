"""dir:PATH: a package as a folder on this machine; the folder is renamed to PATH when it is complete."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import durable
from lora_ft.publishing import checksums

_CHUNK = 2**20


@dataclass(frozen=True)
class Directory:
    """A folder that holds a package, is empty or does not exist yet."""

    path: Path

    @classmethod
    def parse(cls, text: str) -> "Directory":
        if not text:
            raise ConfigError("to=dir: names no folder: write to=dir:PATH")
        return cls(Path(os.path.abspath(os.path.expanduser(text))))  # noqa: PTH100, PTH111  (does not resolve links)

    def check(self, public: bool) -> str:
        if public:
            raise ConfigError(f"public=true applies to to=hf: only; file permissions decide who can read {self.path}")
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise ConfigError(f"to=dir:{self.path} is a link or a file: name a folder or a new path")
        existing = {child.name for child in self.path.iterdir()} if self.path.is_dir() else set()
        if existing and not checksums.is_package(existing):
            raise ConfigError(f"to=dir:{self.path} holds files that are not a package of lora-ft: name another folder")
        if existing and (others := checksums.file_names(self.path) - {checksums.FILE} - {*checksums.read(self.path)}):
            raise ConfigError(
                f"to=dir:{self.path} holds other files than the package that would be replaced, "
                f"{', '.join(sorted(others))}: move them away, or name another folder"
            )
        parent = next(folder for folder in self.path.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ResourceError(f"to=dir:{self.path}: you cannot write to {parent}")
        return f"{self.path} ({'replaces the package there' if existing else 'new'}, readable by every user)"

    def send(self, folder: Path, message: str, public: bool) -> str:
        self.check(public)
        if not (self.path.is_dir() and checksums.compute(self.path) == checksums.compute(folder)):
            copy(folder, self.path)
        return str(self.path)

    def fetch(self, folder: Path, revision: str | None) -> None:
        if not self.path.is_dir():
            raise ResourceError(f"dir:{self.path} does not exist")
        copy(self.path, folder)
        checksums.check(folder)


def copy(source: Path, target: Path) -> None:
    """Copy a folder so that every user may read it; it is renamed to `target` when it is complete."""
    with _readable_by_all(), durable.staged_folder(target) as staging:
        for name in sorted(checksums.file_names(source)):
            durable.make_folder((staging / name).parent)
            durable.write_stream(staging / name, _chunks(source / name))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


@contextlib.contextmanager
def _readable_by_all() -> Iterator[None]:
    # Others load what is published: a server that runs as another user would find no adapter (safetensors issue 782).
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
