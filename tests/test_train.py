"""The train command on tiny models, from the command line to the run folder: files, results and errors."""

import json
import math
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from finished import QUESTIONS, call, rows_file
from omegaconf import OmegaConf
from peft import PeftModel
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_ft import config, runs
from lora_ft.adapters import audit, peft_folder
from lora_ft.data.dataset import prepare
from lora_ft.errors import MismatchError

QUICK = (
    "train.max_steps=4",
    "train.tokens_per_step=80",
    "adapter.r=2",
    "optim.lr=0.01",
    "data.eval_fraction=0.4",
    "train.samples=1",
)


def train(tmp_path: Path, *overrides: str, family: str = "llama", run: str = "run") -> int:
    base = tmp_path / family if (tmp_path / family).is_dir() else tiny_folder(tmp_path, family)
    data = () if any(w.startswith("data.path") for w in overrides) else (f"data.path={rows_file(tmp_path)}",)
    return call(
        "train", "model=local", f"model.path={base}", *data, f"hydra.run.dir={tmp_path / run}", *QUICK, *overrides
    )


def result(tmp_path: Path, run: str = "run") -> dict:
    return json.loads((tmp_path / run / "result.json").read_text())


@pytest.mark.closes("A17")
@pytest.mark.parametrize(
    "family, overrides",
    [
        ("gpt2", ("quant=nf4",)),
        ("llama", ("adapter=dora",)),
        ("qwen3", ("quant=int8", "adapter=rslora")),
        ("gpt_neox", ("fast=off", "train.gradient_checkpointing=every_1")),
        ("llama", ("quant=fp4", "quant.double=false", "optim=adamw_8bit", "train.packing=false")),
        ("llama", ("model.dtype=bfloat16",)),
        ("llama", ("model.added_tokens=['spider','France']",)),
        ("llama", ("adapter.modules_to_save=[norm]",)),
        (
            "llama",
            ("model.dtype=bfloat16", "adapter.modules_to_save=[norm,mlp]", "model.added_tokens=['spider','France']"),
        ),
    ],
)
def test_run_writes_all_files_and_prints_a_summary(
    family: str, overrides: tuple[str, ...], tmp_path: Path, capsys
) -> None:
    assert train(tmp_path, *overrides, family=family) == 0
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "overrides.txt",
        "environment.json",
        "check.json",
        "metrics.jsonl",
        "result.json",
        "adapter",
        "checkpoints",
        "log.txt",
    }
    assert [m["step"] for m in runs.read_metrics(folder)] == [0, 1, 2, 3, 4]
    stored = result(tmp_path)
    assert stored["steps"] == 4
    assert math.isfinite(stored["eval_loss"])
    assert stored["eval_loss"] != stored["base_eval_loss"]
    tensors = safetensors.torch.load_file(folder / "adapter" / peft_folder.WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(t.numel() for t in tensors.values()) == stored["trainable_parameters"]
    shown = capsys.readouterr().out
    for word in (
        "eval loss",
        "perplexity",
        "trainable parameters",
        "tokens/s",
        "peak memory",
        "PeftModel.from_pretrained",
    ):
        assert word in shown


def test_config_and_overrides_are_stored(tmp_path: Path) -> None:
    assert train(tmp_path, "adapter=rslora") == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["adapter"]["r"], stored["adapter"]["use_rslora"], stored["quant"]["kind"]) == (2, True, "none")
    assert "adapter=rslora" in (tmp_path / "run" / "overrides.txt").read_text().splitlines()


@pytest.mark.closes("A15", "D03")
def test_init_from_continues_an_adapter_and_refuses_another_base_or_rank(tmp_path: Path, capsys) -> None:
    assert train(tmp_path, run="one") == 0
    start = f"adapter.init_from={tmp_path / 'one' / 'adapter'}"
    assert train(tmp_path, start, "optim.lr=1e-9", run="two") == 0
    first, second = (runs.read_metrics(tmp_path / name) for name in ("one", "two"))
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-5)
    capsys.readouterr()
    assert train(tmp_path, start, family="qwen3", run="three") == 5
    assert "made for another base" in capsys.readouterr().err
    assert train(tmp_path, start, "adapter.r=4", run="four") == 5
    assert "r 2 instead of 4" in capsys.readouterr().err


