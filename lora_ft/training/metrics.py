"""What is measured of a process: its peak memory. The metrics of a step are kept by training/trackers.py."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
