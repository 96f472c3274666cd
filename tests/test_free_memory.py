"""Free memory: the lowest of what the machine has, the control groups' limits and the limits of `ulimit`."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_ft.ops import free_memory

CPU = torch.device("cpu")


def test_limits_of_a_control_group_and_its_parents_are_read(tmp_path: Path) -> None:
    """The page cache counts as free memory."""
    root, own = tmp_path / "fs", tmp_path / "fs" / "user" / "job"
    own.mkdir(parents=True)
    for folder, limit, current, cache in ((own, "900", 400, 100), (own.parent, "max", 0, 0), (root, "5000", 10, 0)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    assert free_memory._cgroups(membership, root) == [(900, 300), (5000, 10)]
    membership.write_text("4:memory:/old\n")
    assert free_memory._cgroups(membership, root) == []
    assert free_memory._cgroups(tmp_path / "none", root) == []


def test_the_lowest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = free_memory.available_bytes(CPU), free_memory.total_bytes(CPU)
    assert 0 < free < total
    monkeypatch.setattr(free_memory, "_cgroups", lambda *_: [(3 << 20, 1 << 20), (5 << 20, 4 << 20)])
    monkeypatch.setattr(free_memory, "_ulimits", lambda: [(7 << 20, 0)])
    assert free_memory.available_bytes(CPU) == 1 << 20
    assert free_memory.total_bytes(CPU) == 3 << 20
    monkeypatch.setattr(free_memory, "_ulimits", lambda: [(7 << 20, 8 << 20)])
    assert free_memory.available_bytes(CPU) == 0


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_below_a_ulimit_can_be_allocated_and_no_more(name: str) -> None:
    """In a process of its own, which limits itself to 300 MB more than it uses."""
    program = f"""
import mmap, resource, sys
import torch
from lora_ft.ops import free_memory
field = dict(free_memory._ULIMITS)["{name}"]
used = free_memory._kilobytes("/proc/self/status", field)
resource.setrlimit(resource.{name}, (used + (300 << 20), resource.RLIM_INFINITY))
left = free_memory.available_bytes(torch.device("cpu"))
assert 250 << 20 < left <= 300 << 20, left
assert free_memory.total_bytes(torch.device("cpu")) == used + (300 << 20)
kept = mmap.mmap(-1, left - (32 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
try:
    mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
except OSError:
    sys.exit(0)
sys.exit("more than the limit was allocated")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_limit_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert free_memory._ulimits() == []


def test_memory_of_this_process_is_part_of_the_machines() -> None:
    assert 50 << 20 < (free_memory.resident_bytes() or 0) < (free_memory.total_bytes(CPU) or 0)
