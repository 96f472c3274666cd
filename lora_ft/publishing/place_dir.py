"""dir:PATH: a package as a folder of this machine, under its name when it is whole."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import durable
from lora_ft.publishing import sums

_CHUNK = 2**20


@dataclass(frozen=True)
class Directory:
    """A folder that holds a package, or nothing, or is not there yet."""

    path: Path

    @classmethod
    def parse(cls, text: str) -> "Directory":
        if not text:
            raise ConfigError("to=dir: lacks the folder: to=dir:PATH")
        return cls(Path(os.path.abspath(os.path.expanduser(text))))  # noqa: PTH100, PTH111  (as rules.locate_paths)

    def check(self, public: bool) -> str:
        if public:
            raise ConfigError(
                f"public=true is for hf: places; who reads {self.path} is decided by the folders above it"
            )
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise ConfigError(f"to=dir:{self.path} is a link or a file: name a folder, or one that is not there yet")
        there = {child.name for child in self.path.iterdir()} if self.path.is_dir() else set()
        if there and not sums.is_package(there):
            raise ConfigError(
                f"to=dir:{self.path} holds files, and is no package that lora-ft published: name another folder"
            )
        if there and (others := sums.names(self.path) - {sums.SUMS} - sums.read(self.path).keys()):
            raise ConfigError(
                f"to=dir:{self.path} holds a package, which would be replaced as a whole, and beside it "
                f"{', '.join(sorted(others))}: take this out, or name another folder"
            )
        above = next(folder for folder in self.path.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ResourceError(f"to=dir:{self.path}: {above} is no folder that you may write to")
        return f"{self.path} ({'replaces the package there' if there else 'new'}, readable for all who reach it)"

    def send(self, folder: Path, message: str, public: bool) -> str:
        self.check(public)
        if not (self.path.is_dir() and sums.measured(self.path) == sums.measured(folder)):
            copy(folder, self.path)
        return str(self.path)

    def fetch(self, folder: Path, revision: str | None) -> None:
        if not self.path.is_dir():
            raise ResourceError(f"dir:{self.path}: there is no such folder")
        copy(self.path, folder)
        sums.check(folder)


def copy(source: Path, target: Path) -> None:
    """Copy every file of a folder; the copy has its name when it is whole, and all may read it."""
    with _readable_for_all(), durable.staged_folder(target) as staging:
        for name in sorted(sums.names(source)):
            durable.make_folder((staging / name).parent)
            durable.write_stream(staging / name, _chunks(source / name))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


@contextlib.contextmanager
def _readable_for_all() -> Iterator[None]:
    # What is published is for others; a server that runs as another user would find no adapter (vllm, safetensors 782).
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
