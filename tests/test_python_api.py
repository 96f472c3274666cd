"""The Python API: the examples of docs/python.md run, rows may be lists or datasets, and imports stay light."""

import io
import json
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import pytest
from finished import settings
from hydra import compose, initialize_config_dir, version
from rich.console import Console
from tiny import tiny_folder

import lora_ft
from lora_ft import config, run_rows, runs
from lora_ft.cli import entry
from lora_ft.errors import CheckpointError, ConfigError, DataError
from lora_ft.training import progress

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
# Overrides that make the runs of the page short and use a tiny base; the code of the page is not changed.
SHORT = ["train.max_steps=2", "train.tokens_per_step=64", "train.samples=1", "train.eval_rows=2", "device=cpu",
         "model.path=llama", "data.max_length=256", "data.too_long=drop"]  # fmt: skip
PAIRS = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {n + n}."} for n in range(30)]


def test_python_examples_in_the_docs_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path, "llama")
    (tmp_path / "cities.csv").write_text("city,country\n" + "".join(f"City {n},Country {n}\n" for n in range(9)))
    compose, sweep, evaluate = lora_ft.compose, lora_ft.sweep, lora_ft.evaluate
    monkeypatch.setattr(lora_ft, "compose", lambda command, overrides: compose(
        command, [*overrides, *(SHORT if command == "train" and "adapter.rr=8" not in overrides else [])]))  # fmt: skip
    monkeypatch.setattr(lora_ft, "sweep", lambda overrides, folder: sweep([*overrides, *SHORT], folder))
    few = ["eval.max_new_tokens=4"]
    monkeypatch.setattr(lora_ft, "evaluate", lambda source, metrics: evaluate(source, metrics, few))
    assert len(BLOCKS) >= 7
    (tmp_path / "page.py").write_text("\n".join(BLOCKS))
    shown = io.StringIO()
    with redirect_stdout(shown):
        runpy.run_path(str(tmp_path / "page.py"))
    assert "adapter.rr is not a setting; nearest: adapter.r" in shown.getvalue()
    assert (tmp_path / "merged" / "config.json").is_file() and (tmp_path / "package" / "SHA256SUMS").is_file()
    assert (tmp_path / "ranks" / "report.html").is_file() and "step 2 of 2: loss" in shown.getvalue()


def tiny(tmp_path: Path, **train: object) -> config.TrainRun:
    cfg = settings(tmp_path, "llama")
    cfg.data = config.Data()
    cfg.train = config.Train(**{"max_steps": 3, "tokens_per_step": 120, "samples": 0} | train)
    return cfg


def test_rows_from_list_dataset_iterator_and_file_give_the_same_adapter(tmp_path: Path) -> None:
    cfg = tiny(tmp_path)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    inputs = [{"rows": PAIRS}, {"rows": datasets.Dataset.from_list(PAIRS)}, {"rows": iter(PAIRS)}]
    trained = [lora_ft.train(cfg, **rows, folder=tmp_path / f"run{n}") for n, rows in enumerate(inputs)]
    cfg.data.path = str(file)
    trained.append(lora_ft.train(cfg, folder=tmp_path / "file"))
    assert len({run.result.adapter_sha256 for run in trained}) == 1
    assert [line["step"] for line in trained[0].history] == [0, 1, 2, 3]
    assert runs.read_config(trained[0].folder)["data"]["path"] == str(trained[0].folder / "rows.jsonl")


def test_nulls_added_by_a_dataset_are_removed(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "a", "tool": {"name": "x"}}
    rows = [{"messages": [{"role": "user", "content": "q"}, message]} for message in (call, {**call, "tool": {"y": 1}})]
    run_rows.write_rows(tmp_path, datasets.Dataset.from_list(rows), None)
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert stored[0]["messages"][1]["tool"] == {"name": "x"} and stored[1]["messages"][1]["tool"] == {"y": 1}


@pytest.mark.parametrize(("row", "message"), [(["a"], r"rows\[1\] .*must be a dict, got list"),
                                          ({"prompt": {1, 2}}, r"rows\[1\] cannot be stored as JSON: .*set"),
                                          ({"prompt": float("nan")}, r"rows\[1\] cannot be stored")])  # fmt: skip
