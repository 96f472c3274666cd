"""Keep freed memory in the process, because remapping it costs half of a CPU training step in page faults.

glibc returns every block over a threshold to the kernel when it is freed, and a training step frees and
allocates hundreds of megabytes of activations. Raising both thresholds before the first large allocation
took a packed run of SmolLM2-135M from 68 to 137 tokens/s (two Zen 3 cores, fp32).

Memory that is kept becomes fragmented: a quarter of the process at 1,345 tokens per step. torch can align large
tensors to huge pages (2 MB), which makes the fragments equal in size: 3.0 -> 2.3 GB at the same speed.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds to 1 GiB and align large tensors; do nothing and return False on other C libraries.

    Call it before torch allocates its first tensor of over 2 MB: torch reads the variable once.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return bool(mallopt(_M_MMAP_THRESHOLD, _ONE_GIB) and mallopt(_M_TRIM_THRESHOLD, _ONE_GIB))
