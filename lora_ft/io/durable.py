"""All writes of lora_ft: atomic and durable. No torch here.

A file is written under a temporary name, fsynced and renamed, and its folder is fsynced, so neither a crash nor a full
disk leaves a partial file under the final name:

    write NAME.tmp-XXXX -> fsync -> rename to NAME -> fsync the folder

A folder is written the same way (`write_files`, or `staged_folder` for files written by libraries). Modes follow the
umask. safetensors' own writer is not used: it creates files with mode 0600 and does not fsync (safetensors issue 782).
A disk that is full, broken or read-only raises WriteError, which is both a message to the user and an OSError.

Every disk operation is a call of a function of `os`, so that tests can end the process at each of them (tests/faults).
`clear_leftovers` removes the temporary files of a process that was killed.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.errors import ResourceError
from lora_ft.io.redact import redact

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {errno.EIO}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
            errno.ELOOP, errno.ENAMETOOLONG}  # fmt: skip
_BEAT_BYTES = 4096
_GATHERED = 1 << 20  # bytes of small buffers that are written together
_LEFTOVER = re.compile(r"(?:\.(?P<folder>.+)\.(?:tmp|old)|(?P<file>.+)\.tmp)-[0-9a-f]{8}")


class TensorSpec(NamedTuple):
    """Name, safetensors dtype code (F32, BF16, ...), shape and size in bytes of a tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


Buffer = bytes | bytearray | memoryview


class WriteError(ResourceError, OSError):
    """A file or folder that cannot be written because of the disk, its permissions or its path."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@contextlib.contextmanager
def writing(
    path: Path | None = None, reasons: set[int] = _FULL | _BROKEN | _REFUSED, num_bytes: int | None = None
) -> Iterator[None]:
    """Convert an OSError with one of these reasons to a WriteError that names `path`, or the path of the error.

    For a full disk, the message includes the free bytes, and the needed ones if `num_bytes` is given.
    """
    try:
        yield
    except OSError as error:
        target = path or error.filename
        if error.errno not in reasons or isinstance(error, WriteError) or not target:
            raise
        reason = error.strerror
        if error.errno in _FULL:
            needed = "" if num_bytes is None else f"{num_bytes:,} bytes needed, "
            reason = f"{reason} ({needed}{free_bytes(Path(target).parent):,} free)"
        raise WriteError(error.errno, reason, str(target)) from error


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def cache_folder(kind: str) -> Path:
    """Return the cache folder for files of this kind: below XDG_CACHE_HOME, or below ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification ignores a relative path.
    if home.is_absolute():
        return home / "lora_ft" / kind
    try:
        return Path.home() / ".cache" / "lora_ft" / kind
    except RuntimeError:  # a user without a home, as in containers: nothing can be cached
        return Path(os.devnull) / "lora_ft" / kind


def write_bytes(path: Path, data: Buffer) -> None:
    """Write a file atomically; an existing file or link of that name is replaced."""
    write_stream(path, [data], memoryview(data).nbytes)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with secrets of the environment redacted."""
    write_bytes(path, redact(text).encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two; raises ValueError for NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_stream(path: Path, chunks: Iterable[Buffer], num_bytes: int | None = None) -> None:
    """Write a file atomically from buffers, held one at a time; `num_bytes` is for the message of a full disk."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path, num_bytes=num_bytes):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            try:
                _write_chunks(descriptor, chunks)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error matters
                os.unlink(temporary)
            raise
        _fsync_folder(path.parent)


def _write_all(descriptor: int, data: Buffer) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_chunks(descriptor: int, chunks: Iterable[Buffer]) -> None:
    gathered = bytearray()
    for chunk in chunks:
        if len(gathered) + memoryview(chunk).nbytes <= _GATHERED:
            gathered += memoryview(chunk).cast("B")
        else:
            _write_all(descriptor, gathered)
            _write_all(descriptor, chunk)
            gathered.clear()
    _write_all(descriptor, gathered)


def write_tensors(path: Path, specs: list[TensorSpec], buffers: Iterable[Buffer], metadata: dict[str, str]) -> None:
    """Write a safetensors file from buffers in the order of `specs`, holding one buffer at a time.

    Format: eight bytes of header length, a JSON header padded with spaces to a multiple of eight,
    then the raw little-endian tensors (https://github.com/huggingface/safetensors, README).
    Raises ValueError if a buffer's size differs from its spec.
    """
    write_stream(path, tensor_file(specs, buffers, metadata), sum(spec.num_bytes for spec in specs))


def tensor_file(specs: list[TensorSpec], buffers: Iterable[Buffer], metadata: dict[str, str]) -> Iterator[Buffer]:
    """Yield the contents of the file that `write_tensors` writes, holding one buffer at a time."""
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
            raise ValueError(f"{spec.name}: has {memoryview(buffer).nbytes} bytes, expected {spec.num_bytes}")
        yield buffer


