"""Memory of this process and of its GPU, in bytes."""

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on the GPU if `device` is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # here: native Windows has none, and process.prepare refuses it with a message

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def reset_peak_memory(device: torch.device) -> None:
    """Let the peaks of a GPU's memory begin now, for the next job of a process. A CPU's peak cannot be reset."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # before, there are no peaks, and torch would raise
        torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Return the memory that fills a GPU, nothing for other devices.

    peak_reserved_bytes: the most that torch has held, with unused blocks. device_used_bytes: used now according to the
    driver, by all processes, with the context of CUDA and of this process.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_reserved_bytes": torch.cuda.max_memory_reserved(device), "device_used_bytes": total - free}