def test_invalid_row_is_named(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        lora_ft.train(tiny(tmp_path), rows=[PAIRS[0], row], folder=tmp_path / "run")
    assert lora_ft.train(tiny(tmp_path), rows=PAIRS, folder=tmp_path / "run").result.steps == 3


def test_interrupted_run_is_resumed_from_python(tmp_path: Path) -> None:
    class Stop(lora_ft.Callback):
        def on_step(self, state, metrics):
            if state.step == 2:
                raise KeyboardInterrupt

    cfg = tiny(tmp_path, save_every_steps=1)
    expected = lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "whole").result
    with pytest.raises(KeyboardInterrupt):
        lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "run", callbacks=[Stop()])
    cfg.resume = "auto"
    run = lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "run")
    assert run.result.adapter_sha256 == expected.adapter_sha256
    assert [line["step"] for line in run.history] == [0, 1, 2, 3]


def test_stop_requested_before_the_first_step_takes_effect_after_it(tmp_path: Path) -> None:
    class Stop(lora_ft.Callback):
        def on_start(self, state):
            state.request_stop("enough")

    result = lora_ft.train(tiny(tmp_path), rows=PAIRS, folder=tmp_path / "run", callbacks=[Stop()]).result
    assert (result.steps, result.stopped_by, result.stopped_early) == (1, "enough", True)


def test_rows_of_a_run_that_has_not_begun_can_be_corrected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="completion"):
        lora_ft.train(tiny(tmp_path), rows=[PAIRS[0], {"prompt": "c"}], folder=tmp_path / "run")
    assert lora_ft.train(tiny(tmp_path), rows=PAIRS, folder=tmp_path / "run").result.steps == 3


@pytest.mark.parametrize(("arguments", "message"), [
    ({"rows": "cities.csv"}, "rows must be a list of dicts or a datasets.Dataset, got str"),
    ({"rows": PAIRS[0]}, "rows must be a list of dicts or a datasets.Dataset, got dict"),
    ({"callbacks": [lora_ft.Callback]}, r"callbacks\[0\] must be an instance of lora_ft.Callback, got the class"),
    ({"callbacks": lora_ft.Callback()}, "callbacks must be a list"),
    ({"cfg": {"adapter": {"r": 4}}}, "cfg must be a TrainRun of lora_ft.compose, got dict"),
    ({"cfg": config.EvalRun()}, "cfg must be a TrainRun of lora_ft.compose, got EvalRun"),
])  # fmt: skip
def test_wrong_argument_of_train_is_a_config_error(arguments: dict, message: str, tmp_path: Path) -> None:
    given = {"cfg": tiny(tmp_path), "rows": PAIRS, "folder": tmp_path / "run"} | arguments
    with pytest.raises(ConfigError, match=message):
        lora_ft.train(**given)
    assert not (tmp_path / "run").exists()


def test_overrides_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match=r"overrides must be a list, as in \['adapter.r=8'\], got 'adapter.r=8'"):
        lora_ft.compose("train", "adapter.r=8")
    with pytest.raises(ConfigError, match="overrides must be a list"):
        lora_ft.sweep("adapter.r=8", folder="never")


@pytest.mark.parametrize("keep", config.Keep)
def test_stopped_run_is_evaluated_at_its_last_step(keep: config.Keep, tmp_path: Path, capsys) -> None:
    class Stop(lora_ft.Callback):
        def on_step(self, state, metrics):
            if state.step == 2:
                state.request_stop("the train loss is low enough")

    cfg = tiny(tmp_path, max_steps=4, keep=keep)
    run = lora_ft.train(cfg, rows=PAIRS[:20], eval_rows=PAIRS[20:], folder=tmp_path / "run", callbacks=[Stop()])
    result = run.result
    assert (result.steps, result.stopped_by) == (2, "the train loss is low enough")
    assert result.eval_loss != result.base_eval_loss
    assert result.eval_loss == pytest.approx(lora_ft.evaluate(run.folder).comparison.adapter.loss, rel=1e-6)
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in run.history] == [
        (0, False, True), (1, True, False), (2, True, False), (2, False, True),
    ]  # fmt: skip
    assert "stopped after step 2 of 4: the train loss is low enough" in (run.folder / "log.txt").read_text()
    with pytest.raises(SystemExit):
        entry.run("train", [f"resume={run.folder}"])
    assert "stopped after step 2: the train loss is low enough" in capsys.readouterr().out
    cfg.resume, cfg.train.max_steps = "auto", 5
    longer = lora_ft.train(cfg, rows=PAIRS[:20], eval_rows=PAIRS[20:], folder=tmp_path / "run")
    assert (longer.result.steps, longer.result.stopped_by) == (5, None)