def test_keep_best_saves_the_best_adapter(tmp_path: Path) -> None:
    assert train(tmp_path, "train.keep=best", "train.eval_every_steps=1", "optim.lr=0.2", "train.max_steps=8") == 0
    stored = result(tmp_path)
    curve = {m["step"]: m["eval_loss"] for m in runs.read_metrics(tmp_path / "run")}
    assert stored["best_eval_loss"] == min(curve.values()) == curve[stored["best_step"]]
    assert stored["eval_loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-6)


# name: (overrides, exit code, part of the message)
FAILURES = {
    "missing model": (("model.path=nowhere/at-all-here.gguf",), 7, "nowhere/at-all-here.gguf"),
    "broken row": (("data.path={broken}",), 4, "broken.jsonl:2"),
    "missing file": (("data.path=nothing.jsonl",), 4, "nothing.jsonl"),
    "no target": (("adapter.target_modules=[qq_proj]",), 2, "adapter.target_modules: qq_proj matches no layer"),
    "row over its micro-batch": (("train.tokens_per_microbatch=10",), 2, "train.tokens_per_microbatch"),
    "row over the length": (("data.max_length=20",), 4, "data.max_length"),
    "no such adapter": (("adapter.init_from=nowhere",), 5, "nowhere"),
}


@pytest.mark.closes("A21")
@pytest.mark.parametrize("name", FAILURES)
def test_user_error_gives_its_exit_code_and_one_message(name: str, tmp_path: Path, capfd) -> None:
    overrides, code, message = FAILURES[name]
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    assert train(tmp_path, *(word.replace("{broken}", str(tmp_path / "broken.jsonl")) for word in overrides)) == code
    shown = capfd.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.closes("A18")
def test_nonfinite_loss_exits_with_code_8(tmp_path: Path, capfd) -> None:
    folder = tiny_folder(tmp_path, "llama")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert train(tmp_path) == 8
    assert "nan" in capfd.readouterr().err


def test_training_without_eval_rows_has_no_eval_loss(tmp_path: Path, capsys) -> None:
    assert train(tmp_path, "data.eval_fraction=0") == 0
    assert result(tmp_path)["eval_loss"] is None
    assert "no eval rows" in capsys.readouterr().out


def test_sample_questions_are_printed(tmp_path: Path, capsys) -> None:
    assert train(tmp_path, "train.samples=2") == 0
    shown = capsys.readouterr().out
    assert sum(question in shown for question, _ in QUESTIONS) == 2


@pytest.mark.closes("A15", "A16")
@pytest.mark.parametrize("check", ["check_moved", "check_gradients", "check_base_unchanged", "check_trainable"])
def test_failed_audit_stops_training(check: str, tmp_path: Path, monkeypatch, capfd) -> None:
    def fails(*arguments: object) -> None:
        raise MismatchError(f"{check} failed")

    monkeypatch.setattr(audit, check, fails)
    assert train(tmp_path) == 5
    assert f"{check} failed" in capfd.readouterr().err


@pytest.mark.closes("A22")
def test_added_token_that_no_row_contains_is_refused(tmp_path: Path, capfd) -> None:
    assert train(tmp_path, "model.added_tokens=['<never>']") == 4
    assert "no training row contains <never>" in capfd.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("quant=nf4",), ("quant=int8",), ("model.dtype=bfloat16",), ("model.added_tokens=['spider','France']",),
        ("model.dtype=bfloat16", "adapter.modules_to_save=[norm,lm_head]"),
    ],
)  # fmt: skip
def test_printed_code_loads_the_trained_adapter(overrides: tuple[str, ...], tmp_path: Path, capsys) -> None:
    """The code runs with transformers and PEFT only, and its model has the reported eval loss."""
    assert train(tmp_path, *overrides, "data.eval_fraction=0.4") == 0
    shown = capsys.readouterr().out
    code = shown[shown.index("base = AutoModelForCausalLM") :]
    names: dict = {}
    names.update(torch=torch, PeftModel=PeftModel, AutoModelForCausalLM=AutoModelForCausalLM)
    names.update(BitsAndBytesConfig=BitsAndBytesConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)  # noqa: S102 (the printed code is what this test runs)
    # bitsandbytes' int8 layers round activations, except when they train on a CPU; ours never do.
    model = names["model"].train("quant=int8" in overrides)
    cfg = data_config(tmp_path / "run")
    eval_rows = prepare(cfg, AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")).eval
    total = tokens = 0
    with torch.no_grad():
        for row in eval_rows:
            ids = torch.from_numpy(row.ids.astype("int64"))
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += float(losses[torch.from_numpy(row.supervised[1:])].sum())
            tokens += int(row.supervised.sum())
    # bitsandbytes multiplies 4-bit weights in bfloat16 on CPUs that support it, and rounds the inputs of int8 layers to
    # 8 bits in eval mode; lora_ft does neither.
    bound = {"quant=nf4": 1e-3, "quant=int8": 2e-3, "model.dtype=bfloat16": 2e-2}.get("".join(overrides[:1]), 1e-5)
    assert total / tokens == pytest.approx(result(tmp_path)["eval_loss"], rel=bound)


def data_config(folder: Path) -> config.Data:
    stored = OmegaConf.merge(OmegaConf.structured(config.Data), runs.read_config(folder)["data"])
    return OmegaConf.to_object(stored)
