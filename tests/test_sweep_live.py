"""One display of a sweep's jobs, from files that grow, come and go while it looks."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lora_ft import config, runs, validation
from lora_ft.errors import ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import live, metrics_reader, scheduler
from lora_ft.sweeps.executors import local
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job
from lora_ft.sweeps.metrics_reader import MetricsReader, View


def made(folder: Path, *words: str, **train: Any) -> list[Job]:
    """Jobs, their folders with config.yaml."""
    jobs = []
    for number, text in enumerate(words):
        cfg = config.TrainRun(train=config.Train(**train))
        job = Job(number, folder / str(number), cfg, ["data=chatterbot", *text.split()])
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(yaml.safe_dump(validation.to_plain(cfg)))
        jobs.append(job)
    return jobs


def running(folder: Path, whose: dict[int, list[Job]], turn: Job | None = None, doing: str = "step") -> None:
    """Children that run, each with its jobs, and their heartbeats."""
    told = {str(number): [str(job.folder) for job in jobs] for number, jobs in whose.items()}
    (folder / scheduler.RUNNING).write_text(json.dumps(told))
    (folder / local.FOLDER).mkdir(exist_ok=True)
    for number in whose:
        record = {"folder": str(turn.folder) if turn else None, "beat": 1, "doing": doing}
        durable.beat(folder / local.FOLDER / f"{number}.json", json.dumps(record))


def steps(job: Job, first: int, last: int, **more: Any) -> None:
    for step in range(first, last + 1):
        runs.append_metrics(job.folder, {"step": step, "loss": 3 - step / 100, "tokens_per_second": 140.2, **more})


def counted(job: Job, count: int) -> None:
    (job.folder / runs.CHECK).write_text(json.dumps({"steps": {"count": count}}))


def finished(job: Job, **result: Any) -> None:
    durable.write_json(job.folder / runs.RESULT, {"eval_loss": 2.3014, "steps": 4, "train_seconds": 41.2} | result)


@pytest.fixture(autouse=True)
def every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_LOOKS", 0.0)


def test_each_state_is_told_once_with_what_a_person_wants_to_know(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, third = jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16")
    said = lambda: capfd.readouterr().err.splitlines()  # noqa: E731
    with live.displayed(jobs, tmp_path) as show:
        show()
        assert said() == [], "all wait"
        running(tmp_path, {1: [first, second]}, turn=first, doing="loading")
        show()
        assert said() == ["job 0 (adapter.r=4): loading"], "the other waits until the first has ended"
        counted(first, 4)
        steps(first, 1, 2)
        running(tmp_path, {1: [first, second]}, turn=first)
        show()
        show()
        assert said() == ["job 0 (adapter.r=4): running, 4 steps"], "the other has made no step"
        finished(first)
        show()
        assert said() == ["job 0 (adapter.r=4): finished, eval loss 2.301, 41 s"]
        (second.folder / runs.LOG).touch()
        runs.write_failure(second.folder, ResourceError("no memory\nat all"))
        show()
        assert said() == [f"job 1 (adapter.r=8): failed: no memory (see {second.folder / 'log.txt'})"]
        finished(third, stopped_by="halving at step 20: eval loss 2.41 was 3rd of 4, 2 go on")
        show()
        assert said() == ["job 2 (adapter.r=16): stopped: halving at step 20: eval loss 2.41 was 3rd of 4, 2 go on"]
    assert said() == []


def test_a_job_whose_process_died_waits_until_it_is_run_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    with live.displayed(jobs, tmp_path) as show:
        steps(jobs[0], 1, 3)
        running(tmp_path, {1: jobs}, turn=jobs[0])
        show()
        running(tmp_path, {})
        show()
        running(tmp_path, {2: jobs[:1]}, turn=jobs[0], doing="loading")
        show()
    told = capfd.readouterr().err.splitlines()
    assert told == [
        "job 0 (adapter.r=4): running",
        "job 0 (adapter.r=4): waiting, after step 3",
        "job 0 (adapter.r=4): loading",
    ]


def test_what_is_left_by_a_signal_is_the_last_that_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    with pytest.raises(KeyboardInterrupt), live.displayed(jobs, tmp_path) as show:
        steps(jobs[0], 1, 3)
        running(tmp_path, {1: jobs}, turn=jobs[0])
        show()
        running(tmp_path, {})
        raise KeyboardInterrupt
    assert "job 0 (adapter.r=4): waiting, after step 3" in capfd.readouterr().err


def test_every_half_minute_the_whole_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16")
    finished(jobs[0])
    now = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.displayed(jobs, tmp_path) as show:
        for now[0] in (1001.0, 1029.0, 1031.0, 1040.0):
            show()
    assert capfd.readouterr().err == "1 finished, 2 left; 0:31 so far\n"


def test_what_was_finished_before_is_no_news_and_what_had_failed_is_run_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8")
    finished(jobs[0])
    runs.write_failure(jobs[1].folder, ResourceError("no memory"))
    with live.displayed(jobs, tmp_path) as show:
        durable.remove(jobs[1].folder / runs.FAILURE)
        show()
        finished(jobs[1])
    assert capfd.readouterr().err.splitlines() == ["job 1 (adapter.r=8): finished, eval loss 2.301, 41 s"]


def test_a_finished_run_that_is_to_be_longer_is_not_finished(tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4", max_steps=4)
    finished(job)
    longer = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, train=config.Train(max_steps=8)))
    follower = MetricsReader(longer)
    assert MetricsReader(job).view(None).state == "finished"
    assert follower.view(None).state == "waiting"
    finished(job, steps=8)
    assert follower.view(None).state == "finished"


def test_metrics_are_read_as_they_grow_and_never_again(tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4")
    follower, beat = MetricsReader(job), Beat(job.folder, "step")
    assert follower.view(beat).state == "loading"
    steps(job, 1, 3, eval_loss=2.5)
    path = job.folder / runs.METRICS
    with path.open("a") as file:
        file.write('{"step": 4, "loss": 2.0, "heldo')
        file.flush()
        seen = follower.view(beat)
        assert (seen.step, seen.eval_loss, seen.best_eval_loss) == (3, 2.5, 2.5), "half a line is none"
        file.write('ut_loss": 2.7}\n')
    path.write_bytes(path.read_bytes().replace(b"2.5", b"0.1"))  # what was read is not read again
    seen = follower.view(beat)
    assert (seen.step, seen.loss, seen.eval_loss, seen.best_eval_loss) == (4, 2.0, 2.7, 2.5)
    durable.cut(path, 0)  # a run that goes on from its checkpoint
    steps(job, 1, 1, eval_loss=2.6)
    seen = follower.view(beat)
    assert (seen.step, seen.eval_loss, seen.best_eval_loss) == (1, 2.6, 2.6)


def test_a_long_file_is_caught_up_with_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_reader, "_MOST_BYTES", 1000)
    (job,) = made(tmp_path, "adapter.r=4")
    lines = [
        json.dumps({"step": n, "loss": 2.0, **({"eval_loss": 5 - n / 50} if n % 7 == 0 else {})}) for n in range(101)
    ]
    (job.folder / runs.METRICS).write_text("\n".join(lines) + "\n")
    follower, looks = MetricsReader(job), 0
    while (seen := follower.view(None)).step < 100:
        looks += 1
    assert looks >= 2
    assert seen.best_eval_loss == seen.eval_loss == 5 - 98 / 50


@pytest.mark.parametrize("spoiled", ["", "{", "[]", "null", '{"steps": 7}', '{"steps": {"count": "many"}}', "\xff"])
def test_spoiled_files_say_nothing(spoiled: str, tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4")
    for name in (runs.CHECK, runs.METRICS):
        (job.folder / name).write_text(spoiled + "\n", "latin-1")
    seen = MetricsReader(job).view(Beat(job.folder, "step"))
    assert seen == View(job, "running", 0, None, None, None, None, None, None, "")


def test_losses_that_are_no_numbers_are_not_shown_and_never_the_best(tmp_path: Path) -> None:
    (job,) = made(tmp_path, "adapter.r=4")
    values = ("NaN", "2.5", "-Infinity", "null", '"1"')
    (job.folder / runs.METRICS).write_text("".join(f'{{"step": 1, "eval_loss": {v}}}\n' for v in values))
    finished(job, eval_loss=None)
    seen = MetricsReader(job).view(None)
    assert (seen.eval_loss, seen.best_eval_loss) == (None, 2.5)


def test_a_job_is_named_by_the_words_that_others_do_not_have(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4 seed=1", "adapter.r=8 seed=1", "adapter.r=8 seed=1 quant=nf4")
    assert live.names(jobs) == ["adapter.r=4", "adapter.r=8", "adapter.r=8 quant=nf4"]
    assert live.names(jobs[:1]) == [""]
    assert live.names([]) == []


def rendered(views: list[View], titles: dict[int, str], width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(live.page(views, titles, live.counts(views), height))
    return console.file.getvalue().rstrip("\n").split("\n")  # type: ignore[attr-defined]


def view(job: Job, state: str, step: int = 0, num_steps: int | None = 10) -> View:
    return View(job, state, step, num_steps, 2.5, 2.4, 2.3, 140.0, None, "")


def test_where_not_all_jobs_fit_those_that_run_and_failed_are_shown(tmp_path: Path) -> None:
    jobs = made(tmp_path, *(f"adapter.r={n}" for n in range(1, 41)))
    states = {20: "failed", 30: "running", 39: "running"}
    views = [view(job, states.get(job.number, "finished" if job.number < 20 else "waiting")) for job in jobs]
    titles = dict(enumerate(live.names(jobs)))
    lines = rendered(views, titles, 100, 10)
    assert len(lines) < 10, "and the cursor's line"
    assert [line.split()[0] for line in lines[1:-2]] == ["20", "21", "22", "23", "30", "39"]
    assert lines[-2:] == ["... 34 more", "20 finished, 1 failed, 2 running, 17 left"]
    assert len(rendered(views, titles, 100, 60)) == 42, "all, where there is room"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_job_takes_one_line_however_narrow_the_terminal_is(width: int, tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4 data.path=/a/rather/long/path/to/some/rows.jsonl optim.lr=0.0001", "seed=2")
    views = [view(job, "running", 7) for job in jobs]
    lines = rendered(views, dict(enumerate(live.names(jobs))), width, 24)
    assert len(lines) == 4 and max(map(len, lines)) <= width
    if width >= 80:
        assert lines[1].split()[-6:] == ["running", "7/10", "2.500", "2.400", "2.300", "140"]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """stderr is a terminal of 100 columns; what it shows can be read from the descriptor."""
    ours, its = pty.openpty()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with open(its, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield ours
    os.close(ours)


HOSTILE = "data.path=[red]\x1b]0;title\x07\x9b31m[/red]:bomb:"


def test_in_a_terminal_one_table_shows_all_and_obeys_no_word_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = made(tmp_path, "adapter.r=4", HOSTILE)
    with terminal(monkeypatch) as screen:
        with live.displayed(jobs, tmp_path) as show:
            steps(jobs[0], 1, 3)
            running(tmp_path, {1: jobs}, turn=jobs[0])
            show()
            runs.write_failure(jobs[1].folder, ResourceError("no \x1b[2Jmemory"))
        seen = os.read(screen, 100_000).decode()
    assert "adapter.r=4" in seen and "running" in seen and "2.970" in seen
    assert r"data.path=[red]\x1b]0;title\x07\x9b31m[/red]:bomb:" in seen
    assert r"failed: no \x1b[2Jmemory" in seen
    assert "\x07" not in seen and "\x9b" not in seen and "\x1b]0" not in seen and "\x1b[2J" not in seen


def test_plain_lines_hold_no_controls_either(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path, "adapter.r=4", HOSTILE)
    with live.displayed(jobs, tmp_path):
        runs.write_failure(jobs[1].folder, ResourceError("no \x1b[2J\rmemory"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.isprintable()


def test_a_reader_that_leaves_does_not_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = made(tmp_path, "adapter.r=4")
    reads, writes = os.pipe()
    os.close(reads)
    stderr = open(writes, "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with live.displayed(jobs, tmp_path) as show:
            finished(jobs[0])
            show()
    with contextlib.suppress(BrokenPipeError):
        stderr.close()


def test_the_time_left_is_told_by_steps_made_since_the_display_began(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", "adapter.r=16", max_steps=100)
    before = [view(jobs[0], "finished", 100, 100), view(jobs[1], "waiting", 50, 100), view(jobs[2], "waiting", 0, None)]
    now = [before[0], view(jobs[1], "running", 70, 100), before[2]]
    assert live.seconds_left(before, now, 60.0) == 60 / 20 * (30 + 100)
    now[1] = view(jobs[1], "failed", 70, 100)
    assert live.seconds_left(before, now, 60.0) == 60 / 20 * 100, "what failed makes no more steps"
    now[2] = view(jobs[2], "finished", 100, 100)
    assert live.seconds_left(before, now, 60.0) is None, "none is left"


def test_no_time_left_is_told_where_it_would_be_a_guess(tmp_path: Path) -> None:
    jobs = made(tmp_path, "adapter.r=4", "adapter.r=8", max_steps=100)
    before = [view(job, "waiting", 0, 100) for job in jobs]
    now = [view(jobs[0], "running", 50, 100), before[1]]
    assert live.seconds_left(before, now, 60.0) == 180.0
    assert live.seconds_left(before, now, 5.0) is None, "too early"
    assert live.seconds_left(before, [view(jobs[0], "running", 3, 100), before[1]], 60.0) is None, "too little"
    assert live.seconds_left(before, before, 60.0) is None
    jobs[1].cfg.model.path = "a larger base"
    assert live.seconds_left(before, now, 60.0) is None, "another base's steps take another time"


def test_times_are_told_as_people_tell_them() -> None:
    assert [live.clock(s) for s in (0, 59.9, 151, 3600, 36_061)] == ["0:00", "0:59", "2:31", "1:00:00", "10:01:01"]
    assert [live.roughly(s) for s in (20, 100, 4810)] == ["under a minute", "about 2 min", "about 1 h 20 min"]
