"""Deterministic kernels: sums in the same order in every run, so that a GPU gives the same bytes again.

    with deterministic_kernels(cfg.train.deterministic, device): ...

On a CPU the kernels of training are deterministic anyway.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from lora_ft.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")  # the values with which cuBLAS is deterministic


def fix_workspace() -> None:
    """Give cuBLAS a workspace of fixed size, which it reads when CUDA starts; the variable stays set after a run.

    Raises ConfigError if CUDA has started without it, or if the variable has another value.
    """
    if os.environ.get(_WORKSPACE) in _FIXED:
        return
    if torch.cuda.is_initialized() or _WORKSPACE in os.environ:
        found = os.environ.get(_WORKSPACE, "not set")
        raise ConfigError(
            f"train.deterministic=true needs {_WORKSPACE}={_FIXED[0]} before CUDA starts, but it is {found}: "
            "set it in the environment and start the process again"
        )
    os.environ[_WORKSPACE] = _FIXED[0]


@contextlib.contextmanager
def deterministic_kernels(is_on: bool, device: torch.device) -> Iterator[None]:
    """Let torch use only deterministic kernels until the block ends, if `is_on`; raises the error of `fix_workspace`.

    An operation without such a kernel raises RuntimeError.
    """
    if not is_on:
        yield
        return
    if device.type == "cuda":
        fix_workspace()
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # writes to every new tensor, to find reads of it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
