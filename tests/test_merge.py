"""Merged models: they load with plain transformers, match base and adapter, and are removed if they do not."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ft import config
from lora_ft.adapters import attach, loading
from lora_ft.errors import NonFiniteError
from lora_ft.export import merge, verify, weight_stream
from lora_ft.merge import merge as merge_adapter
from lora_ft.models.gguf import convert
from lora_ft.models.load import Base, load_base
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


def attached(folder: Path, cfg: config.TrainRun) -> tuple[Base, PeftModel]:
    """Return the adapter of `saved_run`, saved beside `folder`, on its base."""
    run = saved_run(folder.with_name(f"{folder.name}.run"), cfg)
    tokenizer = loading.adapter_tokenizer(run / "adapter", cfg.model)
    return loading.open_adapter(run / "adapter", cfg.model, cfg.quant, "cpu", tokenizer)


def merged(folder: Path, cfg: config.TrainRun, dtype: torch.dtype = torch.float32) -> float:
    """Write the merged model into `folder`; return the distance of its logits."""
    base, model = attached(folder, cfg)
    folder.mkdir()
    expected = verify.probe(model, len(base.tokenizer))
    merge.write_folder(merge.MergedModel(model, dtype), base.tokenizer, folder)
    return verify.check(folder, expected)[0]


def exact_logits(cfg: config.TrainRun, ids: torch.Tensor) -> torch.Tensor:
    """Return the attached adapter's logits, with quantized weights dequantized by their definition."""
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
def test_merged_model_in_a_new_process_matches_attached_logits(tmp_path: Path) -> None:
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
def test_merge_of_every_family_keeps_tied_weights_tied(tmp_path: Path, family: str, tie: bool) -> None:
    assert merged(tmp_path / "out", settings(tmp_path, family, tie=tie)) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) is tie
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS)
def test_merged_model_matches_attached_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    assert merged(tmp_path / "out", settings(tmp_path, "llama", **options)) < 1e-5


@pytest.mark.closes("A19")
def test_merged_gpt2_with_embeddings_and_norms_matches_attached_logits(tmp_path: Path) -> None:
    options = {"target_modules": ["wte", "c_attn"], "modules_to_save": ["ln_f"], "use_dora": True}
    assert merged(tmp_path / "out", settings(tmp_path, "gpt2", **options)) < 1e-5


@pytest.mark.closes("A17", "A19")
@pytest.mark.parametrize(("modules", "tokens"), [(["norm", "lm_head", "mlp"], []), ([], ["<one>", "<two>"])])
def test_merge_rounds_modules_and_rows_trained_over_a_bfloat16_base_once(
    tmp_path: Path, modules: list[str], tokens: list[str]
) -> None:
    """The merged model has the trained float32 values, rounded as the attached adapter rounds them."""
    cfg = settings(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=modules)
    cfg.model.dtype, cfg.model.added_tokens = config.Dtype.bfloat16, tokens
    run = saved_run(tmp_path / "run", cfg)
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 0
    _, model = adapted(cfg)
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged_model.dtype is torch.bfloat16
    trained = {n: p.detach() for n, p in attach.trainable(model, "first").items() if ".lora_" not in n}
    assert trained
    for name, value in trained.items():
        key = name.removeprefix("base_model.model.").replace(".modules_to_save.first", "")
        rows = slice(None)
        if tokens:
            key, rows = f"{key.partition('.token_adapter')[0]}.weight", slice(512, 514)
        assert value.dtype is torch.float32
        assert torch.equal(merged_model.get_parameter(key)[rows], value.bfloat16())


@pytest.mark.closes("A22")
@pytest.mark.parametrize("tie", [True, False])
def test_merged_model_has_the_added_tokens(tmp_path: Path, tie: bool) -> None:
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
def test_half_precision_merge_is_the_float32_merge_rounded_once(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    cfg = settings(tmp_path, family)
    merged(tmp_path / "full", cfg)
    assert 1e-5 < merged(tmp_path / "half", cfg, dtype) < verify.tolerance(dtype)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].to(dtype), half[name]) for name in full)


