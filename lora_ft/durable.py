"""Every write of the project: complete under its name, or not there. No torch here.

A file is written under a temporary name, fsynced, renamed, and its folder fsynced, so that neither a
crash nor a full disk leaves half of it under the name that a reader looks for:

    write NAME.tmp-XXXX -> fsync -> rename to NAME -> fsync the folder

A folder is staged the same way as a whole (`staged_folder`). Modes follow the umask: safetensors' own
writer leaves 0600 and does not fsync (safetensors issue 782), which is why nothing here uses it.
A place that cannot be written, or is full, is a `WriteError`: a message to the user, an OSError to those who catch one.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
            errno.ENAMETOOLONG}  # fmt: skip


class TensorSpec(NamedTuple):
    """Name, safetensors dtype code (F32, BF16, ...), shape and size in bytes of a tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


Buffer = bytes | bytearray | memoryview


class WriteError(ResourceError, OSError):
    """A file or folder that cannot be written, for a reason that lies with the place."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@contextlib.contextmanager
def writing(path: Path | None = None, reasons: set[int] = _FULL | _REFUSED) -> Iterator[None]:
    """Turn an OSError of these reasons into a WriteError that names `path`, or the place the error names."""
    try:
        yield
    except OSError as error:
        place = path or error.filename
        if error.errno not in reasons or isinstance(error, WriteError) or not place:
            raise
        raise WriteError(error.errno, error.strerror, str(place)) from error


def cache_folder(kind: str) -> Path:
    """The user's folder for files of this kind that can be made again; XDG_CACHE_HOME moves it."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (home if home.is_absolute() else Path.home() / ".cache") / "lora_ft" / kind


def write_bytes(path: Path, data: Buffer) -> None:
    """Write a whole file atomically; an existing one is replaced, a link under the name is not followed."""
    write_stream(path, [data])


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with two spaces and a last newline; NaN and infinities are refused (they are no JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_stream(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a file atomically from buffers that are held one at a time."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            with open(descriptor, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the reason above counts, not that nothing is there to delete
                os.unlink(temporary)
            raise
        _fsync_folder(path.parent)


def write_tensors(path: Path, specs: list[TensorSpec], buffers: Iterable[Buffer], metadata: dict[str, str]) -> None:
    """Write a safetensors file from buffers in the order of `specs`, holding one buffer at a time.

    Format: eight bytes of header length, a JSON header padded with spaces to a multiple of eight,
    then the raw little-endian tensors (https://github.com/huggingface/safetensors, README).
    Raises ValueError where a buffer's size is not the one its spec declares.
    """
    write_stream(path, _tensor_file(specs, buffers, metadata))


def _tensor_file(specs: list[TensorSpec], buffers: Iterable[Buffer], metadata: dict[str, str]) -> Iterator[Buffer]:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for spec, buffer in zip(specs, buffers, strict=True):
        if memoryview(buffer).nbytes != spec.num_bytes:
            raise ValueError(f"{spec.name}: {memoryview(buffer).nbytes} bytes where {spec.num_bytes} were declared")
        yield buffer


def append_line(path: Path, line: str) -> None:
    """Append one line to a log of lines; a reader sees it at once, a crash can cut only the last line."""
    append_bytes(path, line.encode("utf-8") + b"\n")


def append_bytes(path: Path, data: Buffer) -> None:
    """Append a record to a file that readers follow while it grows (metrics, event files)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with writing(path), open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Make a folder and its parents; existing ones are left as they are."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without an error.

    An existing folder under the name is replaced only then. Library writers (tokenizers, processors)
    write here; their files are fsynced, and given modes by the umask, before the rename.
    """
    make_folder(path.parent)
    staging = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path):
        staging.mkdir()
    try:
        with writing(path, _FULL):  # whoever writes here reads as well: what it does not find is no matter of the place
            yield staging
        with writing(path):
            _settle(staging)
            _replace_folder(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _fsync_folder(path.parent)


def _settle(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY | os.O_NOFOLLOW)
            os.fchmod(descriptor, 0o666 & ~mask)
            os.fsync(descriptor)
            os.close(descriptor)
        _fsync_folder(Path(root))


def _replace_folder(staging: Path, path: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    # A folder cannot be renamed over a full one: move the old one aside first, so that a complete
    # folder exists under one of the two names at every moment.
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    path.rename(old)
    staging.rename(path)
    shutil.rmtree(old)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
