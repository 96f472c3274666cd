"""Find the NVIDIA or AMD GPUs that this torch can use, and the reason if it cannot use one that is there.

usable()     ([0, 1], None)
             ([], "torch 2.13.0+cpu is built without CUDA: ...")
"""

import os
import warnings
from pathlib import Path

import torch

# Made by the driver; the last one on WSL2.
_FILES = (("/dev", "nvidia[0-9]*"), ("/proc/driver/nvidia/gpus", "*"), ("/usr/lib/wsl/lib", "nvidia-smi"))


def usable() -> tuple[list[int], str | None]:
    """Return the numbers of the GPUs that this torch can use, and why it cannot use another one, if there is one.

    Starts CUDA if it has a device: the count alone comes from the driver, which also counts GPUs that torch rejects.
    """
    if not torch.cuda._is_compiled():
        advice = "install a build of torch for CUDA, see https://pytorch.org/get-started/locally"
        return [], f"torch {torch.__version__} is built without CUDA: {advice}" if _is_visible() else None
    count = torch.cuda.device_count()
    if count == 0 and not _is_visible():
        return [], None
    try:
        with warnings.catch_warnings():  # of GPUs without kernels, which the reason names
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [], (str(error).strip() or "CUDA does not start").splitlines()[0]
    problems = {number: problem for number in range(count) if (problem := _problem(number))}
    return [number for number in range(count) if number not in problems], next(iter(problems.values()), None)


def _is_visible() -> bool:
    """Return True if the machine has a GPU of NVIDIA that CUDA_VISIBLE_DEVICES does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(any(Path(folder).glob(pattern)) for folder, pattern in _FILES)


def _problem(number: int) -> str | None:
    """Return the reason why no kernel of this torch runs on a GPU, None if one does."""
    architectures = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(number)
    # ROCm names its architectures in another way, and refuses devices on its own.
    if torch.version.hip or not architectures or any(_runs_on(capability, name) for name in architectures):
        return None
    return (
        f"cuda:{number} ({torch.cuda.get_device_name(number)}) has compute capability {capability[0]}.{capability[1]}, "
        f"and torch {torch.__version__} has kernels for {' '.join(architectures)} only: install another build of torch"
    )


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Return True if code for an architecture runs on a capability: sm_86 on 8.6 to 8.9, compute_90 on 9.0 and above.

    sm_* is machine code of one major version; compute_* is PTX, which the driver compiles for any later GPU. A letter
    at the end (sm_90a) means that the code uses features of that version alone.
    """
    kind, _, version = architecture.partition("_")
    wanted = divmod(int(version.rstrip("af")), 10)
    if kind == "compute":
        return wanted <= capability
    return wanted[0] == capability[0] and wanted[1] <= capability[1]
