"""Merged models: anybody loads them, they are the adapter on its base, and nothing is left of one that is not."""

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, call, finished_run, saved_run, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lora_ft import config
from lora_ft.adapters import loading
from lora_ft.errors import NonFiniteError
from lora_ft.export import merge, verify, weight_stream
from lora_ft.merge import merge as merge_adapter
from lora_ft.models.gguf import convert
from lora_ft.models.load import load_base
from lora_ft.models.quantize import dequantize_reference

VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"target_modules": ["all-linear"], "rank_pattern": dict.fromkeys(["0.mlp.down_proj", "1.mlp.up_proj"], 2)},
    {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "use_dora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp"]},
    {"quant": "nf4"},
    {"quant": "fp4", "use_dora": True},
    {"quant": "int8"},
    {"quant": "int8", "use_dora": True},
]

FRESH = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import save_file
for place in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.arange(0, 500, 9)[None]
    with torch.no_grad():
        save_file({"logits": model.eval()(ids).logits[0].contiguous()}, f"{place}.logits")
    assert not hasattr(model.config, "quantization_config"), model.config
    assert AutoTokenizer.from_pretrained(place).chat_template
assert "peft" not in sys.modules or not hasattr(model, "peft_config")
"""


def opened(folder: Path, cfg: config.TrainRun) -> weight_stream.StreamedAdapter:
    """The adapter of `saved_run`, saved beside `folder` and put onto its hollow base."""
    run = saved_run(folder.with_name(f"{folder.name}.run"), cfg)
    tokenizer = loading.adapter_tokenizer(run / "adapter", cfg.model)
    return weight_stream.open_adapter(run / "adapter", cfg.model, cfg.quant, "cpu", tokenizer)


def merged(folder: Path, cfg: config.TrainRun, dtype: torch.dtype = torch.float32) -> float:
    found = opened(folder, cfg)
    folder.mkdir()
    with weight_stream.streamed(found.model, found.modules, found.trained_on):
        expected = verify.probe(found.model, len(found.base.tokenizer))
    merge.write_folder(merge.MergedModel(found.model, found.trained_on, dtype), found.base.tokenizer, folder)
    return verify.check(folder, expected)


def exact_logits(cfg: config.TrainRun, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the attached adapter, quantized weights replaced by float32 ones from their definition."""
    _, model = adapted(cfg)
    for module in [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]:
        if isinstance(module, torch.nn.Linear):
            weight = dequantize_reference(module)
            module.forward = lambda x, w=weight, b=module.bias: torch.nn.functional.linear(x, w, b)
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0]
    return logits


@pytest.mark.closes("A19", "B01", "B03", "B08")
def test_a_fresh_process_loads_it_alone_and_its_logits_are_the_adapters(tmp_path: Path) -> None:
    cases = [
        ("gpt2", {"tie": True}), ("gpt2", {"tie": True, "use_rslora": True}), ("gpt2", {"tie": True, "use_dora": True}),
        ("llama", {}), ("llama", {"use_rslora": True}), ("llama", {"use_dora": True}),
        ("llama", {"quant": "nf4"}), ("llama", {"quant": "int8"}), ("llama", {"quant": "nf4", "use_dora": True}),
        ("gpt2", {"quant": "nf4"}), ("gpt2", {"quant": "int8"}),
    ]  # fmt: skip
    runs = []
    for number, (family, options) in enumerate(cases):
        cfg = settings(tmp_path, family, **options)
        run = saved_run(tmp_path / f"run{number}", cfg)
        assert call("merge", f"run={run}", f"out={tmp_path / f'out{number}'}") == 0
        runs.append((cfg, tmp_path / f"out{number}"))
    places = [str(out) for _, out in runs]
    subprocess.run([sys.executable, "-c", FRESH, *places], check=True, cwd=tmp_path, capture_output=True)
    ids = torch.arange(0, 500, 9)[None]
    for cfg, out in runs:
        expected, found = exact_logits(cfg, ids), load_file(f"{out}.logits")["logits"]
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, (cfg.model.path, cfg.quant)
        assert json.loads((out / "config.json").read_text()).keys() & {"quantization_config"} == set()


