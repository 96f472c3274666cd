"""Run each group of jobs as a batch job of Slurm. No torch here.

    F/children/3.sh      the batch script: starts the worker, forwards signals to it, requeues it
    F/children/3.exit    the exit code of a worker that is not requeued

Slurm sends USR2 to the script before the time limit: the worker saves and exits, and the script requeues its job, if
there is a new checkpoint since it started. Jobs that Slurm itself requeues, after a preemption or a node failure, start
the script again as well. The worker reads the same order each time, and continues from the checkpoints.

The batch job does not need this process. It is found again by its name, which its order holds.
"""

import json
import logging
import os
import re
import secrets
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import ConfigError, LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import jobs
from lora_ft.sweeps.executors import children
from lora_ft.sweeps.executors.interface import Beat, Handle
from lora_ft.sweeps.jobs import Job

log = logging.getLogger("lora_ft")

_SECONDS_BETWEEN_LOOKS = 5.0  # at the queue
_SECONDS_OF_A_COMMAND = 60.0
_SECONDS_TO_APPEAR = 60.0  # for a file that another machine wrote
_SCRIPT, _EXIT = ".sh", ".exit"
_OF_MACHINES = ("BOOT_FAIL", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN")
_ENDED = (*_OF_MACHINES, "CANCELLED", "COMPLETED", "FAILED", "OUT_OF_MEMORY")
_OUTAGE = re.compile("unable to contact|timed out|zero bytes|connection refused|temporarily unable", re.IGNORECASE)
# Flags with which a batch job would be several, or none, or in another cluster.
_REFUSED_FLAGS = re.compile("--(array|clusters?|het-group|test-only|wait|wrap)(=.*)?|-[aMW].*|:")


@dataclass(frozen=True)
class Entry:
    """A batch job in the queue: its id, and its state in the words of squeue."""

    id: str
    state: str


class Queue:
    """The batch jobs of this user, asked for once for all groups and at most every few seconds."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._asked = self.answered = -float("inf")
        self.error = ""  # of the last question

    def find(self, name: str) -> Entry | None:
        """Return the batch job of this name as of the last answer, at most a few seconds ago unless Slurm is away."""
        if time.monotonic() - self._asked >= _SECONDS_BETWEEN_LOOKS:
            self._ask()
        return self._entries.get(name)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        answer = _call("squeue", "--me", "--noheader", "--states=all", "--format=%i %T %j")
        if answer.returncode:
            if not self.error:
                log.warning("Slurm does not answer, its jobs go on: %s", answer.stderr.strip())
            self.error = answer.stderr.strip() or f"squeue ended with exit code {answer.returncode}"
            return
        lines = (line.split(maxsplit=2) for line in answer.stdout.splitlines())
        self._entries = {words[2]: Entry(words[0], words[1]) for words in lines if len(words) == 3}
        self.answered, self.error = self._asked, ""


class SlurmJob(children.Child):
    """A group in a batch job; `slot` is one of hydra.launcher.max_running."""

    def __init__(
        self, group: list[Job], slot: str, heartbeat: Path, launcher: config.Launcher, name: str, queue: Queue
    ) -> None:
        super().__init__(group, slot, heartbeat, launcher.job_timeout)
        self._launcher, self._name, self._queue = launcher, name, queue
        self.number = ""  # until it is submitted
        self._state = "PENDING"
        self._since = time.monotonic()  # when it was submitted, then when it was first seen to have ended
        self._tried = -float("inf")  # to submit or to signal
        self._code: int | None = None
        self._is_stopped = False

    def submit(self) -> None:
        """Submit the batch job, or try again later if Slurm is away; raises ResourceError if it refuses the job."""
        self._tried = time.monotonic()
        flags = _flags(self.jobs[0], self._launcher)
        output = str(self._heartbeat.with_suffix(children.LOG)).replace("%", "%%")
        script = self._heartbeat.with_suffix(_SCRIPT)
        answer = _call("sbatch", "--parsable", *flags, f"--job-name={self._name}", f"--output={output}", str(script))
        if answer.returncode == 0:
            self.number, self._since = answer.stdout.strip().split(";")[0], time.monotonic()
        elif not _OUTAGE.search(answer.stderr):
            raise ResourceError(
                f"Slurm refused a group of jobs: {answer.stderr.strip()}\nits flags: {shlex.join(flags)}"
            )

    def ended(self) -> int | None:
        """Return the exit code; None while the batch job waits, runs, or is about to be requeued."""
        if self._code is None:
            self._look()
        return self._code

    def _look(self) -> None:
        entry = self._queue.find(self._name)
        if entry:
            self.number = entry.id
            if entry.state in _ENDED and self._state not in _ENDED:
                self._since = time.monotonic()
            self._state = entry.state
        elif self.number and self._queue.answered > self._since and self._state not in _ENDED:
            self._state, self._since = "UNKNOWN", time.monotonic()
        if not self.number:
            if self._is_stopped:
                self._code = -signal.SIGTERM
            elif self._queue.answered > self._tried:  # and the earlier attempt did not get through
                self.submit()
        elif self._state in _ENDED:
            self._end()
        elif self._state != "RUNNING":
            self._last_beat_at = time.monotonic()  # time in the queue is no time without progress
        elif self._is_overdue():
            self._signal()

    def _end(self) -> None:
        """Read the exit code, once the files of the worker are visible here. Without one, the state decides."""
        for path in (self._heartbeat, *(job.folder / "config.yaml" for job in self.jobs)):
            if path.parent.is_dir():
                os.listdir(path.parent)  # noqa: PTH208  (makes NFS look for new files)
        path = self._heartbeat.with_suffix(_EXIT)
        if path.exists():
            self._code = int(path.read_text())
        elif self._state not in ("COMPLETED", "FAILED") or time.monotonic() - self._since > _SECONDS_TO_APPEAR:
            self._code = -signal.SIGTERM
            # If Slurm starts the script once more, it ends at once.
            durable.write_text(self._heartbeat.with_suffix(children.STOP), "")
            durable.write_text(path, f"{self._code}\n")

    def lost(self) -> bool:
        """Return True for a lost machine, a preemption or a time limit that was not followed by a requeue."""
        if self._overdue or self._state in ("CANCELLED", "OUT_OF_MEMORY"):
            return False
        return self._code in children.STOPPED or (self._state in _OF_MACHINES and (self._code or 0) < 0)

    def beat(self) -> Beat:
        return super().beat() if self._state == "RUNNING" or self._code is not None else Beat()

    def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            durable.write_text(self._heartbeat.with_suffix(children.STOP), "")
            self._tried = -float("inf")
        if self.number and self._code is None and self._is_due():
            self._tried = time.monotonic()
            _call("scancel", "--state=PENDING", self.number)
            _call("scancel", "--batch", "--signal=USR2", self.number)

    def kill(self) -> None:
        if self._code is None:
            durable.write_text(self._heartbeat.with_suffix(children.STOP), "")
            self._code = -signal.SIGKILL
            self._signal()

    def _signal(self) -> None:
        answer = _call("scancel", self.number or f"--name={self._name}")
        if answer.returncode:
            log.warning("scancel %s failed: %s", self.number, answer.stderr.strip())

    def _is_due(self) -> bool:
        return time.monotonic() - self._tried >= _SECONDS_BETWEEN_LOOKS

    def death(self, job: Job) -> LoraFtError:
        """Return the reason why a job has no outcome although its batch job has ended."""
        assert self._code is not None
        named = f"its Slurm job {self.number}"
        reasons = {
            "CANCELLED": f"{named} was cancelled, which this sweep did not do",
            "OUT_OF_MEMORY": f"{named} ran out of memory (raise hydra.launcher.memory)",
        }
        reason = reasons.get(self._state, "")
        if self._code < 0 and self._state in ("COMPLETED", "FAILED"):
            reason = f"{named} ended without an exit code (do all nodes share the folder of the sweep?)"
        if self.lost():
            retries = f"hydra.launcher.retries={self._launcher.retries}"
            reason = f"{named} ended too often since the last checkpoint ({self._state}, {retries})"
        return self._death(job, self._code, reason)


class SlurmJobs:
    """One batch job for each group, so many of them at a time."""

    settings = frozenset({"job_timeout", "max_running", "gpus", "cpus", "memory", "retries", "partition", "time_limit",
                          "notice", "extra"})  # fmt: skip

    def __init__(self) -> None:
        self._queue = Queue()

    def slots(self, device: str, launcher: config.Launcher) -> list[str]:
        return [f"slurm {number}" for number in range(launcher.max_running)]

    def submit(
        self, group: list[Job], slot: str, launcher: config.Launcher, sweep: config.Sweep, folder: Path
    ) -> SlurmJob:
        """Submit a batch job for a group of the sweep in `folder`; raises ResourceError if Slurm refuses it."""
        title = re.sub(r"[^\w.-]", "_", folder.name)
        name = f"lora_ft-{title}-{secrets.token_hex(4)}"
        heartbeat = children.write_order(group, sweep, folder, watch_stdin=False, slurm=name)
        durable.write_text(heartbeat.with_suffix(_SCRIPT), _script(heartbeat, group))
        handle = SlurmJob(group, slot, heartbeat, launcher, name, self._queue)
        handle.submit()
        return handle

    def adopt(self, folder: Path, launcher: config.Launcher) -> list[Handle]:
        """Return the batch jobs of the sweep in `folder` that wait or run; raises ResourceError if Slurm is away."""
        found: list[Handle] = []
        for order in sorted((folder / runs.CHILDREN).glob(f"*{children.ORDER}")):
            plain = json.loads(order.read_bytes())
            heartbeat = Path(plain["heartbeat"])
            if not plain.get("slurm") or heartbeat.with_suffix(_EXIT).exists():
                continue
            entry = self._queue.find(plain["slurm"])
            if self._queue.error:
                raise ResourceError(f"Slurm must tell which jobs of {folder} still run, and does not answer: "
                                    f"{self._queue.error}")  # fmt: skip
            if entry and entry.state not in _ENDED:
                group = [jobs.from_plain(job) for job in plain["jobs"]]
                handle = SlurmJob(group, f"slurm {len(found)}", heartbeat, launcher, plain["slurm"], self._queue)
                handle.number = entry.id
                found.append(handle)
        return found


def _flags(job: Job, launcher: config.Launcher) -> list[str]:
    """Return the flags of sbatch; ours come last, because the last one of two counts."""
    for flag in launcher.extra:
        if not flag.startswith("-") or _REFUSED_FLAGS.fullmatch(flag) or "\n" in flag:
            raise ConfigError(f"hydra.launcher.extra must be flags of sbatch for one batch job, got {flag}")
    gpus = launcher.gpus if launcher.gpus is not None else int(job.cfg.device != "cpu")
    chosen = {
        "--gres": f"gpu:{gpus}" if gpus else None,
        "--cpus-per-task": launcher.cpus,
        "--mem": f"{round(launcher.memory * 1024)}M" if launcher.memory else None,
        "--time": launcher.time_limit,
        "--partition": launcher.partition,
        "--signal": f"B:USR2@{launcher.notice}",
    }
    ours = [f"{flag}={value}" for flag, value in chosen.items() if value is not None]
    return [*launcher.extra, *ours, "--nodes=1", "--ntasks=1", "--requeue", "--open-mode=append"]


def _script(heartbeat: Path, group: list[Job]) -> str:
    command = shlex.join([*children.command(), str(heartbeat.with_suffix(children.ORDER))])
    values = {
        "EXIT": str(heartbeat.with_suffix(_EXIT)),
        "STOP": str(heartbeat.with_suffix(children.STOP)),
        "STARTED": str(heartbeat.with_suffix(".started")),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    folders = shlex.join(str(job.folder) for job in group)
    return "\n".join(["#!/bin/bash", *lines, f"FOLDERS=({folders})", _BODY.replace("COMMAND", command)])


_BODY = """
# Written by lora_ft. The worker saves when it gets USR2.
rm -f "$EXIT"
: > "$STARTED"
if [ -e "$STOP" ]; then echo 140 > "$EXIT"; exit 0; fi
trap 'notice=1; [ -z "$worker" ] || kill -USR2 "$worker" 2> /dev/null' USR2
# From scancel or a preemption. Slurm may have sent it to the worker too, whom a second TERM would not let save.
trap 'ended=1; [ -z "$worker" ] || kill -USR2 "$worker" 2> /dev/null' TERM
COMMAND < /dev/null &
worker=$!
[ -z "$notice$ended" ] || kill -USR2 "$worker"
while kill -0 "$worker" 2> /dev/null; do wait "$worker"; done   # a signal ends `wait` early
wait "$worker"
code=$?
has_saved() {
    find "${FOLDERS[@]}" -newer "$STARTED" \\( -path '*/checkpoints/step-*' -o -name result.json \\) 2> /dev/null
}
if [ -n "$notice" ] && [ -z "$ended" ] && [ "$code" -gt 128 ] && [ ! -e "$STOP" ] && [ -n "$(has_saved)" ] &&
    scontrol requeue "$SLURM_JOB_ID"; then
    exit 0
fi
echo "$code" > "$EXIT.part" && mv "$EXIT.part" "$EXIT"
exit "$code"
"""


def _call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm, out of reach of Ctrl-C. A program that hangs fails as in an outage."""
    try:
        return subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=_SECONDS_OF_A_COMMAND, start_new_session=True, check=False)  # fmt: skip
    except FileNotFoundError:
        raise ResourceError(
            f"this sweep has jobs for Slurm, whose program {program} is not on the PATH: run it on a login node of the "
            "cluster"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([program], 1, "", f"{program} timed out")
