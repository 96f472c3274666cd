"""Prepare a process for libraries of models: no compiled code from the hub, no warnings of theirs. No torch here.

process.prepare()     # at the start of a command, of a sweep's worker, of a function of the Python API
"""

import logging
import sys


def prepare() -> None:
    """Keep compiled code from the hub out of this process, and silence the warnings of bitsandbytes.

    If the package `kernels` is installed, bitsandbytes (on import) and transformers fetch compiled code from the hub
    and run it. None in `sys.modules` makes `import kernels` fail, which both take for "not installed". A program that
    has imported it already keeps it. bitsandbytes warns of the missing kernels, and at each call of a slower path.
    Calling this twice does no more than calling it once.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
