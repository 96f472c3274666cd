"""The display of a sweep's jobs, from files that grow, appear and vanish meanwhile."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from lora_ft import config, runs, validation
from lora_ft.errors import ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import live, results
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job
from lora_ft.sweeps.live import View
from lora_ft.sweeps.results import Curve, Figures, JobResult


def made(folder: Path, *overrides: str, **train: Any) -> list[Job]:
    """Jobs, their folders with overrides.txt and config.yaml."""
    jobs = []
    for number, text in enumerate(overrides):
        cfg = config.TrainRun(train=config.Train(**train))
        job = Job(number, folder / str(number), cfg, ["data=chatterbot", *text.split()])
        job.folder.mkdir(parents=True)
        runs.write_overrides(job.folder, job.overrides)
        (job.folder / "config.yaml").write_text(yaml.safe_dump(validation.to_plain(cfg)))
        jobs.append(job)
    return jobs


def running(job: Job, doing: str = "step") -> list[Any]:
    """The handles of one worker, which runs this job."""
    return [SimpleNamespace(beat=lambda: Beat(job.folder, doing))]


def steps(job: Job, first: int, last: int, **more: Any) -> None:
    for step in range(first, last + 1):
        runs.append_metrics(job.folder, {"step": step, "loss": 3 - step / 100, "tokens_per_second": 140.2, **more})


def planned(job: Job, count: int) -> None:
    (job.folder / runs.CHECK).write_text(json.dumps({"steps": {"count": count}}))


def finished(job: Job, **result: Any) -> None:
    durable.write_json(job.folder / runs.RESULT, {"eval_loss": 2.3014, "steps": 4, "train_seconds": 41.2} | result)


@pytest.fixture(autouse=True)
def every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_LOOKS", 0.0)


def test_each_change_of_state_is_printed_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second, third = jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16")
    printed = lambda: capfd.readouterr().err.splitlines()  # noqa: E731
    with live.displayed(jobs, jobs) as show:
        show([])
        assert printed() == [], "all wait"
        show(running(first, "loading"))
        assert printed() == ["job 0 (adapter.r=4): loading"], "the other waits until the first has ended"
        planned(first, 4)
        steps(first, 1, 2)
        show(running(first))
        show(running(first))
        assert printed() == ["job 0 (adapter.r=4): running, 4 steps"], "the other has made no step"
        finished(first)
        show(running(second, "loading"))
        assert printed() == ["job 0 (adapter.r=4): finished, eval loss 2.301, 41 s", "job 1 (adapter.r=8): loading"]
        (second.folder / runs.LOG).touch()
        runs.write_failure(second.folder, ResourceError("no memory\nat all"))
        show([])
        log = second.folder / "log.txt"
        assert printed() == [f"job 1 (adapter.r=8): failed: ResourceError: no memory (see {log})"]
        reason = "halving at step 20: eval loss 2.41 ranks 3 of 4, 2 continue"
        finished(third, stopped_by=reason)
        show([])
        assert printed() == [f"job 2 (adapter.r=16): stopped: {reason}"]
    assert printed() == []


def test_job_whose_process_died_waits_until_it_runs_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    with live.displayed(jobs, jobs) as show:
        steps(jobs[0], 1, 3)
        show(running(jobs[0]))
        show([])
        show(running(jobs[0], "loading"))
    assert capfd.readouterr().err.splitlines() == [
        "job 0 (adapter.r=4): running",
        "job 0 (adapter.r=4): waiting, after step 3",
        "job 0 (adapter.r=4): loading",
        "job 0 (adapter.r=4): waiting, after step 3",
    ]


def test_last_state_is_printed_after_an_interrupt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    with pytest.raises(KeyboardInterrupt), live.displayed(jobs, jobs) as show:
        steps(jobs[0], 1, 3)
        show(running(jobs[0]))
        raise KeyboardInterrupt
    assert "job 0 (adapter.r=4): waiting, after step 3" in capfd.readouterr().err


def test_summary_is_printed_every_half_minute(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16")
    finished(jobs[0])
    now = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.displayed(jobs, jobs[1:]) as show:
        for now[0] in (1001.0, 1029.0, 1031.0, 1040.0):
            show([])
    assert capfd.readouterr().err == "1 finished, 2 left; 0:31 so far\n"


def test_earlier_results_are_not_printed_and_earlier_failures_wait(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    finished(jobs[0])
    runs.write_failure(jobs[1].folder, ResourceError("no memory"))
    with live.displayed(jobs, jobs[1:]) as show:
        durable.remove(jobs[1].folder / runs.FAILURE)
        show([])
        finished(jobs[1])
    assert capfd.readouterr().err.splitlines() == ["job 1 (adapter.r=8): finished, eval loss 2.301, 41 s"]


@pytest.mark.parametrize("text", ["\xff\n", "{}\n", "[1]\n", '{"step": "1"}\n'])
def test_job_with_damaged_files_is_unreadable(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = jobs = made(tmp_path, "adapter.r=4")
    with live.displayed(jobs, jobs) as show:
        (job.folder / runs.METRICS).write_text(text, "latin-1")
        show(running(job))
    assert capfd.readouterr().err.startswith("job 0: unreadable: metrics.jsonl:1 holds no step: ")


def test_finished_run_that_trains_for_longer_waits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = made(tmp_path, "adapter.r=4", max_steps=4)
    finished(job)
    longer = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, train=config.Train(max_steps=8)))
    with live.displayed([longer], [longer]) as show:
        show([])
        assert capfd.readouterr().err == ""
        finished(job, steps=8)
    assert capfd.readouterr().err == "job 0: finished, eval loss 2.301, 41 s\n"


def test_half_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4")
    steps(job, 1, 3, eval_loss=2.5)
    with (job.folder / runs.METRICS).open("a") as file:
        file.write('{"step": 4, "loss": 2.0, "eval_')
        file.flush()
        assert figures(job) == ["3", "2.970", "2.500", "2.500", "140"]
        file.write('loss": 2.7}\n')
    assert figures(job) == ["4", "2.000", "2.700", "2.500", ""]
    durable.cut(job.folder / runs.METRICS, 0)  # a run that continues from its checkpoint
    steps(job, 1, 1, eval_loss=2.6)
    assert figures(job) == ["1", "2.990", "2.600", "2.600", "140"]


def figures(job: Job) -> list[str]:
    return [*live._figures(results.read_job(job.folder, is_running=True))]


def test_losses_that_are_not_finite_are_not_shown_and_never_the_best(tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4")
    values = ("NaN", "2.5", "-Infinity", "null", '"1"')
    (job.folder / runs.METRICS).write_text("".join(f'{{"step": 1, "eval_loss": {v}}}\n' for v in values))
    assert figures(job) == ["1", "", "2.500", "2.500", ""]


def test_title_of_a_job_is_its_overrides_that_others_do_not_have(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4 seed=1", "adapter.r=8 seed=1", "adapter.r=8 seed=1 quant=nf4")
    assert live.titles(jobs) == {0: "adapter.r=4", 1: "adapter.r=8", 2: "adapter.r=8 quant=nf4"}
    assert live.titles(jobs[:1]) == {0: ""}
    assert live.titles([]) == {}


def rendered(views: list[View], titles: dict[int, str], width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(live.page(views, titles, live.counts(views), height))
    return console.file.getvalue().rstrip("\n").split("\n")  # type: ignore[attr-defined]


def view(job: Job, state: str, step: int = 0, num_steps: int | None = 10) -> View:
    curve = Curve(((step, 2.5),), ((0, 2.3), (step, 2.4)), stride=1, last_step=step, tokens_per_second=140.0)
    return View(job, state, JobResult(str(job.number), job.folder, num_steps=num_steps, figures=Figures(), curve=curve))


def test_running_and_failed_jobs_come_first_if_not_all_fit(tmp_path: Path) -> None:
    jobs = made(tmp_path, *(f"adapter.r={n}" for n in range(1, 41)))
    states = {20: "failed", 30: "running", 39: "running"}
    views = [view(job, states.get(job.number, "finished" if job.number < 20 else "waiting")) for job in jobs]
    lines = rendered(views, live.titles(jobs), 100, 10)
    assert len(lines) < 10, "and the cursor's line"
    assert [line.split()[0] for line in lines[1:-2]] == ["20", "21", "22", "23", "30", "39"]
    assert lines[-2:] == ["... 34 more", "20 finished, 1 failed, 2 running, 17 left"]
    assert len(rendered(views, live.titles(jobs), 100, 60)) == 42, "all fit"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_job_takes_one_line_at_any_width(width: int, tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4 data.path=/a/rather/long/path/to/some/rows.jsonl optim.lr=0.0001", "seed=2")
    views = [view(job, "running", 7) for job in jobs]
    lines = rendered(views, live.titles(jobs), width, 24)
    assert len(lines) == 4 and max(map(len, lines)) <= width
    if width >= 80:
        assert lines[1].split()[-6:] == ["running", "7/10", "2.500", "2.400", "2.300", "140"]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Make stderr a terminal of 100 columns; yield a function that returns all text written to it so far."""

    def written() -> str:
        text, end = b"", b"<end>"
        os.write(its, end)
        while not text.endswith(end):  # the kernel passes a terminal's output on in parts
            text += os.read(ours, 100_000)
        return text.removesuffix(end).decode()

    ours, its = pty.openpty()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with open(its, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield written
    os.close(ours)


HOSTILE = "data.path=[red]\x1b]0;title\x07\x9b31m[/red]:bomb:"


def test_terminal_shows_a_table_without_control_characters_of_the_jobs(tmp_path: Path, monkeypatch) -> None:
    jobs = made(tmp_path, "adapter.r=4", HOSTILE)
    with terminal(monkeypatch) as written:
        with live.displayed(jobs, jobs) as show:
            steps(jobs[0], 1, 3)
            show(running(jobs[0]))
            runs.write_failure(jobs[1].folder, ResourceError("no \x1b[2Jmemory"))
        text = written()
    assert "adapter.r=4" in text and "running" in text and "2.970" in text
    assert "data.path=[red]\ufffd]0;title\ufffd\ufffd31m[/red]:bomb:" in text
    assert "no \ufffd[2Jmemory" in text
    assert not any(control in text for control in ("\x07", "\x9b", "\x1b]0", "\x1b[2J"))


def test_plain_lines_hold_no_control_characters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path, "adapter.r=4", HOSTILE)
    with live.displayed(jobs, jobs):
        runs.write_failure(jobs[1].folder, ResourceError("no \x1b[2J\rmemory"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.isprintable()


def test_sweep_continues_if_the_reader_of_stderr_closes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = made(tmp_path, "adapter.r=4")
    reads, writes = os.pipe()
    os.close(reads)
    stderr = open(writes, "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with live.displayed(jobs, jobs) as show:
            finished(jobs[0])
            show([])
    with contextlib.suppress(BrokenPipeError):
        stderr.close()


def test_time_left_is_estimated_from_the_steps_made_since_the_start(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16", max_steps=100)
    before = [view(jobs[0], "finished", 100, 100), view(jobs[1], "waiting", 50, 100), view(jobs[2], "waiting", 0, None)]
    now = [before[0], view(jobs[1], "running", 70, 100), before[2]]
    assert live.seconds_left(before, now, 60.0) == 60 / 20 * (30 + 100)
    now[1] = view(jobs[1], "failed", 70, 100)
    assert live.seconds_left(before, now, 60.0) == 60 / 20 * 100, "a failed job makes no more steps"
    now[2] = view(jobs[2], "finished", 100, 100)
    assert live.seconds_left(before, now, 60.0) is None, "all jobs have ended"


def test_time_left_is_unknown_after_few_steps_or_for_steps_of_different_cost(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", max_steps=100)
    before = [view(job, "waiting", 0, 100) for job in jobs]
    now = [view(jobs[0], "running", 50, 100), before[1]]
    assert live.seconds_left(before, now, 60.0) == 180.0
    assert live.seconds_left(before, now, 5.0) is None, "too early"
    assert live.seconds_left(before, [view(jobs[0], "running", 3, 100), before[1]], 60.0) is None, "too few steps"
    assert live.seconds_left(before, before, 60.0) is None
    jobs[1].cfg.model.path = "a larger base"
    assert live.seconds_left(before, now, 60.0) is None, "steps on another base take another time"


def test_times_are_formatted_in_minutes_and_hours() -> None:
    assert [live.clock(s) for s in (0, 59.9, 151, 3600, 36_061)] == ["0:00", "0:59", "2:31", "1:00:00", "10:01:01"]
    assert [live.roughly(s) for s in (20, 100, 4810)] == ["under a minute", "about 2 min", "about 1 h 20 min"]
