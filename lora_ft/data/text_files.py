r"""Decode text files: UTF-8, other encodings by their byte order mark, and what `data.encoding` names.

    FF FE 70 00 72 00    UTF-16 by its mark: read as such, and counted as a conversion
    63 61 66 E9          not UTF-8: refused with line and byte, because several encodings have this byte

A file is decoded while it is read, so that memory does not grow with it. Lines end with "\n" alone.
"""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from lora_ft import config
from lora_ft.data.rows import Ledger
from lora_ft.data.streams import File, open_bytes
from lora_ft.errors import ConfigError, DataError

_CHUNK = 2**16
_EXAMPLE = ", as in data.encoding=cp1252 (Windows, western Europe)"
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
# Encodings without a mark, by the zeros among the first four bytes.
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
    (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
}  # fmt: skip


@contextmanager
def open_text(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Iterator[str]]:
    """Open a text file as pieces of decoded text.

    Raises DataError for bytes that are no text in the file's encoding, RowError for a conversion if `data.strict`.
    """
    with open_bytes(file, label) as stream:
        head = stream.read(_CHUNK)
        encoding, num_mark_bytes = _marked(head)
        if data.encoding:
            chosen = _codec(data.encoding)
            if num_mark_bytes and not encoding.startswith(chosen.removesuffix("-sig")):
                raise DataError(
                    f"{label}: begins with the byte order mark of {_shown(encoding)}, which data.encoding="
                    f"{data.encoding} contradicts"
                )
            encoding = encoding if num_mark_bytes else chosen
        elif encoding != "utf-8":
            ledger.convert("file", f"files read as {_shown(encoding)}", label)
        yield _decoded(head[num_mark_bytes:], stream, encoding, label)


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in pieces; each keeps its line feed."""
    parts: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        parts.append(first)
        if others:
            yield "".join(parts) + "\n"
            yield from (line + "\n" for line in others[:-1])
            parts = [others[-1]]
    if last := "".join(parts):
        yield last


def _marked(head: bytes) -> tuple[str, int]:
    """Return the encoding that the first bytes of a file show, and the length of its byte order mark.

    NUL is no character of a text, so zeros among the first four bytes show the width and order of UTF-16 or UTF-32.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    return _ZEROS.get(tuple(byte == 0 for byte in head[:4]), "utf-8"), 0


def _codec(name: str) -> str:
    try:
        "a".encode(name)
        return codecs.lookup(name).name
    except (LookupError, UnicodeError):
        raise ConfigError(f"data.encoding must be a text encoding such as utf-16 or cp1252, got {name}") from None


def _shown(encoding: str) -> str:
    return encoding.upper().removesuffix("-LE").removesuffix("-BE")


def _decoded(head: bytes, stream: IO[bytes], encoding: str, label: str) -> Iterator[str]:
    """Yield the text piece by piece. Raises DataError with the line of the first byte that is not text."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, chunk = 1, head
    while chunk:
        following = stream.read(_CHUNK)
        try:
            text, wrong = decoder.decode(chunk, final=not following), b"\0"
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode(encoding, "ignore") + "\0"
            wrong = b"\0" if "\0" in text[:-1] else error.object[error.start : error.start + 1]
        before, nul, _ = text.partition("\0")
        line += before.count("\n")
        if nul:
            is_8_bit = encoding == "utf-8" and wrong != b"\0"
            raise DataError(
                f"{label}:{line}: not {_shown(encoding)} text: byte 0x{wrong.hex()}; convert the file to UTF-8, or set "
                f"data.encoding to its encoding{_EXAMPLE if is_8_bit else ''}"
            )
        yield text
        chunk = following
