"""Merged models: anybody loads them, they are the adapter on its base, and nothing is left of one that is not."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, call, finished_run, saved_run, settings
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ft import config
from lora_ft.adapters import source
from lora_ft.errors import MismatchError
from lora_ft.exports import merge, verify
from lora_ft.models.quantize import dequantize_reference

VARIANTS: list[dict[str, Any]] = [
    {},
    {"rslora": True},
    {"dora": True},
    {"targets": ["all-linear"], "rank_pattern": dict.fromkeys(["0.mlp.down_proj", "1.mlp.up_proj"], 2)},
    {"targets": ["embed_tokens", "q_proj", "lm_head"]},
    {"targets": ["embed_tokens", "q_proj", "lm_head"], "dora": True},
    {"targets": ["q_proj"], "modules_to_save": ["lm_head", "mlp"]},
    {"quant": "nf4"},
    {"quant": "fp4", "dora": True},
    {"quant": "int8"},
    {"quant": "int8", "dora": True},
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


def merged(folder: Path, cfg: config.TrainRun, dtype: torch.dtype = torch.float32) -> float:
    base, model = adapted(cfg)
    folder.mkdir()
    merge.write(model, base.tokenizer, folder, dtype)
    return verify.check(folder, verify.probe(model, len(base.tokenizer)))


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
        ("gpt2", {"tie": True}), ("gpt2", {"tie": True, "rslora": True}), ("gpt2", {"tie": True, "dora": True}),
        ("llama", {}), ("llama", {"rslora": True}), ("llama", {"dora": True}),
        ("llama", {"quant": "nf4"}), ("llama", {"quant": "int8"}), ("llama", {"quant": "nf4", "dora": True}),
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
    options = {"targets": ["wte", "c_attn"], "modules_to_save": ["ln_f"], "dora": True}
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_merge_rounded_once(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    cfg = settings(tmp_path, family)
    merged(tmp_path / "full", cfg)
    assert 1e-5 < merged(tmp_path / "half", cfg, dtype) < verify.tolerance(dtype)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].to(dtype), half[name]) for name in full)


def test_a_base_in_bfloat16_is_merged_in_float32_and_written_in_bfloat16(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", dora=True)
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


@pytest.mark.closes("B02")
def test_the_attached_model_is_left_as_it_was(tmp_path: Path) -> None:
    base, model = adapted(settings(tmp_path, "llama", quant="nf4"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
    (tmp_path / "out").mkdir()
    verify.probe(model, 512)
    merge.write(model, base.tokenizer, tmp_path / "out", torch.float32)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, logits)


def test_what_is_written_has_the_modes_of_the_umask_and_the_runs_template(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("merge", f"run={run}", f"out={tmp_path / 'new' / 'out'}") == 0
    out = tmp_path / "new" / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / name).stat().st_mode & 0o777 == 0o644
    assert (out / "chat_template.jinja").read_text() == (run / "adapter" / "chat_template.jinja").read_text()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def damaged_weights(*args: Any) -> torch.Tensor:
    return merge.dequantized(args[0].get_base_layer())  # the adapter forgotten


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
    base, model = adapted(settings(tmp_path, "llama"))
    base.model.model.layers[0].self_attn.q_proj.lora_B["first"].weight.data[0, 0] = 1e6
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError, match=r"layers.0.self_attn.q_proj.weight: .* not finite in torch.float16"):
        merge.write(model, base.tokenizer, tmp_path / "out", torch.float16)


@pytest.mark.closes("A20")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_one_end_of_a_tie_changed_alone_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from lora_ft.models.load import load_base

    base = load_base(config.Model(path=str(tiny_folder(tmp_path, "llama", tie=True))), config.Quant(), "cpu")
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError, match=r"lm_head.weight and model.embed_tokens.weight are one matrix"):
        merge.write(model, base.tokenizer, tmp_path / "out", torch.float32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("options", [{"lora_bias": True}, {"alora_invocation_tokens": [5]}])
def test_kinds_that_no_weight_can_hold_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    from lora_ft.models.load import load_base

    base = load_base(config.Model(path=str(tiny_folder(tmp_path, "gpt_neox"))), config.Quant(), "cpu")
    kind = LoraConfig(r=2, target_modules=["dense"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(base.model, kind)
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError, match=r"attention.dense: an adapter of this kind"):
        merge.write(model, base.tokenizer, tmp_path / "out", torch.float32)


def test_a_saved_adapter_merges_like_the_one_in_memory(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "gpt2", tie=True, rslora=True, modules_to_save=["ln_f"])
    run = saved_run(tmp_path / "run", cfg)
    merged(tmp_path / "memory", cfg)
    tokenizer = source.adapter_tokenizer(run / "adapter", cfg.model)
    _, model = source.open_adapter(run / "adapter", cfg.model, cfg.quant, "cpu", tokenizer)
    (tmp_path / "saved").mkdir()
    merge.write(model, tokenizer, tmp_path / "saved", torch.float32)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "saved"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