@pytest.mark.parametrize(("group", "name", "value", "message"), [
    ("optim", "lr", "fast", r"optim\.lr.*fast"),
    ("adapter", "target_modules", "q_proj", r"adapter\.target_modules.*q_proj"),
    ("quant", "kind", "nf5", r"quant\.kind.*nf5"),
])  # fmt: skip
def test_wrong_type_in_a_config_is_a_config_error(group: str, name: str, value: object, message: str, tmp_path: Path):
    cfg = tiny(tmp_path)
    setattr(getattr(cfg, group), name, value)
    with pytest.raises(ConfigError, match=message):
        lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_attribute_of_a_config_is_an_error(tmp_path: Path) -> None:
    cfg = tiny(tmp_path)
    with pytest.raises(AttributeError, match="learning_rate"):
        cfg.optim.learning_rate = 3.0
    with pytest.raises(AttributeError, match="lr"):
        cfg.lr = 3.0


def test_enum_setting_takes_its_name(tmp_path: Path) -> None:
    cfg = tiny(tmp_path)
    cfg.optim.schedule = "cosine"
    run = lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "run")
    assert runs.read_config(run.folder)["optim"]["schedule"] == "cosine"


def test_error_of_a_run_is_raised_even_if_on_end_fails(tmp_path: Path) -> None:
    outcomes = []

    class Broken(lora_ft.Callback):
        def on_step(self, state, metrics):
            raise KeyError("first")

        def on_end(self, state, outcome):
            raise AttributeError("second")

    class Last(lora_ft.Callback):
        def on_end(self, state, outcome):
            outcomes.append(outcome)

    with pytest.raises(KeyError, match="first") as caught:
        lora_ft.train(tiny(tmp_path), rows=PAIRS, folder=tmp_path / "run", callbacks=[Broken(), Last()])
    assert outcomes == [caught.value]
    assert "Broken.on_end failed: AttributeError: second" in (tmp_path / "run" / "log.txt").read_text()


def test_config_without_data_path_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        lora_ft.train(tiny(tmp_path), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compose_keeps_the_state_of_another_hydra_app(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        lora_ft.compose("train", ["adapter.r=4"])
        assert compose("app").x == 1 and str(version.getbase()) == "1.2"


def test_public_names_are_frozen() -> None:
    assert sorted(lora_ft.__all__) == [
        "Callback", "compose", "evaluate", "load", "merge", "plan", "publish", "sweep", "train",
    ]  # fmt: skip
    assert all(getattr(lora_ft, name).__doc__ for name in lora_ft.__all__)


@pytest.mark.nightly
def test_public_functions_survive_importing_modules_of_the_same_name() -> None:
    code = (
        "import lora_ft.train, lora_ft.sweep, lora_ft; from lora_ft.train import Run; print(lora_ft.train.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "lora_ft\n"


def test_progress_is_live_only_in_notebooks_and_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda name: name == "ipywidgets")
    for settings_of, live in (({"force_jupyter": True}, True), ({"force_terminal": True}, True), ({}, False)):
        console = Console(file=io.StringIO(), **settings_of)
        assert (progress.live_on(console) is not None) is live


def test_resumed_run_uses_its_stored_rows_and_refuses_others(tmp_path: Path) -> None:
    cfg = tiny(tmp_path)
    first = lora_ft.train(cfg, rows=PAIRS, folder=tmp_path / "run").result
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    cfg.resume, cfg.train.max_steps = str(tmp_path / "run"), 5
    with pytest.raises(ConfigError, match="name two folders"):
        lora_ft.train(cfg, folder=tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds other rows: a resumed run"):
        lora_ft.train(cfg, rows=PAIRS[1:])
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == before
    assert cfg.data.path == "", "the caller's config must not change"
    longer = lora_ft.train(cfg)
    assert (first.steps, longer.result.steps, longer.folder) == (3, 5, tmp_path / "run")
    cfg.resume = "auto"
    with pytest.raises(ConfigError, match="name it with folder="):
        lora_ft.train(cfg)