@pytest.mark.closes("A19", "A20")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False])
def test_every_family_merges_and_ties_stay_ties(tmp_path: Path, family: str, tie: bool) -> None:
    assert merged(tmp_path / "out", settings(tmp_path, family, tie=tie)) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) is tie
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS)
def test_every_kind_of_adapter_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    assert merged(tmp_path / "out", settings(tmp_path, "llama", **options)) < 1e-5


@pytest.mark.closes("A19")
def test_gpt2s_embeddings_and_norms_merge(tmp_path: Path) -> None:
    options = {"target_modules": ["wte", "c_attn"], "modules_to_save": ["ln_f"], "use_dora": True}
    assert merged(tmp_path / "out", settings(tmp_path, "gpt2", **options)) < 1e-5


@pytest.mark.closes("A22")
@pytest.mark.parametrize("tie", [True, False])
def test_added_tokens_are_in_the_merged_model(tmp_path: Path, tie: bool) -> None:
    cfg = settings(tmp_path, "llama", tie=tie)
    cfg.model.added_tokens = ["<one>", "<two>"]
    run = saved_run(tmp_path / "run", cfg)
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("a <one> b <two>")])
    assert {512, 513} <= set(ids[0].tolist())
    expected = exact_logits(cfg, ids)
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(("family", "dtype"), [*zip(FAMILIES, cycle((torch.bfloat16, torch.float16)))])
def test_half_precision_is_the_float32_merge_rounded_once(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    cfg = settings(tmp_path, family)
    merged(tmp_path / "full", cfg)
    assert 1e-5 < merged(tmp_path / "half", cfg, dtype) < verify.tolerance(dtype)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].to(dtype), half[name]) for name in full)


