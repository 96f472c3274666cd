"""resume=FOLDER and resume=auto: the bytes of a run never stopped, from anywhere; what may change, what is refused."""

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
from lora_ft.adapters import files
from lora_ft.cli import entry
from lora_ft.errors import ResourceError
from lora_ft.io import durable
from lora_ft.training import checkpoint

QUICK = ("train.max_steps=6", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=2",
         "adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]", "optim.lr=0.01", "optim.schedule=cosine",
         "optim.warmup_steps=2", "data.eval_fraction=0.4", "train.eval_every_steps=2", "train.samples=0",
         "train.save_every_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, and a run `whole` that nothing interrupted; tests leave all of it as it is."""
    folder = tmp_path_factory.mktemp("place")
    tiny_folder(folder, "llama")
    rows_file(folder)
    assert call("train", *inputs(folder), f"hydra.run.dir={folder / 'whole'}") == 0
    return folder


def inputs(folder: Path) -> tuple[str, ...]:
    return ("model=local", f"model.path={folder / 'llama'}", f"data.path={folder / 'rows.jsonl'}", *QUICK)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / files.WEIGHTS).read_bytes()).hexdigest()


def curve(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times and speed."""
    return [{k: v for k, v in m.items() if "second" not in k} for m in runs.read_metrics(run)]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and its bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def stopped(folder: Path, run: Path, *words: str, after: int = 3, how: signal.Signals = signal.SIGTERM) -> None:
    """Begin a run, and stop it by a signal in this step."""
    with pytest.MonkeyPatch.context() as patch:
        append = runs.append_metrics

        def append_and_stop(where: Path, metrics: dict[str, float]) -> None:
            append(where, metrics)
            if metrics["step"] == after:
                signal.raise_signal(how)

        patch.setattr(runs, "append_metrics", append_and_stop)
        assert call("train", *inputs(folder), f"hydra.run.dir={run}", *words) == 128 + how


@pytest.mark.closes("C03", "C04")
@pytest.mark.parametrize("words", [(), ("adapter=dora",), ("quant=nf4", "optim=adamw_8bit"), ("train.keep=best",)])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_was(
    words: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    if words:
        assert call("train", *inputs(place), *words, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    whole = tmp_path / "whole" if words else place / "whole"
    stopped(place, tmp_path / "run", *words)
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000003"
    assert call("train", *inputs(place), *words, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto") == 0
    assert weights(tmp_path / "run") == weights(whole)
    assert curve(tmp_path / "run") == curve(whole)
    assert [m["step"] for m in curve(whole)] == list(range(7))


def test_the_folder_alone_is_enough_also_from_elsewhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was begun with paths that say something in one folder only; it is named by one in another."""
    monkeypatch.chdir(place)
    words = ("model.path=llama", "data.path=rows.jsonl", f"hydra.run.dir={tmp_path / 'my run'}")
    stopped(place, tmp_path / "my run", *words)
    advice = capsys.readouterr().err
    assert (
        f"stopped by SIGTERM after step 3 of 6; continue with: lora-ft train resume='{tmp_path / 'my run'}'" in advice
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        entry.run("train", ["resume=../my run"])
    assert ended.value.code == 0
    assert weights(tmp_path / "my run") == weights(place / "whole")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_finished_run_is_left_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(place / "whole")
    for words in ((f"resume={place / 'whole'}",), (*inputs(place), f"hydra.run.dir={place / 'whole'}", "resume=auto")):
        capsys.readouterr()
        assert call("train", *words) == 0
        assert capsys.readouterr().out == f"{place / 'whole'} is already finished\n"
    assert state(place / "whole") == before


@pytest.mark.closes("C06")
def test_settings_that_decide_the_result_are_refused_with_both_values(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopped(place, run)
    before = state(run)
    capsys.readouterr()
    assert call("train", f"resume={run}", "optim.lr=0.5", "adapter.use_dora=true", "train.max_steps=5", "seed=2") == 2
    said = capsys.readouterr().err
    assert "a resumed run cannot change the settings that decide its result:" in said
    assert said.splitlines()[1:] == [
        "  adapter.use_dora: False -> True",
        "  train.max_steps: 6 -> 5 (can only be raised)",
        "  optim.lr: 0.01 -> 0.5",
        "  seed: 0 -> 2",
    ]
    assert call("train", *inputs(place), f"hydra.run.dir={run}", "resume=auto", "adapter.r=3") == 2
    assert "  adapter.r: 2 -> 3" in capsys.readouterr().err
    assert state(run) == before
    free = (
        "train.save_every_steps=1",
        "train.keep_checkpoints=3",
        "train.samples=1",
        "train.gradient_checkpointing=every_1",
        "track=tensorboard",
        "device=cpu",
    )
    assert call("train", f"resume={run}", *free) == 0
    assert weights(run) == weights(place / "whole")
    assert len(list((run / checkpoint.FOLDER).iterdir())) == 3
    assert list((run / "tensorboard").iterdir())


def test_more_epochs_go_on_from_the_last_step_and_stay_asked_for(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [word for word in inputs(place) if "max_steps" not in word]
    assert call("train", *words, f"hydra.run.dir={run}", "train.epochs=3") == 0
    first, begun = curve(run), (run / "config.yaml").read_bytes()
    steps = json.loads((run / "result.json").read_text())["steps"]
    stopped(place, run, "resume=auto", "train.max_steps=null", "train.epochs=6", after=steps + 1)
    assert not (run / "result.json").exists()
    assert call("train", f"resume={run}") == 0  # the epochs asked for before hold
    assert json.loads((run / "result.json").read_text())["steps"] == 2 * steps
    assert curve(run)[: len(first)] == first
    assert [m["step"] for m in curve(run)] == list(range(2 * steps + 1))
    assert (run / "config.yaml").read_bytes() == begun
    assert json.loads((run / "changed.json").read_text()) == {"train.epochs": 6}
    assert call("train", f"resume={run}", "train.epochs=5") == 2


def test_auto_begins_where_nothing_is_and_where_nothing_but_a_start_is(place: Path, tmp_path: Path) -> None:
    words = (*inputs(place), f"hydra.run.dir={tmp_path / 'run'}", "resume=auto")
    assert call("train", *words, f"data.path={tmp_path / 'absent.jsonl'}") == 4
    assert call("train", *words) == 0
    assert weights(tmp_path / "run") == weights(place / "whole")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(place, run, after=1)
    durable.remove_folder(run / checkpoint.FOLDER / "step-00000001")
    assert call("train", f"resume={run}") == 0
    assert weights(run) == weights(place / "whole")
    assert curve(run) == curve(place / "whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hydra.run.dir={run}",), r"the run folder must be empty, but .*whole is not: .* or resume=auto"),
        (("resume={run}", "hydra.run.dir={run}"), "goes on in that folder: leave out hydra.run.dir, or write resume="),
        (("resume={run}", "-m"), r"whole is not a sweep folder: it has no sweep\.json"),
        (("resume=auto",), r"resume=auto needs a folder that stays the same: hydra\.run\.dir=DIR, got runs/\$\{now:"),
        (("resume=auto", "-m"), r"resume=auto needs a folder that stays the same: hydra\.sweep\.dir=DIR"),
        (("resume={place}",), r"place\d* is not a run folder: it has no config\.yaml"),
        (("resume={place}/absent",), r"absent is not a run folder"),
    ],
)
def test_a_resume_that_cannot_be_meant_is_refused(
    words: tuple[str, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    before = state(place)
    monkeypatch.chdir(tmp_path)
    assert call("train", *inputs(place), *(w.format(run=place / "whole", place=place) for w in words)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert state(place) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.closes("C02")
def test_a_folder_that_another_process_trains_in_is_left_to_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(place / "whole")
    with runs.locked(place / "whole"):
        assert call("train", f"resume={place / 'whole'}", "train.max_steps=9") == 2
    assert "whole is in use by another process" in capsys.readouterr().err
    assert state(place / "whole") == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("train", f"resume={place / 'whole'}", "train.max_steps=9", "train.samples=1") == 2
    assert "training runs in one process so far, got WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.closes("C05", "C06")
def test_rows_that_changed_meanwhile_are_another_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((place / "rows.jsonl").read_bytes())
    stopped(place, tmp_path / "run", f"data.path={rows}")
    before = state(tmp_path / "run" / checkpoint.FOLDER)
    rows.write_text(rows.read_text().replace("Eight", "Nine"))
    assert call("train", f"resume={tmp_path / 'run'}") == 6
    assert "step-00000003 does not belong to this run: data was" in capsys.readouterr().err
    assert state(tmp_path / "run" / checkpoint.FOLDER) == before


@pytest.mark.closes("C01")
def test_a_power_failure_finds_every_name_after_its_bytes_and_before_what_it_replaces_goes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run and in one that goes on: settings, checkpoints and their rotation, the adapter and the one it replaces.

    Of every file, folder and parent that is fsynced, leaving that out is noticed; but for the parent of the run, which
    Hydra makes.
    """
    words = (*inputs(place), f"hydra.run.dir={tmp_path / 'run'}", "resume=auto", "train.keep_checkpoints=1")
    traces = []
    for number in ("4", "6"):
        shim = Shim()
        monkeypatch.setattr(durable, "os", shim)
        assert call("train", *words, f"train.max_steps={number}") == 0
        assert unsafe(shim.trace) == []
        traces.append(shim.trace)
    renamed = {Path(change.to).name for trace in traces for change in trace if change.name == "rename"}
    assert renamed >= {"config.yaml", "step-00000002", "adapter", files.WEIGHTS, "result.json", "changed.json"}
    synced = {change.path for change in traces[0] if change.name == "fsync"}
    assert len(synced) > 20
    for path in synced:
        assert unsafe([c for c in traces[0] if (c.name, c.path) != ("fsync", path)]), path


def test_a_start_that_failed_may_be_corrected_and_given_again(place: Path, tmp_path: Path) -> None:
    words = [*inputs(place), f"hydra.run.dir={tmp_path / 'run'}", "resume=auto", "track=tensorboard"]
    assert call("train", *words, "data.max_length=8") == 4
    assert call("train", *words) == 0
    assert weights(tmp_path / "run") == weights(place / "whole")


@pytest.mark.closes("C05")
def test_a_finished_run_is_not_made_longer_without_its_last_state(place: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    shutil.rmtree(run / "checkpoints")
    before = state(run)
    assert call("train", f"resume={run}", "train.max_steps=9") == 6
    assert "is finished and has no checkpoint to continue from" in capsys.readouterr().err
    assert state(run) == before


def test_a_longer_run_that_cannot_start_leaves_the_finished_one(place: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    monkeypatch.setattr(checkpoint, "check_free_space", _full)
    assert call("train", f"resume={run}", "train.max_steps=9") == 7
    assert (run / runs.RESULT).exists() and runs.read_config(run)["train"]["max_steps"] == 6
    monkeypatch.undo()
    assert call("train", f"resume={run}", "train.max_steps=9") == 0
    assert runs.read_result(run)["steps"] == 9 and runs.read_config(run)["train"]["max_steps"] == 9
    assert "schedule of the longer run" in (run / "log.txt").read_text()


def _full(*_: object) -> None:
    raise ResourceError("no room")


def test_a_folder_of_the_users_own_is_refused_and_untouched(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "draft.tmp-1234abcd").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    (tmp_path / "mine" / "draft.tmp-1234abcd" / "chapter").write_text("one")
    before = state(tmp_path / "mine")
    assert call("train", *inputs(place), f"hydra.run.dir={tmp_path / 'mine'}") == 2
    assert state(tmp_path / "mine") == before


@pytest.mark.parametrize("word", ["experiment=demo", "+mine=other"])
def test_what_would_be_hidden_by_the_stored_settings_is_refused(word: str, place: Path, capsys) -> None:
    assert call("train", f"resume={place / 'whole'}", word) == 2
    assert f"keeps the settings of that run: leave out {word}" in capsys.readouterr().err


def test_a_link_out_of_a_run_folder_is_not_read(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "whole", tmp_path / "run")
    (tmp_path / "elsewhere.json").write_text('{"train.epochs": 7}')
    (tmp_path / "run" / "changed.json").symlink_to(tmp_path / "elsewhere.json")
    assert call("train", f"resume={tmp_path / 'run'}") == 9
