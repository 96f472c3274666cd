"""Inject faults into runs of a tiny model; after each, resume and compare with the result of a run without faults.

    python tests/faults/loop.py FOLDER fresh:kill continued:full:3 logged:broken moments:40 signals:20

FOLDER contains a base in llama/. One single-threaded process loads it and forks for every attempt. The arguments are
SCENARIO:FAULT[:N], with a fault at every disk operation or every Nth, and moments:COUNT and signals:COUNT. The output
is JSON with, for each argument, the number of planned and injected faults, the failures, and the duration in seconds.
"""

import dataclasses
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from faults.shim import Change, Fault, Shim

from lora_ft import config, runs
from lora_ft.adapters import peft_folder
from lora_ft.cli import entry
from lora_ft.errors import Interrupted, LoraFtError
from lora_ft.io import durable
from lora_ft.models.load import load_base, load_tokenizer
from lora_ft.training import checkpoint, shared
from lora_ft.training.dry_run import read_rows

train = importlib.import_module("lora_ft.train")  # lora_ft.train is the function

KILLED, CODE_OF_DISK = -signal.SIGKILL, 7
_MESSAGES = {
    "full": re.compile(r"(/.+) cannot be written: No space left on device \((?:[\d,]+ bytes needed, )?[\d,]+ free\)"),
    "broken": re.compile(r"(/.+) cannot be written: Input/output error"),
}
_TEMPORARY = re.compile(r"\.(tmp|old)-[0-9a-f]{8}")
_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)$")