def test_a_base_in_bfloat16_is_merged_in_float32_and_written_in_bfloat16(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", use_dora=True)
    cfg.model.dtype = config.Dtype.bfloat16
    run = saved_run(tmp_path / "run", cfg)
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    settings_ = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings_["dtype"] == settings_["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_older_readers_find_rope_and_dtype_under_their_names(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    cfg = settings(tmp_path, "llama")
    path = Path(cfg.model.path) / "config.json"
    described = json.loads(path.read_text())
    described["rope_parameters"] = {"rope_theta": 54321.0, **(rope or {"rope_type": "default"})}
    path.write_text(json.dumps(described))
    assert merged(tmp_path / "out", cfg) < 1e-5
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 54321.0
    assert found.get("rope_scaling") == rope
    assert found["torch_dtype"] == "float32"


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    assert merged(tmp_path / "out", settings(tmp_path, "llama")) < 1e-5
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    tensors = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert tensors == index["weight_map"]


@pytest.mark.parametrize(
    ("family", "quant"),
    [("gpt2", "none"), ("gpt2", "nf4"), ("llama", "int8"), ("llama", "none"), ("qwen3", "nf4"), ("gpt_neox", "int8")],
)
def test_flowing_through_files_gives_the_bytes_of_a_base_in_memory(tmp_path: Path, family: str, quant: str) -> None:
    cfg = settings(tmp_path, family, quant=quant, tie=family != "llama")
    cfg.quant.compute_dtype = config.Dtype.bfloat16  # to which a quantized layer's bias is rounded
    found = opened(tmp_path / "out", cfg)
    whole, _ = loading.open_adapter(tmp_path / "out.run" / "adapter", cfg.model, cfg.quant, "cpu", found.base.tokenizer)
    read = weight_stream.loaded(whole.model, found.modules)
    merged, twin = (merge.MergedModel(found.model, each, torch.float32) for each in (found.trained_on, read))
    assert merged.names.keys() == twin.names.keys()
    for name in merged.names:
        assert torch.equal(merged[name], twin[name]), name


@pytest.mark.parametrize("options", VARIANTS[:7])
def test_peft_merges_to_the_same_weights_in_float64(tmp_path: Path, options: dict[str, Any]) -> None:
    cfg = settings(tmp_path, "llama", **options)
    found = opened(tmp_path / "out", cfg)
    _, attached = loading.open_adapter(
        tmp_path / "out.run" / "adapter", cfg.model, cfg.quant, "cpu", found.base.tokenizer
    )
    expected = attached.double().merge_and_unload().state_dict()
    merged = merge.MergedModel(found.model, found.trained_on, torch.float32)
    assert merged.names.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(merged[name].double(), weight, rtol=1e-5, atol=1e-6), name


def test_no_weight_of_the_base_stays_in_memory(tmp_path: Path) -> None:
    found = opened(tmp_path / "out", settings(tmp_path, "llama", use_dora=True, modules_to_save=["lm_head"]))
    hollow = [p for m in found.modules for p in m._parameters.values() if p is not None and p.numel() > 1]
    alive: list[int] = []
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        held = sum(
            p.untyped_storage().nbytes() > 8 for m in found.modules for p in m._parameters.values() if p is not None
        )
        most = max(most, held)
        alive.append(1)
        return found.trained_on(name)

    with weight_stream.streamed(found.model, found.modules, read):
        first = verify.probe(found.model, 512)
    assert most <= 1 and len(alive) >= len(hollow) - 1  # the head's copy was trained: the base's is not asked for
    assert all(
        p.untyped_storage().nbytes() <= 8 for m in found.modules for p in m._parameters.values() if p is not None
    )
    _, attached = loading.open_adapter(tmp_path / "out.run" / "adapter",
                                      config.Model(path=str(tmp_path / "llama")), config.Quant(), "cpu",
                                      found.base.tokenizer)  # fmt: skip
    assert torch.equal(verify.probe(attached, 512).logits, first.logits)


def test_files_of_other_names_and_shards_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "gpt2", tie=True)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    weights = {k.removeprefix("transformer."): t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    folder = Path(cfg.model.path)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in files.items():
        save_file({key: weights[key].clone() for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merged(tmp_path / "out", cfg) < 1e-5


def test_an_architecture_that_computes_its_tensors_is_loaded_as_a_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(tmp_path, "llama", quant="nf4")
    assert merged(tmp_path / "streamed", cfg) < 1e-5
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["norm"])
    assert merged(tmp_path / "whole", cfg) < 1e-5
    assert "the base is loaded as a whole" in caplog.text and "float32" in caplog.text
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_written_has_the_modes_of_the_umask_and_the_runs_template(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'new' / 'out'}") == 0
    out = tmp_path / "new" / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / name).stat().st_mode & 0o777 == 0o644
    assert (out / "chat_template.jinja").read_text() == (run / "adapter" / "chat_template.jinja").read_text()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def damaged_weights(layer: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    return weight  # the adapter forgotten


@pytest.mark.closes("B03")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_not_the_adapter_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    run = finished_run(tmp_path, "llama")
    monkeypatch.setattr(merge, "_lora_weight", damaged_weights)
    before = sorted(tmp_path.iterdir())
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", f"dtype={dtype}") == 5
    assert "the merged model is not the adapter on its base" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_from_python_a_merge_returns_what_it_measured_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path, "llama", quant="nf4")
    run = saved_run(tmp_path / "run", cfg)
    command = config.MergeRun(run=str(run), model=cfg.model, quant=cfg.quant, data=cfg.data, device="cpu")
    capsys.readouterr()
    result = merge_adapter(replace(command, out=str(tmp_path / "out")))
    assert result.out == tmp_path / "out" and str(result.out) in result.summary and result.rank is None
    assert result.distance is not None and result.distance < 1e-5
    assert result.comparison and result.comparison.record() == json.loads((run / "merge.json").read_text())
    small = merge_adapter(replace(command, out=str(tmp_path / "small"), truncate_rank=2))
    assert small.rank == 2 and [row.rank for row in small.ranks] == [1, 2, 4]
    assert capsys.readouterr().out == ""


def test_a_model_that_gguf_cannot_hold_is_refused_before_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "gpt_neox")
    monkeypatch.setattr(merge, "write_folder", lambda *arguments: pytest.fail("merged"))
    assert call("merge", f"run={run}", f"out={tmp_path / 'm.gguf'}", "gguf=f16") == 2
    assert "GGUF files are written for models of type llama" in capsys.readouterr().err


def test_an_existing_folder_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_too_small_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 7
    told = capsys.readouterr().err
    assert str(tmp_path) in told and "0.05 GB needed, 0.00 GB free" in told
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    found = opened(tmp_path / "out", settings(tmp_path, "llama"))
    layer = found.base.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data[0, 0] = 1e7
    with pytest.raises(NonFiniteError, match=r"layers.0.self_attn.q_proj.weight: .* overflow torch.float16"):
        merge.MergedModel(found.model, found.trained_on, torch.float16)["model.layers.0.self_attn.q_proj.weight"]
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers.0.self_attn.q_proj.weight: .* not finite"):
        merge.MergedModel(found.model, found.trained_on, torch.float32)["model.layers.0.self_attn.q_proj.weight"]


def test_an_overflow_ends_in_exit_8_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "llama")
    path = Path(cfg.model.path) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(weights, path, metadata={"format": "pt"})
    run = saved_run(tmp_path / "run", cfg)
    before = sorted(tmp_path.iterdir())
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", "dtype=fp16") == 8
    assert "layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.closes("D03", "B05")
