"""A stand-in for `python -m lora_ft.sweeps.worker`: its files, its heartbeat and its exit codes, without a model.

The first override of a job is its behaviour: finish, fail, exit, kill, crash, hang, memory, taint, slow, long, deaf,
hang_loading or kill_loading.
"""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

STEPS, LONG = 3, 40
DELAY = 0.05


def beat(folder: str, doing: str) -> None:
    record = json.dumps({"folder": folder, "beat": time.monotonic_ns(), "doing": doing})
    Path(order["heartbeat"]).write_text(record.ljust(4095) + "\n")


def write(job: dict, name: str, value: dict) -> None:
    path = Path(job["folder"]) / name
    path.with_suffix(".part").write_text(json.dumps(value).replace("1e-08", "1.0e-08"))  # a float to YAML, too
    path.with_suffix(".part").replace(path)


def fail(job: dict, kind: str, code: int, message: str) -> None:
    write(job, "failure.json", {"kind": kind, "exit_code": code, "message": message})


def end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def must_stop() -> bool:
    if not order["watch_stdin"]:
        time.sleep(DELAY)
        return signal.SIGUSR2 in received
    readable, _, _ = select.select([0], [], [], DELAY)
    return bool(readable) and not os.read(0, 1)


def step(job: dict) -> bool:
    """Do one step; return True if another follows."""
    does = job["overrides"][0]
    beat(job["folder"], "step")
    job["step"] += 1
    if job["step"] >= 2:
        match does:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "exit":
                end(9)
            case "crash":
                os.abort()
            case "fail":
                fail(job, "NonFiniteError", 8, "planted")
                return False
            case "memory":
                fail(job, "ResourceError", 7, "CUDA out of memory")
                return False
    with (Path(job["folder"]) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": job["step"], "loss": 2.0, "tokens_per_second": 100.0}) + "\n")
    if does == "deaf":
        time.sleep(DELAY)
        return True
    if does in ("slow", "long"):
        if must_stop():
            save(job)
            end(128 + (received or [signal.SIGTERM])[0])
        if does == "slow" or job["step"] < LONG:
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


def save(job: dict) -> None:
    folder = Path(job["folder"])
    (folder / "checkpoint").write_text(str(job["step"]))
    (folder / "checkpoints" / f"step-{job['step']}").mkdir(parents=True, exist_ok=True)


def has_outcome(job: dict) -> bool:
    return any((Path(job["folder"]) / name).exists() for name in ("result.json", "failure.json"))


order = json.loads(Path(sys.argv[1]).read_text())
group = order["jobs"]
for signum in (signal.SIGINT, signal.SIGTERM):  # the parent closes stdin instead; SIGTERM by somebody else ends it
    signal.signal(signum, lambda signum, _: end(128 + signum))
received: list[int] = []
signal.signal(signal.SIGUSR2, lambda signum, _: received.append(signum))
if Path(order["heartbeat"]).exists():
    group = [{**job, "cfg": {**job["cfg"], "resume": "auto"}} for job in group if not has_outcome(job)]
sys.stdout.write(f"worker with {len(group)} jobs\n")
for job in group:
    begin(job)
    os.environ["LEAK"] = "yes"
    beat(job["folder"], "loading")
    match job["overrides"][0]:
        case "kill_loading":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang_loading":
            while not received:
                time.sleep(DELAY)
            end(128 + received[0])
        case "taint":
            fail(job, "ConfigError", 2, "tainted")
            end(75)
    while step(job):
        save(job)
end(0)