def append_line(path: Path, line: str) -> None:
    """Append one line to a file; a crash can truncate only the last line."""
    append_bytes(path, redact(line).encode("utf-8") + b"\n")


def append_bytes(path: Path, data: Buffer) -> None:
    """Append data to a file that other processes read while it grows."""
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, memoryview(data).nbytes) as descriptor:
        _write_all(descriptor, data)


def cut(path: Path, num_bytes: int) -> None:
    """Truncate a file to its first `num_bytes` bytes; a missing file is ignored."""
    if path.exists():
        with _opened(path, os.O_WRONLY) as descriptor:
            os.ftruncate(descriptor, num_bytes)
            os.fsync(descriptor)


def settle(path: Path) -> int:
    """Fsync a growing file and its folder; return its length in bytes, 0 if it does not exist."""
    if not path.exists():
        return 0
    with _opened(path, os.O_WRONLY) as descriptor:
        os.fsync(descriptor)
        _fsync_folder(path.parent)
        return os.fstat(descriptor).st_size


@contextlib.contextmanager
def _opened(path: Path, flags: int, num_bytes: int | None = None) -> Iterator[int]:
    with writing(path, num_bytes=num_bytes):
        descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def beat(path: Path, record: str) -> None:
    """Overwrite the single record of a file in place; its modification time is the time of the record.

    Not fsynced, which would take longer than a short training step. A record has at most 4,095 bytes.
    """
    data = redact(record).encode("utf-8").ljust(_BEAT_BYTES - 1) + b"\n"
    if len(data) > _BEAT_BYTES:
        raise ValueError(f"a record has at most {_BEAT_BYTES} bytes, got {len(data)}")
    with _opened(path, os.O_WRONLY | os.O_CREAT, len(data)) as descriptor:
        _write_all(descriptor, data)


def remove(path: Path) -> None:
    """Remove a file durably; a missing file is ignored."""
    if path.exists():
        with writing(path):
            os.unlink(path)
            _fsync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: it is renamed first, so it is never visible with some of its files missing."""
    aside = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    with writing(path):
        os.rename(path, aside)
        _fsync_folder(path.parent)
        _remove_tree(aside)


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in a folder."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            with writing(path):
                _remove_tree(path)


def final_name(name: str) -> str:
    """Return the final name of a temporary file or folder; other names unchanged."""
    found = _LEFTOVER.fullmatch(name)
    return found["folder"] or found["file"] if found else name


def _remove_tree(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for child in sorted(path.iterdir()):
        _remove_tree(child)
    os.rmdir(path)


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably; existing folders are kept."""
    with writing(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        if not path.is_dir():
            os.makedirs(path, exist_ok=True)
        for folder in missing:
            _fsync_folder(folder.parent)


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`, which replaces `path` when the block ends without an error.

    Libraries (tokenizers, processors) write into it; their files are fsynced and get modes by the umask before the
    rename.
    """
    with _staged(path) as staging:
        with writing(path, _FULL):  # libraries also read here: other errors may not be the disk's
            yield staging
        with writing(path):
            _settle(staging)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path` for intermediate files; it is removed when the block ends."""
    make_folder(path.parent)
    scratch = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path, _FULL):
        os.mkdir(scratch)
        try:
            yield scratch
        finally:
            _remove_tree(scratch)


def write_files(path: Path, contents: dict[str, Buffer | Iterable[Buffer]]) -> None:
    """Write a folder of files atomically; an existing folder is replaced when all files are on the disk.

    The files are written in the order of `contents`, each from a buffer or from several, held one at a time.
    """
    with _staged(path) as staging:
        for name, data in contents.items():
            chunks = [data] if isinstance(data, Buffer) else data
            with _opened(staging / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                _write_chunks(descriptor, chunks)
                os.fsync(descriptor)
        with writing(path):
            _fsync_folder(staging)


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path` that is renamed to it at the end, or removed after an error."""
    make_folder(path.parent)
    staging = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path):
        os.mkdir(staging)
    try:
        yield staging
        with writing(path):
            _replace_folder(staging, path)
    except BaseException:
        if staging.exists():
            with contextlib.suppress(OSError):  # the first error matters
                _remove_tree(staging)
        raise


def _settle(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, 0o666 & ~mask)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _fsync_folder(Path(root))


def _replace_folder(staging: Path, path: Path) -> None:
    # A folder cannot be renamed over a non-empty one. The old one is renamed first, so a complete folder exists under
    # one of the two names at every moment.
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}") if path.exists() else None
    if old:
        os.rename(path, old)
    os.rename(staging, path)
    _fsync_folder(path.parent)
    if old:
        _remove_tree(old)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_log(path: Path) -> int:
    """Create a file for the output of another process; return its descriptor, which the caller closes."""
    with writing(path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW, 0o666)
