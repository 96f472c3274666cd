"""The run folder: its files, its lock, and the conditions for starting and resuming a run in it."""

import errno
import fcntl
import json
import os
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest

from lora_ft import config, runs, validation
from lora_ft.data import labels
from lora_ft.errors import CheckpointError, ConfigError
from lora_ft.io import durable


def settings(**train: object) -> config.TrainRun:
    return config.TrainRun(train=config.Train(**{"epochs": 2, "max_steps": 6} | train))


def started(folder: Path, *, finished: bool = False) -> Path:
    """Create a run folder with two steps and a checkpoint, and a result if finished."""
    runs.create(folder, validation.to_plain(settings()), ["train.epochs=2", "train.max_steps=6"])
    for step in (1, 2):
        runs.append_metrics(folder, {"step": step, "loss": 1 / 3})
    (folder / runs.CHECKPOINTS / "step-00000002").mkdir(parents=True)
    if finished:
        durable.write_json(folder / runs.RESULT, {"steps": 6})
    return folder


def test_created_run_folder_reads_back(tmp_path: Path) -> None:
    folder = started(tmp_path / "a" / "run")
    assert runs.read_config(folder) == validation.to_plain(settings())
    assert list(runs.read_config(folder)) == list(validation.to_plain(settings()))  # in the order of the settings
    assert (folder / "overrides.txt").read_text() == "train.epochs=2\ntrain.max_steps=6\n"
    assert json.loads((folder / "environment.json").read_text()) == runs.environment()
    assert runs.read_metrics(folder) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.append_metrics(folder, {"loss": float("nan")})
    assert len(runs.read_metrics(folder)) == 2


def test_environment_has_package_versions_and_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/alice/secret/lora-ft"])
    environment = runs.environment()
    assert environment["packages"] == {name: metadata.version(name) for name in runs.PACKAGES}
    assert environment["processors"] == len(os.sched_getaffinity(0))
    assert environment["command"] == "lora-ft" and "alice" not in json.dumps(environment)


def test_missing_package_is_left_out_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PACKAGES", ("torch", "no-such-package", "peft"))
    assert runs.versions.__wrapped__() == {name: metadata.version(name) for name in ("torch", "peft")}


def test_create_accepts_an_empty_folder_or_leftovers_of_a_failed_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.txt", "check.json.tmp-0123abcd", "overrides.txt"):
        (folder / name).write_text("old")
    assert not runs.exists(folder)
    runs.create(folder, {"seed": 1}, [])
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "log.txt", "overrides.txt"
    }  # fmt: skip
    assert (folder / "overrides.txt").read_text() == ""
    assert not runs.exists(folder)
    runs.append_metrics(folder, {"step": 1})
    assert runs.exists(folder)
    with pytest.raises(ConfigError, match=r"the run folder must be empty, but .*run is not"):
        runs.create(folder, {"seed": 2}, [])
    assert runs.read_config(folder) == {"seed": 1}
    (folder / "config.yaml").unlink()
    assert not runs.exists(folder)
    assert not runs.exists(tmp_path / "absent")


def test_run_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    def is_locked() -> bool:
        other = os.open(tmp_path / "run", os.O_RDONLY)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(other)
        return False

    before = len(list(Path("/proc/self/fd").iterdir()))
    with runs.locked(tmp_path / "run"):
        assert is_locked()
        with pytest.raises(ConfigError, match="run is in use by another process"), runs.locked(tmp_path / "run"):
            raise AssertionError("two processes hold the lock")
        assert is_locked()
    assert not is_locked()
    with pytest.raises(RuntimeError, match="stop"), runs.locked(tmp_path / "run"):
        raise RuntimeError("stop")
    assert not is_locked()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_lock_of_a_dying_process_is_waited_for(tmp_path: Path) -> None:
    """For a bounded time: a process that a cluster starts again may meet the one before it."""
    begun, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with runs.locked(tmp_path):
            begun.set()
            leave.wait()

    before = threading.Thread(target=hold)
    before.start()
    begun.wait()
    with pytest.raises(ConfigError, match="in use by another process"), runs.locked(tmp_path, wait_seconds=0.1):
        raise AssertionError("two processes hold the lock")
    threading.Timer(0.3, leave.set).start()
    with runs.locked(tmp_path, wait_seconds=20):
        assert leave.is_set()
    before.join()


