"""Secrets: how they are known, kept out of everything that is shown or stored, and refused in settings. No torch here.

HF_TOKEN=hf_Abc...  and  "401 for hf_Abc..."          ->  "401 for [redacted HF_TOKEN]"
                         "https://me:pass@host/rows"  ->  "https://[redacted login]@host/rows"

A secret is the value, of 8 characters or more, of an environment variable whose name says so, or a text of a form
that only credentials have. What is said may lose it (`redact`); a setting may not hold it at all (`held`), because
config.yaml has to be what the run ran with.

POSTGRES_PASSWORD=postgres  and  "password=postgres"     ->  "password=[redacted POSTGRES_PASSWORD]"
                                 "postgres_rows.jsonl"   ->  as it is

Such a value, a short one of letters, is looked for as a word of its own, and not in names of files and folders. A value
that is the path of something that exists says where a secret lies, and is none.
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

_SHORTEST = 8
_SHORTEST_ANYWHERE = 16  # of letters only; a word is shorter
# An escape may stand before it, as in JSON's "password:\npostgres". The value leads the pattern: so a search is quick.
_WORD = r"{0}(?:(?<![\w/-]{0})|(?<=\\[nrt]{0}))(?![\w/-]|\.\w)"

_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secret|passw(?:or)?d|passphrase|credential|auth|api_?key|access_?key|private_?key|key|pat)s?"
    r"(?:[_.-]?(?:id|value|[0-9]+))?$|[_.-]pwd$|secret|passw|api_?key|private_?key",
    re.IGNORECASE,
)
# What no other text looks like: each provider's own prefix with a length that no word has.
_FORMS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "AWS key id": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?",
    "login": r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)",
}
_FORM = re.compile("|".join(f"({form})" for form in _FORMS.values()), re.DOTALL)


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret by its name."""
    return bool(_NAME.search(name))


def redact(text: str) -> str:
    """The text with each secret replaced by `[redacted NAME]`: the variable's name, or the kind of credential."""
    for value, name in _values():
        text = f"[redacted {name}]".join(value.split(text))
    kinds = list(_FORMS)
    return _FORM.sub(lambda m: f"[redacted {kinds[(m.lastindex or 1) - 1]}]", text)


def held(text: str) -> str | None:
    """What kind of secret a text holds: the variable's name or the credential's; None where it holds none."""
    for value, name in _values():
        if value.search(text):
            return name
    found = _FORM.search(text)
    return [*_FORMS][(found.lastindex or 1) - 1] if found else None


def _values() -> list[tuple[re.Pattern[str], str]]:
    """What finds a value, and its variable's name: as it is, and as JSON and repr() write it; longest first."""
    found = set()
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_name(name) and not _is_place(value):
            pattern = _WORD if value.isalpha() and len(value) < _SHORTEST_ANYWHERE else "{0}"
            found |= {(form, name, pattern) for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1])}
    ordered = sorted(found, key=lambda one: (-len(one[0]), one))
    return [(re.compile(pattern.format(re.escape(form))), name) for form, name, pattern in ordered]


def _is_place(value: str) -> bool:
    return Path(value).is_absolute() and os.path.lexists(value)  # not Path.exists, which raises for a long value


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Redact all that Python code writes to stdout and stderr until the block ends, and a crash's traceback after it.

    A secret is found in what one call writes: who prints it letter by letter is not stopped.
    """
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Redacted(stream)) for stream in kept)
    sys.excepthook = _traceback
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


class _Redacted:
    """A text stream that passes on what it is given without secrets; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str], /) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
