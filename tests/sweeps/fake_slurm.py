"""Stand-ins for sbatch, squeue, scontrol and scancel: batch jobs are processes of this machine.

python fake_slurm.py PROGRAM ARGUMENTS...     $FAKE_SLURM holds the state: a folder per batch job, and for the tests
    down     no program gets an answer                       hold      batch jobs stay pending
    forget   squeue knows no batch job that has ended        refuse    sbatch refuses
scontrol knows two more commands: `fail ID`, a lost node whose job is requeued, and `lose ID`, one whose job is not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_SLURM"])
OVER = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL")


def write(path: Path, text: str) -> None:
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def say(job: Path, state: str) -> None:
    write(job / "state", state)


def state(job: Path) -> str:
    return (job / "state").read_text()


def fail(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(1)


def sbatch(flags: list[str], script: str) -> None:
    if (ROOT / "refuse").exists():
        fail("sbatch: error: Batch job submission failed: Invalid partition name specified")
    named = dict(flag.partition("=")[::2] for flag in flags)
    number = 1 + sum(1 for _ in ROOT.glob("[0-9]*"))
    job = ROOT / str(number)
    job.mkdir()
    write(job / "flags", json.dumps(flags))
    write(job / "name", named["--job-name"])
    write(job / "script", Path(script).read_text())
    say(job, "PENDING")
    subprocess.Popen([sys.executable, "-I", "-S", __file__, "run", str(number), named["--output"]],
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     start_new_session=True)  # fmt: skip
    sys.stdout.write(f"{number}\n")


def run(number: str, output: str) -> None:
    """Be the node of a batch job: run its script until it is not requeued."""
    job = ROOT / number
    while True:
        while (ROOT / "hold").exists():
            if state(job) == "CANCELLED":
                return
            time.sleep(0.01)
        with open(output.replace("%%", "%"), "a") as log:
            process = subprocess.Popen(["bash", str(job / "script")], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       env=os.environ | {"SLURM_JOB_ID": number}, start_new_session=True)  # fmt: skip
        write(job / "pid", str(process.pid))
        say(job, "RUNNING")
        code = process.wait()
        end = (job / "end").read_text() if (job / "end").exists() else "COMPLETED" if code == 0 else "FAILED"
        (job / "end").unlink(missing_ok=True)
        say(job, end)
        if end != "PENDING":
            return


def end(job: Path, state: str, signum: int) -> None:
    """End a running script and its children; its batch job is then in this state."""
    write(job / "end", state)
    leader = int((job / "pid").read_text())
    os.killpg(leader, signum)
    for _ in range(200):
        time.sleep(0.01)
        if not (job / "end").exists():
            return
    os.killpg(leader, signal.SIGKILL)


def squeue() -> None:
    for name in sorted(ROOT.glob("[0-9]*/name")):
        if not ((ROOT / "forget").exists() and state(name.parent) in OVER):
            sys.stdout.write(f"{name.parent.name} {state(name.parent)} {name.read_text()}\n")


def scontrol(command: str, number: str) -> None:
    job = ROOT / number
    if command == "requeue":
        inside = str(os.getpgrp()) == (job / "pid").read_text()  # called by the script itself, which then ends
        write(job / "end", "PENDING") if inside else end(job, "PENDING", signal.SIGTERM)
    else:
        end(job, "PENDING" if command == "fail" else "NODE_FAIL", signal.SIGKILL)


def scancel(*arguments: str) -> None:
    *flags, number = arguments
    job, is_pending = ROOT / number, state(ROOT / number) == "PENDING"
    if flags == ["--state=PENDING"]:
        if is_pending:
            say(job, "CANCELLED")
    elif flags:
        if state(job) != "RUNNING":
            fail("scancel: error: Kill job error: Job is pending execution")
        os.kill(int((job / "pid").read_text()), getattr(signal, f"SIG{flags[1].removeprefix('--signal=')}"))
    elif is_pending:
        say(job, "CANCELLED")
    elif state(job) == "RUNNING":
        end(job, "CANCELLED", signal.SIGTERM)


program, *words = sys.argv[1:]
if program != "run":
    with (ROOT / "calls").open("a") as calls:
        calls.write(f"{program}\n")
    if (ROOT / "down").exists():
        fail(f"{program}: error: Unable to contact slurm controller (connect failure)")
match program:
    case "sbatch":
        sbatch(words[:-1], words[-1])
    case "squeue":
        squeue()
    case "scontrol":
        scontrol(*words)
    case "scancel":
        scancel(*words)
    case "run":
        run(*words)