@pytest.mark.parametrize("change", ["base", "quant"])
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    run = finished_run(tmp_path, "llama", quant="nf4")
    other = tiny_folder(tmp_path / "other", "llama", seed=5)
    words = [f"model.path={other}"] if change == "base" else ["quant.kind=fp4"]
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", *words) == 5
    told = capsys.readouterr().err
    assert ("weights_sha256" if change == "base" else "quantization") in told
    assert not (tmp_path / "out").exists()


@pytest.mark.closes("A20")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_one_end_of_a_tie_changed_alone_is_written_untied(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(tmp_path, "llama", tie=True)
    elsewhere(tmp_path / "adapter", cfg, r=2, target_modules=[end], init_lora_weights=False)
    words = [f"adapter_path={tmp_path / 'adapter'}", f"model.path={cfg.model.path}", f"out={tmp_path / 'out'}"]
    assert call("merge", "model=local", *words) == 0
    assert "is written untied" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(cfg.model.path) / "model.safetensors")["model.embed_tokens.weight"]
    changed, kept = ("lm_head", "model.embed_tokens") if end == "lm_head" else ("model.embed_tokens", "lm_head")
    assert torch.equal(weights[f"{kept}.weight"], base) and not torch.equal(weights[f"{changed}.weight"], base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:Adapter 'default'")
def test_kinds_that_no_weight_can_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "gpt_neox")
    elsewhere(tmp_path / "adapter", cfg, r=2, target_modules=["dense"], lora_bias=True)
    words = [f"adapter_path={tmp_path / 'adapter'}", f"model.path={cfg.model.path}", f"out={tmp_path / 'out'}"]
    assert call("merge", "model=local", *words) == 5
    assert "attention.dense: an adapter of this kind" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def elsewhere(folder: Path, cfg: config.TrainRun, **options: Any) -> None:
    """An adapter as PEFT alone saves it."""
    base = load_base(cfg.model, cfg.quant, "cpu")
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder, save_embedding_layers=False)


def test_a_run_without_quantization_says_that_onto_is_without_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", "base_weights=original") == 0
    assert "base_weights=original has no effect" in caplog.text
    assert not (tmp_path / "out" / "merge.json").exists()


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_holds_the_merged_model(tmp_path: Path, kind: str) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'folder'}") == 0
    assert call("merge", f"run={run}", f"out={tmp_path / 'new' / 'model.gguf'}", f"gguf={kind}") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]
    back = convert.converted(tmp_path / "new" / "model.gguf")[0]
    expected, found = load_file(tmp_path / "folder" / "model.safetensors"), load_file(back / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        error = float((found[name] - weight).norm() / weight.norm())
        assert error == 0 if kind == "f32" else error < 0.01


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_gives_back_the_forward_that_a_quantized_layer_had(tmp_path: Path, fails: bool) -> None:
    base, model = adapted(settings(tmp_path, "llama", quant="nf4"))
    layers = [m for m in base.model.modules() if type(getattr(m, "weight", None)).__name__ == "Params4bit"]
    layers = [m for m in layers if isinstance(m, torch.nn.Linear)]
    own = layers[0].forward = functools.partial(type(layers[0]).forward, layers[0])
    with pytest.raises(IndexError) if fails else contextlib.nullcontext():
        verify.probe(model, 10**6 if fails else 512)
    assert layers[0].forward is own
    assert not any("forward" in vars(layer) for layer in layers[1:])
