"""Find the GPUs that the jobs of a sweep can use, without importing torch."""

import os
import re
from itertools import takewhile
from pathlib import Path

_NAME = re.compile(r"[0-9]+|(GPU|MIG)-.+")
_FILES = (("/dev", "nvidia[0-9]*"), ("/proc/driver/nvidia/gpus", "*"))


def usable(device: str, chosen: list[str]) -> list[str]:
    """Return the devices that can run a job with this setting `device`; [""] for the CPU, or if none is known.

    chosen: hydra.launcher.devices. The worker itself finds a GPU that is not found here, of another vendor, so its
    jobs run one after the other.
    """
    if device in ("auto", "cuda"):
        return chosen or visible() or [""]
    if device.startswith("cuda:"):
        number, names = int(device.removeprefix("cuda:")), visible()
        return [names[number] if number < len(names) else str(number)]
    return [""]


def visible() -> list[str]:
    """Return the names that CUDA_VISIBLE_DEVICES holds, up to the first that CUDA rejects; else numbers of all GPUs.

    The GPUs are counted, because CUDA numbers them from 0 even in a container that has only /dev/nvidia3.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return list(takewhile(_NAME.fullmatch, (name.strip() for name in names.split(","))))
    counts = (len(list(Path(folder).glob(pattern))) for folder, pattern in _FILES)
    return [str(number) for number in range(next(filter(None, counts), 0))]
