"""Open a file of rows as bytes: on disk, compressed, or a member of a .zip archive; memory is bounded.

    kind(Path("chat.jsonl.gz"))   ".jsonl": the format, which the suffix before that of a compression names
    open_bytes(file)              a stream of the uncompressed bytes

Members of an archive are read where they are: their names are only names in sources, never paths on this machine.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_ft.data.rows import excerpt
from lora_ft.errors import DataError

File = Path | zipfile.Path
"""A file or folder on disk, or inside of a .zip archive."""

# First bytes of files that are not what their name says, with the reason.
_OTHERS = {
    b"version https://git-lfs.github.com/spec/": "is a pointer of Git LFS, no file: run git lfs pull in its folder",
    b"\x1f\x8b": "is compressed: give it the suffix .gz",
    b"BZh91AY&SY": "is compressed: give it the suffix .bz2",
    b"\xfd7zXZ\0": "is compressed: give it the suffix .xz",
    b"\x28\xb5\x2f\xfd": "is compressed: give it the suffix .zst",
    b"PK\3\4": "is an archive: give it the suffix .zip (and write the sheets of an .xlsx file as .csv)",
}
_LONGEST = max(map(len, _OTHERS))


def kind(file: File) -> str:
    """Return the lower-case suffix of a file's name, without that of a compression."""
    suffixes = [suffix.lower() for suffix in Path(file.name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_bytes(file: File, label: str) -> Iterator[IO[bytes]]:
    """Open a file, decompress it while it is read, and close it. Raises DataError for one that cannot be read."""
    try:
        with _stored(file, label) as stored:
            stream = COMPRESSIONS.get(Path(file.name).suffix.lower(), _as_it_is)(stored)
            head = stream.peek(_LONGEST)[:_LONGEST]
            if reason := next((reason for start, reason in _OTHERS.items() if head.startswith(start)), ""):
                raise DataError(f"{label}: {reason}")
            yield stream
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{label}: cannot be read: {excerpt(error)}") from None
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror or excerpt(error)}") from error


def _stored(file: File, label: str) -> IO[bytes]:
    try:
        return file.open("rb")
    except RuntimeError as error:  # a member with a password, or compressed by a method that zipfile does not know
        raise DataError(f"{label}: cannot be read: {excerpt(error)}") from None


def _as_it_is(stored: IO[bytes]) -> IO[bytes]:
    return stored


def _zstd(stored: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"))


# Functions from the stored stream to one of the uncompressed bytes, which has `peek`.
COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda stored: gzip.GzipFile(fileobj=stored), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile, ".zst": _zstd,
}  # fmt: skip
