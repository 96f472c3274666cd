"""Stands in for `python -m lora_ft.sweeps.worker`: its files, its heartbeat and its ends, without a model and at once.

What a job does is its first word: finish, fail, exit, kill, crash, hang, memory, taint, slow, deaf, hang_loading or
kill_loading.
"""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

STEPS = 3
asked = []


def beat(folder: str | None, doing: str) -> None:
    record = json.dumps({"folder": folder, "beat": time.monotonic_ns(), "doing": doing})
    Path(order["heartbeat"]).write_text(record.ljust(4095) + "\n")


def write(job: dict, name: str, value: dict) -> None:
    path = Path(job["folder"]) / name
    path.with_suffix(".part").write_text(json.dumps(value).replace("1e-08", "1.0e-08"))  # a float to YAML, too
    path.with_suffix(".part").replace(path)


def does(job: dict, what: str) -> bool:
    return job["words"][0] == what


def end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def die(job: dict, where: str) -> None:
    if does(job, f"kill{where}"):
        os.kill(os.getpid(), signal.SIGKILL)
    if does(job, f"hang{where}"):
        time.sleep(60)


def step(job: dict) -> bool:
    """One step; whether there is another."""
    folder = Path(job["folder"])
    beat(job["folder"], "step")
    job["step"] += 1
    if job["step"] >= 2:
        die(job, "")
        if does(job, "exit"):
            end(9)
        if does(job, "crash"):
            os.abort()
        if does(job, "fail"):
            write(job, "failure.json", {"kind": "NonFiniteError", "exit_code": 8, "message": "planted"})
            return False
        if does(job, "memory"):
            told = {"kind": "ResourceError", "exit_code": 7, "message": "CUDA out of memory"}
            write(job, "failure.json", told)
            return False
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": job["step"], "loss": 2.0, "tokens_per_second": 100.0}) + "\n")
    if does(job, "slow") or does(job, "deaf"):
        readable, _, _ = select.select([0], [], [], 0.05)
        if readable and not os.read(0, 1):
            asked.append(signal.SIGTERM)
        if does(job, "slow") or job["step"] < 1000:
            return True
    if job["step"] < STEPS:
        return True
    write(job, "result.json", {"eval_loss": 1.5, "steps": job["step"], "train_seconds": 0.1})
    return False


def begin(job: dict) -> None:
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    write(job, "config.yaml", job["cfg"])
    write(job, "check.json", {"steps": {"count": STEPS}})
    checkpoint = folder / "checkpoint"
    job["step"] = json.loads(checkpoint.read_text()) if job["cfg"]["resume"] and checkpoint.exists() else 0
    seen = {"pid": os.getpid(), "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "from": job["step"],
            "with": len(group), "leaks": os.environ.get("LEAK"), "sweep": order["sweep"]}  # fmt: skip
    with (folder / "seen.jsonl").open("a") as file:
        file.write(json.dumps(seen) + "\n")


order = json.loads(sys.stdin.readline())
group = order["jobs"]
deaf = any(does(job, "deaf") for job in group)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN if deaf else lambda signum, _: asked.append(signum))
sys.stdout.write(f"worker with {len(group)} jobs\n")
for job in group:
    begin(job)
    os.environ["LEAK"] = "yes"
    beat(job["folder"], "loading")
    die(job, "_loading")
    if does(job, "taint"):
        write(job, "failure.json", {"kind": "ConfigError", "exit_code": 2, "message": "tainted"})
        end(75)
    while True:
        goes_on = step(job)
        (Path(job["folder"]) / "checkpoint").write_text(str(job["step"]))
        if asked and not deaf:
            end(128 + asked[0])
        if not goes_on:
            break
end(0)
