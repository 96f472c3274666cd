"""Run one command in a process of its own and watch what it and its children take.

    run(["python", "peers/ours.py", ...], environment, log) -> Measurement(returncode=0, peak_tree_bytes=3.1e9, ...)

Resident memory is read from /proc every 50 ms and summed over the process tree: a peak between two looks is missed,
and a page that two processes share counts twice. The kernel's own peak of the largest process (VmHWM) misses nothing.
It is not taken from getrusage: that begins with the memory that the parent had when it forked.
"""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS, TREE_SECONDS, LONGEST_SECONDS = 0.05, 0.5, 3600
# Beyond this part of the machine's memory a run would push others out, and its own time would be that of the disk.
LARGEST_PART = 0.92

_PAGE = os.sysconf("SC_PAGE_SIZE")
MEMORY_BYTES = os.sysconf("SC_PHYS_PAGES") * _PAGE


@dataclass(frozen=True)
class Measurement:
    """started: Unix time before the process existed. stopped: why it was ended from here, else empty."""

    returncode: int
    started: float
    seconds: float
    peak_tree_bytes: int
    peak_process_bytes: int
    stopped: str


def run(command: list[str], environment: dict[str, str], log: Path) -> Measurement:
    """Run a command to its end, its output in `log`; whatever happens here, its whole tree is ended."""
    peak, largest, stopped = 0, 0, ""
    with log.open("wb") as output:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            members, looked = [process.pid], 0.0
            while True:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    break
                if time.perf_counter() - looked > TREE_SECONDS:
                    members, looked = tree(process.pid), time.perf_counter()
                peak = max(peak, sum(resident_bytes(member) for member in members))
                largest = max(largest, *map(peak_bytes, members))
                if not stopped and (stopped := _excess(peak, time.perf_counter() - clock)):
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(LOOK_SECONDS)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            _end(process.pid)
    seconds = time.perf_counter() - clock
    return Measurement(process.returncode, started, seconds, max(peak, largest), largest, stopped)


def _excess(peak: int, seconds: float) -> str:
    if peak > LARGEST_PART * MEMORY_BYTES:
        return f"took {peak / 1e9:.1f} GB, nearly all of this machine"
    return f"took more than {LONGEST_SECONDS} s" if seconds > LONGEST_SECONDS else ""


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the usual case: all of it has ended
        os.killpg(group, signal.SIGKILL)


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for member in found:
        found += children.get(member, [])
    return found


def _parent(entry: Path) -> int | None:
    try:
        # The name in parentheses may hold blanks and parentheses itself.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def peak_bytes(pid: int) -> int:
    """The most that a process has had in memory since it began to run its program; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, found, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0
