"""Ten minutes on one GPU: is lora_ft right there, how fast is it, how much memory does it take, what do others take?

    python benchmarks/gpu.py --deadline 600                  # all stages, the most valuable first
    python benchmarks/gpu.py --stages machine,ops            # some of them
    python benchmarks/gpu.py --dry                           # every stage in tiny shapes on a CPU
    python benchmarks/gpu.py --table results/gpu-DATE.jsonl  # the table of an earlier run, in Markdown

Each stage runs in a process of its own (gpu_stages/worker.py) and has its share of the time that is left. A stage that
fails, crashes, hangs or runs out of memory costs only itself. After each stage its line is on the disk, with the parts
that it had finished, so that a kill loses nothing:

    {"stage": "qlora_8b", "outcome": "done", "reason": "", "seconds": 71.2, "date": "...", "parts": {NAME: FIGURES}}

outcome: done, failed (a part is wrong, or the stage raised an error), crashed, timeout, stopped, skipped. The exit code
is 0 if all stages are done or skipped, 128 + N after signal N, else 1. Nothing is downloaded: weights are random.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMPORTED = [str(HERE.parent), str(HERE)]  # a GPU machine has a checkout, in which lora_ft is not installed
sys.path[:0] = IMPORTED

from gpu_stages import table  # noqa: E402

from lora_ft.io import durable  # noqa: E402

RESERVE_SECONDS = 2.0  # for writing the last line and removing the work folder
BASES_BYTES = 30e9  # the random bases in bfloat16, and the runs

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A module of gpu_stages, and the seconds that it is expected to take on a GPU."""

    name: str
    seconds: float


# By value: what comes last is what a short deadline leaves out.
STAGES = (
    Stage("machine", 25),
    Stage("ops", 70),
    Stage("product", 75),
    Stage("qlora_8b", 130),
    Stage("predictions", 60),
    Stage("mixed_0_6b", 70),
    Stage("fast_paths", 75),
    Stage("peers", 90),
    Stage("unsloth_peer", 60),
)


class Stop:
    """Receives SIGTERM and SIGINT: ends the running stage, whose process group is `group`."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.group: int | None = None

    def __call__(self, signum: int, _frame: object) -> None:
        self.signum = signum
        if self.group is not None:
            end_group(self.group)


def end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def command(stage: Stage, parts: Path, work: Path, dry: bool) -> list[str]:
    """Return the command of a stage's process, which appends a line to `parts` for each part."""
    return [sys.executable, "-m", "gpu_stages.worker", stage.name, str(parts), str(work), "dry" if dry else "gpu"]


def run_stages(stages: Sequence[Stage], deadline: float, out: Path, work: Path, dry: bool, stop: Stop) -> list[Record]:
    """Run stages until `deadline` (of time.monotonic), one after the other; append each record to `out` at once."""
    records: list[Record] = []
    for number, stage in enumerate(stages):
        left = deadline - time.monotonic()
        parts = out.with_suffix(f".{stage.name}.parts")  # outside of `work`, which goes if this process is killed
        share = left * stage.seconds / sum(later.seconds for later in stages[number:])
        record: Record
        if stop.signum is not None:
            record = {"outcome": "skipped", "reason": signal.Signals(stop.signum).name}
        elif left < stage.seconds / 2:
            record = {"outcome": "skipped", "reason": f"{max(left, 0):.0f} s are left, of {stage.seconds:.0f} s needed"}
        else:
            record = run_stage(stage, min(left, max(share, stage.seconds)), work, parts, dry, stop)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        records.append({"stage": stage.name, "date": now, **record})
        keep(records[-1], out)
        parts.unlink(missing_ok=True)
    return records


def run_stage(stage: Stage, seconds: float, work: Path, parts: Path, dry: bool, stop: Stop) -> Record:
    """Run one stage for at most `seconds`; return outcome, reason, seconds and the parts that it finished."""
    log = work / f"{stage.name}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*IMPORTED, os.getenv("PYTHONPATH")]))}
    started = time.monotonic()
    with log.open("wb") as output:
        # The process ends itself when its stdin closes, which it does if this process is killed.
        process = subprocess.Popen(command(stage, parts, work, dry), stdin=subprocess.PIPE, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True, env=environment)  # fmt: skip
    stop.group = process.pid
    code: int | None = None
    try:
        if stop.signum is None:
            code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        end_group(process.pid)  # with the children that it may have left
        process.communicate()
        stop.group = None
    done = read_parts(parts)
    outcome, reason = judge(code, done, stop, f"still running after {seconds:.0f} s", last_line(log))
    return {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - started, 1), "parts": done}


def judge(code: int | None, parts: dict[str, Any], stop: Stop, timeout: str, message: str) -> tuple[str, str]:
    """Return the outcome and the reason of a stage whose process ended with `code`, None if it was ended from here."""
    if stop.signum is not None:
        return "stopped", signal.Signals(stop.signum).name
    if code is None:
        return "timeout", timeout
    if code < 0:
        return "crashed", f"{signal.Signals(-code).name}; last output: {message}"
    if code:
        return "failed", message
    failed = [f"{name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    return ("failed", "; ".join(failed)[:1000]) if failed else ("done", "")


def read_parts(path: Path) -> dict[str, Any]:
    """Return the complete lines of a parts file by name; a killed process may leave a partial last one."""
    text = path.read_text("utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {line.pop("part"): line for line in lines}


def last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else "no output"


def keep(record: Record, out: Path) -> None:
    """Put a record on the disk, and print it."""
    line = json.dumps(record)
    durable.append_line(out, line)
    durable.settle(out)
    print(line, flush=True)


def work_folder(dry: bool) -> Path:
    """Create the folder of bases and runs: in memory if it has the space, else on the disk, which takes longer."""
    memory = Path("/dev/shm")
    fits = not dry and memory.is_dir() and shutil.disk_usage(memory).free > BASES_BYTES
    return Path(tempfile.mkdtemp(prefix="lora_ft_gpu_", dir=memory if fits else None))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--deadline", type=float, default=600, help="seconds for everything; default 600")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="default: all, in order")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: runs every line, measures nothing")
    parser.add_argument("--out", type=Path, help="file of results; default benchmarks/results/gpu-DATE.jsonl")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a file of results, and exit")
    parsed = parser.parse_args(given)
    names = parsed.stages.split(",")
    if unknown := set(names) - {stage.name for stage in STAGES}:
        parser.error(f"--stages: there is no {', '.join(sorted(unknown))}, only {', '.join(s.name for s in STAGES)}")
    parsed.stages = [stage for stage in STAGES if stage.name in names]
    return parsed


def main(given: list[str] | None = None) -> int:
    """Run what the command line asks for, and return the exit code."""
    parsed = arguments(given)
    if parsed.table:
        print(table.markdown([json.loads(line) for line in parsed.table.read_text("utf-8").splitlines()]))
        return 0
    stop = Stop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    deadline = time.monotonic() + parsed.deadline - RESERVE_SECONDS
    out = parsed.out or HERE / "results" / f"gpu-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M%S}.jsonl"
    durable.make_folder(out.parent)
    work = work_folder(parsed.dry)
    try:
        records = run_stages(parsed.stages, deadline, out, work, parsed.dry, stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{table.markdown(records)}\n\n{out}")
    if stop.signum is not None:
        return 128 + stop.signum
    return int(any(record["outcome"] not in ("done", "skipped") for record in records))


if __name__ == "__main__":
    sys.exit(main())