def test_merge_of_a_bfloat16_base_is_written_in_bfloat16(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", use_dora=True)
    cfg.model.dtype = config.Dtype.bfloat16
    run = saved_run(tmp_path / "run", cfg)
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    settings_ = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings_["dtype"] == settings_["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("out", ["gguf=f32", "dtype=float32"])
def test_bfloat16_base_merges_into_float32_files(tmp_path: Path, out: str) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.model.dtype = config.Dtype.bfloat16
    run = saved_run(tmp_path / "run", cfg)
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", out) == 0


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_config_has_the_old_names_of_rope_theta_and_dtype(tmp_path: Path, rope: dict[str, Any] | None) -> None:
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


def test_large_model_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    assert merged(tmp_path / "out", settings(tmp_path, "llama")) < 1e-5
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    tensors = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert tensors == index["weight_map"]


@pytest.mark.parametrize("options", VARIANTS[:7])
def test_merged_weights_match_pefts_merge_in_float64(tmp_path: Path, options: dict[str, Any]) -> None:
    _, model = attached(tmp_path / "out", settings(tmp_path, "llama", **options))
    merged_model = merge.MergedModel(model, torch.float32)
    merged = {name: merged_model[name].double() for name in merged_model.names}
    expected = model.double().merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(merged[name], weight, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("family", "quant"), [("llama", "none"), ("gpt2", "nf4")])
def test_streamed_model_holds_one_weight_and_computes_the_same(tmp_path: Path, family: str, quant: str) -> None:
    _, model = attached(tmp_path / "out", settings(tmp_path, family, quant=quant))
    merged = merge.MergedModel(model, torch.float32)
    expected = verify.probe(model, 512)
    weight_stream.use_placeholders(merged.plain.eval())
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(p.untyped_storage().nbytes() > 8 for p in merged.plain.parameters()))
        return merged[name]

    with weight_stream.streamed(merged.plain, read), torch.no_grad():
        found = merged.plain(expected.ids[None]).logits[0]
    assert most <= 1, "a weight and a bias belong to one layer"
    assert all(p.untyped_storage().nbytes() <= 8 for p in merged.plain.parameters())
    assert verify.distance(found, expected.logits, torch.float32) < 1e-5


def test_merged_folder_has_umask_modes_and_the_runs_template(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'new' / 'out'}") == 0
    out = tmp_path / "new" / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / name).stat().st_mode & 0o777 == 0o644
    assert (out / "chat_template.jinja").read_text() == (run / "adapter" / "chat_template.jinja").read_text()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def damaged_weights(layer: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    return weight  # without the adapter


@pytest.mark.closes("B03")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_with_wrong_logits_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    run = finished_run(tmp_path, "llama")
    monkeypatch.setattr(merge, "_lora_weight", damaged_weights)
    before = sorted(tmp_path.iterdir())
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", f"dtype={dtype}") == 5
    assert "the merged model differs from base and adapter" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_merge_from_python_returns_measurements_and_prints_nothing(
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


def test_unsupported_gguf_architecture_is_refused_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "granitemoe", target_modules=["q_proj"])
    monkeypatch.setattr(merge, "write_folder", lambda *arguments: pytest.fail("merged"))
    assert call("merge", f"run={run}", f"out={tmp_path / 'm.gguf'}", "gguf=f16") == 2
    assert "GGUF files can be written for models of type llama" in capsys.readouterr().err


def test_existing_folder_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_is_reported_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}") == 7
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "0.05 GB needed, 0.00 GB free" in error
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_or_are_nan_are_refused(tmp_path: Path) -> None:
    base, model = attached(tmp_path / "out", settings(tmp_path, "llama"))
    layer = base.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data[0, 0] = 1e7
    with pytest.raises(NonFiniteError, match=r"layers.0.self_attn.q_proj.weight: .* overflow torch.float16"):
        merge.MergedModel(model, torch.float16)["model.layers.0.self_attn.q_proj.weight"]
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers.0.self_attn.q_proj.weight: .* not finite"):
        merge.MergedModel(model, torch.float32)["model.layers.0.self_attn.q_proj.weight"]


def test_overflow_exits_with_8_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    run = finished_run(tmp_path, "llama", quant="nf4")
    other = tiny_folder(tmp_path / "other", "llama", seed=5)
    words = [f"model.path={other}"] if change == "base" else ["quant.kind=fp4"]
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", *words) == 5
    error = capsys.readouterr().err
    assert ("weights_sha256" if change == "base" else "quantization") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.closes("A20")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_adapter_on_one_of_two_tied_matrices_is_written_untied(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(tmp_path, "llama", tie=True)
    made_by_peft(tmp_path / "adapter", cfg, r=2, target_modules=[end], init_lora_weights=False)
    words = [f"adapter_path={tmp_path / 'adapter'}", f"model.path={cfg.model.path}", f"out={tmp_path / 'out'}"]
    assert call("merge", "model=local", *words) == 0
    assert "is written untied" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(cfg.model.path) / "model.safetensors")["model.embed_tokens.weight"]
    changed, kept = ("lm_head", "model.embed_tokens") if end == "lm_head" else ("model.embed_tokens", "lm_head")
    assert torch.equal(weights[f"{kept}.weight"], base) and not torch.equal(weights[f"{changed}.weight"], base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:Adapter 'default'")
def test_adapter_with_lora_biases_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "gpt_neox")
    made_by_peft(tmp_path / "adapter", cfg, r=2, target_modules=["dense"], lora_bias=True)
    words = [f"adapter_path={tmp_path / 'adapter'}", f"model.path={cfg.model.path}", f"out={tmp_path / 'out'}"]
    assert call("merge", "model=local", *words) == 5
    assert "lora_bias=True: its biases are not part of the base's weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def made_by_peft(folder: Path, cfg: config.TrainRun, **options: Any) -> None:
    """Save an adapter with PEFT alone."""
    base = load_base(cfg.model, cfg.quant, "cpu")
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder, save_embedding_layers=False)


def test_base_weights_without_quantization_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", "base_weights=original") == 0
    assert "base_weights=original has no effect" in caplog.text
    assert not (tmp_path / "out" / "merge.json").exists()


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_gguf_file_holds_the_merged_weights(tmp_path: Path, kind: str) -> None:
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
def test_probe_restores_the_forwards_of_quantized_layers(tmp_path: Path, fails: bool) -> None:
    base, model = adapted(settings(tmp_path, "llama", quant="nf4"))
    layers = [m for m in base.model.modules() if type(getattr(m, "weight", None)).__name__ == "Params4bit"]
    layers = [m for m in layers if isinstance(m, torch.nn.Linear)]
    own = layers[0].forward = functools.partial(type(layers[0]).forward, layers[0])
    with pytest.raises(IndexError) if fails else contextlib.nullcontext():
        verify.probe(model, 10**6 if fails else 512)
    assert layers[0].forward is own
    assert not any("forward" in vars(layer) for layer in layers[1:])
