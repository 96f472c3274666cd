"""Memory of a device: how much it has for this process, and how much of that is free.

A CPU's memory is limited by the machine, by control groups (containers, Slurm, systemd) and by `ulimit -v` and `-d`;
the lowest limit counts. None where the system does not report it.
"""

import sys
from pathlib import Path

import torch

# `ulimit` option: limit of the process, and the field of /proc/self/status that counts against it.
_ULIMITS = (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData"))


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if the system does not report them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not sys.platform.startswith("linux"):
        return None
    limits = [*_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), *_ulimits()]
    return max(0, min([_kilobytes("/proc/meminfo", "MemAvailable"), *(limit - used for limit, used in limits)]))


def total_bytes(device: torch.device) -> int | None:
    """Return the bytes that a device has, or that the limits on this process allow if they are fewer."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not sys.platform.startswith("linux"):
        return None
    limits = [*_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), *_ulimits()]
    return min([_kilobytes("/proc/meminfo", "MemTotal"), *(limit for limit, _ in limits)])


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory now."""
    return _kilobytes("/proc/self/status", "VmRSS") if sys.platform.startswith("linux") else None


def _kilobytes(file: str, field: str) -> int:
    """Return a field of a file of /proc in bytes."""
    fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024


def _ulimits() -> list[tuple[int, int]]:
    """Return each limit that `ulimit` sets on the memory of this process, and the bytes that count against it."""
    import resource  # here: native Windows has none

    found = [(resource.getrlimit(getattr(resource, name))[0], field) for name, field in _ULIMITS]
    return [
        (limit, _kilobytes("/proc/self/status", field)) for limit, field in found if limit != resource.RLIM_INFINITY
    ]


def _cgroups(membership: Path, root: Path) -> list[tuple[int, int]]:
    """Return each limit on this process's control group and its parents (cgroup v2: `0::/a/b`), and the bytes used."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    found = []
    for group in [] if own is None else [root / own, *(root / own).parents]:
        limit, current, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
        if group.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
            fields = dict(line.split() for line in stat.read_text().splitlines())
            # The page cache counts as used, but is freed before an allocation fails.
            found.append((int(limit.read_text()), int(current.read_text()) - int(fields["inactive_file"])))
    return found
