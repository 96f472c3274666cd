"""What is measured of a process: its peak memory. The metrics of a step are kept by training/trackers.py."""

import resource
import sys

import torch

from lora_ft.training.learner import Learner
from lora_ft.training.loop import Observer


def observers(learner: Learner) -> list[Observer]:
    """The recipients of a learner's metrics, as its `track` settings say."""
    from lora_ft.training import trackers  # which needs `peak_memory_bytes` through finish.py

    trackers.check(learner.cfg.track)
    return [trackers.Tracked([learner])]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
