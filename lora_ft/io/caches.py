"""Choose a folder for files that can be made again: the user's cache, or a temporary one where that cannot be written.

caches.writable("models")     ~/.cache/lora_ft/models, or /tmp/lora_ft-models-x1y2, with a warning
"""

import atexit
import contextlib
import functools
import logging
import os
import tempfile
from pathlib import Path

from lora_ft.io import durable

log = logging.getLogger("lora_ft")


def writable(kind: str, *, cleans_up: bool = False) -> Path:
    """Return the cache folder for files of this kind, or this process's temporary folder for them.

    The temporary folder is removed when the process ends. `cleans_up`: only if it is empty then, because the caller
    removes what nobody needs.
    """
    return _writable(durable.cache_folder(kind), kind, cleans_up)


@functools.cache
def _writable(folder: Path, kind: str, cleans_up: bool) -> Path:
    try:
        durable.make_folder(folder)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = f"{folder} cannot be written"
    except OSError as error:
        reason = str(error)
    temporary = Path(tempfile.mkdtemp(prefix=f"lora_ft-{kind}-"))
    atexit.register(_remove_if_empty if cleans_up else _remove, temporary)
    log.warning("no cache: %s; using the temporary folder %s (XDG_CACHE_HOME names another cache)", reason, temporary)
    return temporary


def _remove(folder: Path) -> None:
    if folder.is_dir():
        durable.remove_folder(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