@pytest.mark.parametrize(("number", "is_skipped"), [(errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_locking_is_skipped_only_if_the_file_system_has_no_locks(
    number: int, is_skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = []
    if is_skipped:
        with runs.locked(tmp_path):
            entered.append(True)
    else:
        with pytest.raises(OSError, match=os.strerror(number)), runs.locked(tmp_path):
            entered.append(True)
    assert bool(entered) == is_skipped


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", [{}, {"samples": 9}, {"epochs": 3}, {"max_steps": 9}])
def test_run_is_reopened_unless_finished_and_not_extended(
    finished: bool, change: dict[str, int], tmp_path: Path
) -> None:
    folder, cfg = started(tmp_path / "run", finished=finished), settings()
    (folder / "result.json.tmp-0123abcd").write_text("{")
    for key, value in change.items():
        setattr(cfg.train, key, value)
    longer = bool(change.keys() & {"epochs", "max_steps"})
    assert runs.reopen(folder, cfg) == (longer or not finished)
    assert not list(folder.glob("*.tmp-*"))
    assert runs.read_config(folder) == validation.to_plain(settings())  # reopening changes no file
    assert (folder / runs.RESULT).exists() == finished
    assert runs.keep_changes(folder, cfg) == longer
    assert (folder / runs.RESULT).exists() == (finished and not longer)
    assert runs.read_config(folder) == validation.to_plain(cfg)
    assert (folder / "changed.json").exists() == bool(change)


@pytest.mark.parametrize("values", [(0, 1), (1, "other"), (True, False), (0.5, 2)])
def test_keys_of_a_mapping_are_the_same_in_yaml_in_json_and_in_runs_that_stored_numbers(values: tuple) -> None:
    """As those of data.labels: a sweep gives its jobs to its workers in JSON, whose keys are texts."""
    given = dict(zip(values, ("negative", "positive"), strict=True))
    cfg = config.TrainRun(data=config.Data(path="x", labels=given))
    plain = validation.to_plain(cfg)
    assert validation.changes(json.loads(json.dumps(plain)), cfg) == {}
    assert validation.changes(plain | {"data": plain["data"] | {"labels": given}}, cfg) == {}
    assert json.dumps(validation.lasting(cfg), sort_keys=True)  # sorts no texts among numbers
    assert labels.of(validation.from_plain(config.TrainRun, plain).data) == labels.of(cfg.data)
    with pytest.raises(ConfigError, match=r"data\.labels"):
        validation.changes(plain | {"data": plain["data"] | {"labels": {"2": "negative"}}}, cfg)


def test_changes_of_several_resumes_accumulate(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    first, cfg = (folder / "config.yaml").read_bytes(), settings()
    for change in ({"epochs": 3}, {"keep_checkpoints": 7}, {"epochs": 5}):
        for key, value in change.items():
            setattr(cfg.train, key, value)
        runs.keep_changes(folder, cfg)
    assert json.loads((folder / "changed.json").read_text()) == {"train.epochs": 5, "train.keep_checkpoints": 7}
    assert (folder / "config.yaml").read_bytes() == first


def test_finished_run_is_extended_only_from_a_checkpoint(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", finished=True)
    (folder / runs.CHECKPOINTS / "step-00000002").rmdir()
    with pytest.raises(CheckpointError, match="is finished and has no checkpoint to continue from"):
        runs.reopen(folder, settings(epochs=3))
    assert runs.read_result(folder) == {"steps": 6}
    with pytest.raises(ConfigError, match=r"train\.epochs: 2 -> 1 \(can only be raised\)"):
        runs.reopen(folder, settings(epochs=1))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 2}, {"seed": 2, "train": {"epochs": 2}}),
        ({"train.epochs": 3, "train.samples": 4}, {"seed": 1, "train": {"epochs": 3, "samples": 4}}),
        ({"optim.lr": 0.5}, {"seed": 1, "train": {"epochs": 2}, "optim": {"lr": 0.5}}),
    ],
)
def test_read_config_applies_changed_settings(changed: dict, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\ntrain:\n  epochs: 2\n")
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert runs.read_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"is not a run folder: it has no config\.yaml"),
        ("[]", r"config\.yaml contains no settings"),
        ("", r"config\.yaml contains no settings"),
        ("train: [1]", r"train of config\.yaml must be a mapping, got \[1\]"),
    ],
)
def test_invalid_run_config_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "changed.json").write_text('{"train.epochs": 3}')
    with pytest.raises(ConfigError, match=message):
        runs.read_config(tmp_path)


def test_run_without_an_adapter_is_reported_as_unfinished(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"has no adapter: the run did not finish \(see .*log\.txt\)"):
        runs.adapter_folder(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert runs.adapter_folder(tmp_path) == tmp_path / "adapter"


@pytest.mark.parametrize("name", ["compile", "liger"])
def test_config_with_a_replaced_setting_of_kernels_names_the_new_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"earlier version: its fast\.{name} is now fast\.kernels"):
        runs._check_edition(tmp_path, {"fast": {name: False}})
