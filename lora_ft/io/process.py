"""Prepare a process before torch and model libraries are imported. No torch here.

process.prepare()     # at the start of a command, of a sweep's worker, of a function of the Python API
"""

import logging
import sys

from lora_ft.errors import ConfigError
from lora_ft.io import allocator


def prepare() -> None:
    """Set up the allocators, block compiled code from the hub, and hide warnings. Safe to call more than once.

    If the package `kernels` is installed, bitsandbytes (on import) and transformers download compiled code from the hub
    and run it. None in `sys.modules` makes `import kernels` fail, which both treat as "not installed". If a program has
    imported it already, it stays. bitsandbytes warns about missing kernels at each call of a slower path.

    Raises ConfigError on native Windows, which lacks file locks and signals that training relies on.
    """
    if sys.platform == "win32":
        raise ConfigError("lora_ft needs Linux, macOS or WSL2 (Windows Subsystem for Linux); this is native Windows")
    allocator.configure()
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
