"""Which GPUs the jobs of a sweep can have, found without asking torch."""

import os
import re
from itertools import takewhile
from pathlib import Path

_NAME = re.compile(r"[0-9]+|(GPU|MIG)-.+")
_FILES = (("/dev", "nvidia[0-9]*"), ("/proc/driver/nvidia/gpus", "*"))


def usable(device: str, chosen: list[str]) -> list[str]:
    """The devices of which any can run a job with this setting `device`; [""] for the CPU, or where none is known.

    chosen: hydra.launcher.devices. A GPU that nothing here shows (another maker's) is found by the child itself, so
    that jobs take turns on it.
    """
    if device in ("auto", "cuda"):
        return chosen or visible() or [""]
    if device.startswith("cuda:"):
        number, names = int(device.removeprefix("cuda:")), visible()
        return [names[number] if number < len(names) else str(number)]
    return [""]


def visible() -> list[str]:
    """NVIDIA's GPUs by the names that CUDA_VISIBLE_DEVICES takes: those it has, as far as CUDA reads it, or all.

    Numbers of device files are not CUDA's numbers, which begin at 0 in a container that has only /dev/nvidia3.
    """
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return list(takewhile(_NAME.fullmatch, (name.strip() for name in said.split(","))))
    counts = (len(list(Path(folder).glob(pattern))) for folder, pattern in _FILES)
    return [str(number) for number in range(next(filter(None, counts), 0))]