def settings(folder: Path) -> config.TrainRun:
    """Return settings that use all state of a run: dropout, order, packing, accumulation, schedule, best, patience."""
    rows = folder / "rows.jsonl"
    pairs = [(f"{'What is ' * (i % 3 + 1)}{i}?", f"It is {'so ' * (i % 4)}{i}.") for i in range(10)]
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    cfg = config.TrainRun(device="cpu", resume="auto")
    cfg.model.path, cfg.model.dtype = str(folder / "llama"), config.Dtype.float32
    cfg.adapter = config.Adapter(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    cfg.data.path, cfg.data.eval_fraction = str(rows), 0.3
    cfg.train = config.Train(
        max_steps=5, tokens_per_step=120, tokens_per_microbatch=70, eval_every_steps=2, keep=config.Keep.best,
        patience=2, samples=0, save_every_steps=2, keep_checkpoints=1, gradient_checkpointing="off",
    )  # fmt: skip
    cfg.optim = config.Optim(lr=0.1, schedule=config.Schedule.cosine, warmup_steps=2, weight_decay=0.01)
    return cfg


@dataclass
class Outcome:
    """Result for one argument: planned faults (points), injected faults, failures, and duration in seconds."""

    points: int
    faults: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A run for faults: its settings, its folder and its earlier content, and its trace and result without faults.

    `logs` turns log.txt on, which adds half as many operations.
    """

    cfg: config.TrainRun
    run: Path
    before: Path | None
    logs: bool
    trace: list[Change]
    expected: dict[str, object]

    def begin(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, self.run)

    def attempt(self, shim: Shim | None = None) -> tuple[int, str]:
        """Start or resume the run; return its exit code, negative for a signal, and its message."""
        return ended(fork(self.cfg, self.run, self.logs, shim), self.run)

    def saved_before(self, change: int) -> int:
        """Return the step of the newest checkpoint before this operation, counted from 1; 0 without one."""
        done = [_CHECKPOINT.search(c.to) for c in self.trace[: change - 1]]
        return max([_newest_step(self.before), *(int(found[1]) for found in done if found)])


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    cfg = settings(folder)
    _load_once(cfg, folder)
    short = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, max_steps=3))
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, max_steps=4, keep_checkpoints=2))
    scenario(short, folder / "short", None)
    scenarios = {
        "fresh": scenario(cfg, folder / "run", None),
        "continued": scenario(longer, folder / "run", folder / "short"),
        "logged": scenario(cfg, folder / "run", None, logs=True),
    }
    outcomes: dict[str, object] = {}
    for argument in arguments:
        started, (name, kind, *every) = time.perf_counter(), argument.split(":")
        if name in scenarios:
            outcome = at_every_change(scenarios[name], kind, *map(int, every))
        else:
            outcome = {"moments": at_moments, "signals": by_signals}[name](scenarios["fresh"], int(kind))
        outcome.seconds = time.perf_counter() - started
        outcomes[argument] = dataclasses.asdict(outcome)
    sys.stdout.write(json.dumps(outcomes))


def at_every_change(scene: Scenario, kind: str, every: int = 1) -> Outcome:
    """Make each operation of the run fail, or every Nth after a random first one, and resume after each fault."""
    first = random.randint(1, every)
    outcome = Outcome(points=len(range(first, len(scene.trace) + 1, every)))
    for number in range(first, len(scene.trace) + 1, every):
        scene.begin()
        code, message = scene.attempt(Shim(Fault(number, kind)))
        if code == 0:
            outcome.failures.append(f"{kind} at {number} did not happen")
            continue
        outcome.faults += 1
        change = scene.trace[number - 1]
        problems = [*_wrong_end(kind, code, message, scene.run), *_wrong_resume(scene, scene.saved_before(number))]
        outcome.failures += [f"{kind} at {number} ({change.name} {change.path}): {p}" for p in problems]
    return outcome


def _wrong_end(kind: str, code: int, message: str, run: Path) -> Iterator[str]:
    """Yield the differences between the end of an attempt and the expected end after such a fault."""
    expected = CODE_OF_DISK if kind in _MESSAGES else KILLED
    if code != expected:
        yield f"ended with {code} instead of {expected}: {message}"
    elif kind in _MESSAGES:
        found = _MESSAGES[kind].fullmatch(message)
        if not found or not found[1].startswith(str(run)):
            yield f"the message does not name a path in the run and the reason: {message}"


def _wrong_resume(scene: Scenario, saved: int) -> Iterator[str]:
    """Resume the run after a fault and yield what is wrong; `saved` is the step to resume from."""
    if (newest := _newest_step(scene.run)) != saved:
        yield f"the newest checkpoint is that of step {newest} instead of {saved}"
    code, message = scene.attempt()
    if code != 0:
        yield f"the resume ended with {code}: {message}"
    else:
        yield from _differences(scene.expected, result(scene.run))


def at_moments(scene: Scenario, number: int) -> Outcome:
    """Send SIGKILL at random moments to the run and its resumes until one of them finishes."""
    outcome = Outcome(points=number)
    random.seed(time.time_ns())
    duration = _duration(scene)
    while outcome.faults < number:
        scene.begin()
        kills: list[float] = []
        while True:
            pid = fork(scene.cfg, scene.run, scene.logs)
            moment = random.uniform(0, duration)
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            code, message = ended(pid, scene.run)
            if code != KILLED:
                break
            outcome.faults += 1
            kills.append(moment)
        problems = [message] if code else _differences(scene.expected, result(scene.run))
        outcome.failures += [f"kills after {kills} s: {problem}" for problem in problems]
    return outcome


def by_signals(scene: Scenario, number: int) -> Outcome:
    """Send SIGTERM or SIGINT at random moments, half of them twice; no finished step may be lost."""
    outcome = Outcome(points=number)
    random.seed(time.time_ns())
    duration = _duration(scene)
    while outcome.faults < number:
        scene.begin()
        pid = fork(scene.cfg, scene.run, scene.logs)
        signum, twice = random.choice((signal.SIGTERM, signal.SIGINT)), random.random() < 0.5
        moment = random.uniform(0, duration)
        time.sleep(moment)
        os.kill(pid, signum)
        if twice:
            time.sleep(random.uniform(0, 0.005))
            os.kill(pid, signum)
        code, message = ended(pid, scene.run)
        if code == 0:
            continue
        outcome.faults += 1
        label = f"{signum.name}{' twice' if twice else ''} after {moment} s"
        # Before the handlers are installed, the signal itself ends the process.
        if code not in (128 + signum, -signum):
            outcome.failures.append(f"{label}: ended with {code}: {message}")
        if "continue with" in message and _newest_step(scene.run) != _last_step(scene.run):
            outcome.failures.append(f"{label}: step {_last_step(scene.run)} is done and not saved")
        outcome.failures += [f"{label}: {p}" for p in _wrong_resume(scene, _newest_step(scene.run))]
    return outcome


def scenario(cfg: config.TrainRun, run: Path, before: Path | None, *, logs: bool = False) -> Scenario:
    """Run once without faults and return the scenario with its trace and result."""
    shutil.rmtree(run, ignore_errors=True)
    if before:
        shutil.copytree(before, run)
    code, message = ended(fork(cfg, run, logs, Shim(), run.parent / "trace"), run)
    assert code == 0, message
    trace = [Change(**change) for change in json.loads((run.parent / "trace").read_text())]
    return Scenario(cfg, run, before, logs, trace, result(run))


def result(run: Path) -> dict[str, object]:
    """Return what must not depend on interruptions; metrics without times and speed."""
    metrics = [{k: v for k, v in m.items() if "second" not in k} for m in runs.read_metrics(run)]
    weights = (run / "adapter" / peft_folder.WEIGHTS).read_bytes()
    return {
        "adapter": hashlib.sha256(weights).hexdigest(),
        "metrics": metrics,
        "checkpoints": sorted(path.name for path in (run / checkpoint.FOLDER).iterdir()),
        "temporary names": sorted(str(p.relative_to(run)) for p in run.rglob("*") if _TEMPORARY.search(p.name)),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
    }


def _differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    return [f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]]


def _newest_step(run: Path | None) -> int:
    found = checkpoint.newest(run) if run else None
    return int(found.name.removeprefix("step-")) if found else 0


def _last_step(run: Path) -> int:
    return max(m["step"] for m in runs.read_metrics(run))


def _duration(scene: Scenario) -> float:
    scene.begin()
    started = time.perf_counter()
    assert scene.attempt()[0] == 0
    return time.perf_counter() - started


def fork(cfg: config.TrainRun, run: Path, logs: bool, shim: Shim | None = None, trace: Path | None = None) -> int:
    """Start or resume the run in a forked process and return its pid; its trace is written unless it is killed."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process of several threads must not be forked"
    if pid := os.fork():
        return pid
    code, message = 1, ""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # like SIGTERM: outside of training there is no step to finish
    logging.getLogger("lora_ft").disabled = not logs
    try:
        durable.os = shim or Shim()
        with _silent():
            train.main(cfg, entry.Invocation(run, []))
        code = 0
    except (LoraFtError, Interrupted) as error:
        code, message = error.exit_code, str(error)
    except BaseException as error:
        message = repr(error)
    run.with_suffix(".message").write_text(message)
    if trace:
        trace.write_text(json.dumps([dataclasses.asdict(change) for change in durable.os.trace]))
    os._exit(code)


def ended(pid: int, run: Path) -> tuple[int, str]:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, run.with_suffix(".message").read_text() if code >= 0 else ""


@contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        yield


def _load_once(cfg: config.TrainRun, folder: Path) -> None:
    """Make `train` use loaded tokenizer, rows and base; a first run does all lazy imports before the forks."""
    tokenizer = load_tokenizer(cfg.model)
    rows = read_rows(cfg, tokenizer)
    bases = [load_base(cfg.model, cfg.quant, cfg.device, tokenizer) for _ in range(2)]
    shared.load_tokenizer = lambda *_: tokenizer
    shared.read_rows = lambda *_: rows
    shared.load_base = lambda *_: bases.pop()
    with _silent():
        train.main(cfg, entry.Invocation(folder / "first", []))
    gc.collect()
    gc.freeze()
    gc.disable()


if __name__ == "__main__":
    main()
