"""Which run a message is about: of several on one base, each has its own messages and the common ones in its log.txt.

with logs.about(folder):
    log.info("adapter.dropout ...")     # in folder/log.txt; without `about`, in the log of every run of the process
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from lora_ft import runs
from lora_ft.io import durable

_subject: ContextVar[Path | None] = ContextVar("subject", default=None)


@contextlib.contextmanager
def about(folder: Path) -> Iterator[None]:
    """Messages until the block ends are about the run of this folder."""
    token = _subject.set(folder)
    try:
        yield
    finally:
        _subject.reset(token)


class LogFile(logging.Handler):
    """Everything about a run, steps too, into a file that is complete after every line."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.DEBUG)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        if _subject.get() in (None, self._folder):
            durable.append_line(self._folder / runs.LOG, f"{time.strftime('%H:%M:%S')} {record.getMessage()}")
