"""Secrets: detect them, redact them in everything shown or stored, refuse them in settings. No torch here.

HF_TOKEN=hf_Abc...  and  "401 for hf_Abc..."          ->  "401 for [redacted HF_TOKEN]"
                         "https://me:pass@host/rows"  ->  "https://[redacted login]@host/rows"

A secret is the value (8 characters or more) of an environment variable with a name like *_TOKEN or *_KEY, or a text in
the format of a known credential. Output is redacted (`redact`); a setting with a secret is refused (`held`), because
config.yaml must be what the run used.

POSTGRES_PASSWORD=postgres  and  "password=postgres"     ->  "password=[redacted POSTGRES_PASSWORD]"
                                 "postgres_rows.jsonl"   ->  unchanged

A value of 8 to 15 letters may be an ordinary word: it is redacted only as a whole word, and not in file names. A value
that is an existing path is not a secret.
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
# An escape may precede it, as in JSON's "password:\npostgres". The pattern starts with the value, for speed.
_WORD = r"{0}(?:(?<![\w/-]{0})|(?<=\\[nrt]{0}))(?![\w/-]|\.\w)"

_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secret|passw(?:or)?d|passphrase|credential|auth|api_?key|access_?key|private_?key|key|pat)s?"
    r"(?:[_.-]?(?:id|value|[0-9]+))?$|[_.-]pwd$|secret|passw|api_?key|private_?key",
    re.IGNORECASE,
)
# Prefixes of providers with lengths that ordinary words do not have.
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
    """Return True if the name of an environment variable says that its value is secret."""
    return bool(_NAME.search(name))


def redact(text: str) -> str:
    """Replace each secret in a text by `[redacted NAME]`: the name of the variable or the type of credential."""
    for value, name in _values():
        text = f"[redacted {name}]".join(value.split(text))
    kinds = list(_FORMS)
    return _FORM.sub(lambda m: f"[redacted {kinds[(m.lastindex or 1) - 1]}]", text)


def held(text: str) -> str | None:
    """Return the name of the first secret in a text (variable or type of credential), or None."""
    for value, name in _values():
        if value.search(text):
            return name
    found = _FORM.search(text)
    return [*_FORMS][(found.lastindex or 1) - 1] if found else None


def _values() -> list[tuple[re.Pattern[str], str]]:
    """Return patterns for secret values (raw, JSON and repr() forms) with variable names, longest first."""
    found = set()
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_name(name) and not _is_path(value):
            pattern = _WORD if value.isalpha() and len(value) < _SHORTEST_ANYWHERE else "{0}"
            found |= {(form, name, pattern) for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1])}
    ordered = sorted(found, key=lambda one: (-len(one[0]), one))
    return [(re.compile(pattern.format(re.escape(form))), name) for form, name, pattern in ordered]


def _is_path(value: str) -> bool:
    return Path(value).is_absolute() and os.path.lexists(value)  # not Path.exists, which raises for a long value


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Redact what Python code writes to stdout and stderr until the block ends, and tracebacks of uncaught errors.

    Each write is redacted by itself: a secret that is split over several writes is not found.
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
    """A text stream that redacts what is written to it."""

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
