"""resume=FOLDER and resume=auto: the result of an uninterrupted run, the settings that may change, and refusals."""

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from faults.shim import Shim, unsafe
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft import runs
from lora_ft.adapters import peft_folder
from lora_ft.cli import entry
from lora_ft.errors import ResourceError
from lora_ft.io import durable
from lora_ft.training import checkpoint

QUICK = ("train.max_steps=6", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=2",
         "adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]", "optim.lr=0.01", "optim.schedule=cosine",
         "optim.warmup_steps=2", "data.eval_fraction=0.4", "train.eval_every_steps=2", "train.samples=0",
         "train.save_every_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and `whole`, an uninterrupted run; no test changes it."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny_folder(folder, "llama")
    rows_file(folder)
    assert call("train", *inputs(folder), f"hydra.run.dir={folder / 'whole'}") == 0
    return folder


def inputs(folder: Path) -> tuple[str, ...]:
    return ("model=local", f"model.path={folder / 'llama'}", f"data.path={folder / 'rows.jsonl'}", *QUICK)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def curve(run: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl without times and speed."""
    return [{k: v for k, v in m.items() if "second" not in k} for m in runs.read_metrics(run)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and the bytes of every file."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def stopped(folder: Path, run: Path, *overrides: str, after: int = 3, how: signal.Signals = signal.SIGTERM) -> None:
    """Start or resume a run and stop it by a signal in step `after`."""
    with pytest.MonkeyPatch.context() as patch:
        append = runs.append_metrics

        def append_and_stop(folder: Path, metrics: dict[str, float]) -> None:
            append(folder, metrics)
            if metrics["step"] == after:
                signal.raise_signal(how)

        patch.setattr(runs, "append_metrics", append_and_stop)
        assert call("train", *inputs(folder), f"hydra.run.dir={run}", *overrides) == 128 + how


@pytest.mark.closes("C03", "C04")
@pytest.mark.parametrize("overrides", [(), ("adapter=dora",), ("quant=nf4", "optim=adamw_8bit"), ("train.keep=best",)])
def test_resumed_run_matches_an_uninterrupted_run(overrides: tuple[str, ...], prepared: Path, tmp_path: Path) -> None:
    if overrides:
        assert call("train", *inputs(prepared), *overrides, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    whole = tmp_path / "whole" if overrides else prepared / "whole"
    stopped(prepared, tmp_path / "run", *overrides)
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000003"
    assert call("train", *inputs(prepared), *overrides, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto") == 0
    assert weights(tmp_path / "run") == weights(whole)
    assert curve(tmp_path / "run") == curve(whole)
    assert [m["step"] for m in curve(whole)] == list(range(7))


def test_resume_works_from_another_working_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run starts with relative paths and is resumed by a relative path from another folder."""
    monkeypatch.chdir(prepared)
    overrides = ("model.path=llama", "data.path=rows.jsonl", f"hydra.run.dir={tmp_path / 'my run'}")
    stopped(prepared, tmp_path / "my run", *overrides)
    advice = capsys.readouterr().err
    assert (
        f"stopped by SIGTERM after step 3 of 6; continue with: lora-ft train resume='{tmp_path / 'my run'}'" in advice
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        entry.run("train", ["resume=../my run"])
    assert ended.value.code == 0
    assert weights(tmp_path / "my run") == weights(prepared / "whole")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_resuming_a_finished_run_changes_nothing(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(prepared / "whole")
    for overrides in (
        (f"resume={prepared / 'whole'}",),
        (*inputs(prepared), f"hydra.run.dir={prepared / 'whole'}", "resume=auto"),
    ):
        capsys.readouterr()
        assert call("train", *overrides) == 0
        assert (
            capsys.readouterr().out
            == f"{prepared / 'whole'} is already finished. More train.epochs or train.max_steps continue it\n"
        )
    assert snapshot(prepared / "whole") == before


@pytest.mark.closes("C06")
def test_settings_that_change_the_result_are_refused_on_resume(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopped(prepared, run)
    before = snapshot(run)
    capsys.readouterr()
    assert call("train", f"resume={run}", "optim.lr=0.5", "adapter.use_dora=true", "train.max_steps=5", "seed=2") == 2
    message = capsys.readouterr().err
    assert "a resumed run cannot change the settings that decide its result:" in message
    assert message.splitlines()[1:] == [
        "  adapter.use_dora: False -> True",
        "  train.max_steps: 6 -> 5 (can only be raised)",
        "  optim.lr: 0.01 -> 0.5",
        "  seed: 0 -> 2",
    ]
    assert call("train", *inputs(prepared), f"hydra.run.dir={run}", "resume=auto", "adapter.r=3") == 2
    assert "  adapter.r: 2 -> 3" in capsys.readouterr().err
    assert snapshot(run) == before
    free = (
        "train.save_every_steps=1",
        "train.keep_checkpoints=3",
        "train.samples=1",
        "train.gradient_checkpointing=every_1",
        "track=tensorboard",
        "device=cpu",
    )
    assert call("train", f"resume={run}", *free) == 0
    assert weights(run) == weights(prepared / "whole")
    assert len(list((run / checkpoint.FOLDER).iterdir())) == 3
    assert list((run / "tensorboard").iterdir())


def test_more_epochs_continue_from_the_last_step_and_are_stored(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [override for override in inputs(prepared) if "max_steps" not in override]
    assert call("train", *overrides, f"hydra.run.dir={run}", "train.epochs=3") == 0
    first, original = curve(run), (run / "config.yaml").read_bytes()
    steps = json.loads((run / "result.json").read_text())["steps"]
    stopped(prepared, run, "resume=auto", "train.max_steps=null", "train.epochs=6", after=steps + 1)
    assert not (run / "result.json").exists()
    assert call("train", f"resume={run}") == 0  # the changed number of epochs is stored
    assert json.loads((run / "result.json").read_text())["steps"] == 2 * steps
    assert curve(run)[: len(first)] == first
    assert [m["step"] for m in curve(run)] == list(range(2 * steps + 1))
    assert (run / "config.yaml").read_bytes() == original
    assert json.loads((run / "changed.json").read_text()) == {"train.epochs": 6}
    assert call("train", f"resume={run}", "train.epochs=5") == 2


def test_failed_start_can_be_repeated_with_resume_auto(prepared: Path, tmp_path: Path) -> None:
    overrides = (*inputs(prepared), f"hydra.run.dir={tmp_path / 'run'}", "resume=auto", "track=tensorboard")
    assert call("train", *overrides, f"data.path={tmp_path / 'absent.jsonl'}") == 4
    assert call("train", *overrides, "data.max_length=8") == 4
    assert call("train", *overrides) == 0
    assert weights(tmp_path / "run") == weights(prepared / "whole")


def test_run_without_a_checkpoint_restarts_at_step_0(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(prepared, run, after=1)
    durable.remove_folder(run / checkpoint.FOLDER / "step-00000001")
    assert call("train", f"resume={run}") == 0
    assert weights(run) == weights(prepared / "whole")
    assert curve(run) == curve(prepared / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("hydra.run.dir={run}",), r"the run folder must be empty, but .*whole is not: .* with resume=auto"),
        (("resume={run}", "hydra.run.dir={run}"), "continues in that folder: leave out hydra.run.dir, or write"),
        (("resume={run}", "-m"), r"whole is not a sweep folder: it has no sweep\.json"),
        (("resume=auto",), r"resume=auto needs a folder that stays the same: hydra\.run\.dir=DIR, got runs/\$\{now:"),
        (("resume=auto", "-m"), r"resume=auto needs a folder that stays the same: hydra\.sweep\.dir=DIR"),
        (("resume={prepared}",), r"prepared\d* is not a run folder: it has no config\.yaml"),
        (("resume={prepared}/absent",), r"absent is not a run folder"),
    ],
)
def test_contradictory_resume_settings_are_refused(
    overrides: tuple[str, ...],
    message: str,
    prepared: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
    tmp_path: Path,
) -> None:
    before = snapshot(prepared)
    monkeypatch.chdir(tmp_path)
    assert (
        call("train", *inputs(prepared), *(w.format(run=prepared / "whole", prepared=prepared) for w in overrides)) == 2
    )
    assert re.search(message, capsys.readouterr().err)
    assert snapshot(prepared) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.closes("C02")
def test_run_folder_used_by_another_process_is_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(prepared / "whole")
    with runs.locked(prepared / "whole"):
        assert call("train", f"resume={prepared / 'whole'}", "train.max_steps=9") == 2
    assert "whole is in use by another process" in capsys.readouterr().err
    assert snapshot(prepared / "whole") == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("train", f"resume={prepared / 'whole'}", "train.max_steps=9", "dist=single") == 2
    assert "dist=single trains in one process, got WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.closes("C05", "C06")
def test_resume_with_changed_rows_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((prepared / "rows.jsonl").read_bytes())
    stopped(prepared, tmp_path / "run", f"data.path={rows}")
    before = snapshot(tmp_path / "run" / checkpoint.FOLDER)
    rows.write_text(rows.read_text().replace("Eight", "Nine"))
    assert call("train", f"resume={tmp_path / 'run'}") == 6
    assert "step-00000003 does not belong to this run: data was" in capsys.readouterr().err
    assert snapshot(tmp_path / "run" / checkpoint.FOLDER) == before


@pytest.mark.closes("C01")
def test_training_and_resume_fsync_in_a_safe_order(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files reach the disk before their names, and new names before the files that they replace are removed.

    The test fails if any single fsync is left out.
    """
    overrides = (*inputs(prepared), f"hydra.run.dir={tmp_path / 'run'}", "resume=auto", "train.keep_checkpoints=1")
    traces = []
    for max_steps in ("4", "6"):
        shim = Shim()
        monkeypatch.setattr(durable, "os", shim)
        assert call("train", *overrides, f"train.max_steps={max_steps}") == 0
        assert unsafe(shim.trace) == []
        traces.append(shim.trace)
    renamed = {Path(change.to).name for trace in traces for change in trace if change.name == "rename"}
    assert renamed >= {"config.yaml", "step-00000002", "adapter", peft_folder.WEIGHTS, "result.json", "changed.json"}
    synced = {change.path for change in traces[0] if change.name == "fsync"}
    assert len(synced) > 20
    for path in synced:
        assert unsafe([c for c in traces[0] if (c.name, c.path) != ("fsync", path)]), path


@pytest.mark.closes("C05")
def test_extending_a_finished_run_needs_its_checkpoint(prepared: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared / "whole", run)
    shutil.rmtree(run / "checkpoints")
    before = snapshot(run)
    assert call("train", f"resume={run}", "train.max_steps=9") == 6
    assert "is finished and has no checkpoint to continue from" in capsys.readouterr().err
    assert snapshot(run) == before


def test_failed_extension_keeps_the_finished_run(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared / "whole", run)
    monkeypatch.setattr(checkpoint, "check_free_space", _full)
    assert call("train", f"resume={run}", "train.max_steps=9") == 7
    assert (run / runs.RESULT).exists() and runs.read_config(run)["train"]["max_steps"] == 6
    monkeypatch.undo()
    assert call("train", f"resume={run}", "train.max_steps=9") == 0
    assert runs.read_result(run)["steps"] == 9 and runs.read_config(run)["train"]["max_steps"] == 9
    assert "schedule of the longer run" in (run / "log.txt").read_text()


def _full(*_: object) -> None:
    raise ResourceError("no room")


def test_nonempty_folder_without_a_run_is_refused_and_unchanged(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "draft.tmp-1234abcd").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    (tmp_path / "mine" / "draft.tmp-1234abcd" / "chapter").write_text("one")
    before = snapshot(tmp_path / "mine")
    assert call("train", *inputs(prepared), f"hydra.run.dir={tmp_path / 'mine'}") == 2
    assert snapshot(tmp_path / "mine") == before


@pytest.mark.parametrize("override", ["experiment=demo", "+mine=other"])
def test_choices_that_the_stored_config_would_hide_are_refused(override: str, prepared: Path, capsys) -> None:
    assert call("train", f"resume={prepared / 'whole'}", override) == 2
    assert f"keeps the settings of that run: leave out {override}" in capsys.readouterr().err


def test_link_out_of_a_run_folder_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "whole", tmp_path / "run")
    (tmp_path / "elsewhere.json").write_text('{"train.epochs": 7}')
    (tmp_path / "run" / "changed.json").symlink_to(tmp_path / "elsewhere.json")
    assert call("train", f"resume={tmp_path / 'run'}") == 9
