"""Bases in FP8, MXFP4, GPTQ and AWQ: dequantized exactly while they are loaded, then trained as any other base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_models as packed
import pytest
import torch
from finished import call, rows_file
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import lora_ft
from lora_ft import config
from lora_ft.adapters import provenance
from lora_ft.config import QuantKind
from lora_ft.errors import ConfigError
from lora_ft.memory import planning
from lora_ft.models import load, stored
from lora_ft.models.acceleration import replaced_forwards
from lora_ft.models.meta_model import load_meta_model, read_config
from lora_ft.models.storage import dequantized_forwards
from lora_ft.ops import expert_codes
from lora_ft.ops.weights import ScaledLinear, float8_values, scaled

UP = "model.layers.1.mlp.up_proj"
IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])


def of_linear(pack: Callable[[Tensor], packed.Packed]) -> Callable[[str, Tensor], packed.Packed | None]:
    return lambda name, tensor: pack(tensor) if "proj.weight" in name else None


WAYS: dict[str, tuple[dict[str, Any], Callable[[Tensor], packed.Packed]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, lambda w: packed.fp8(w, 32, 32)),
    # 64 and 128 rows in blocks of 48: the last ones are smaller.
    "fp8 ragged": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, lambda w: packed.fp8(w, 48, 48)),
    "fp8 rows": ({"quant_method": "fbgemm_fp8"}, lambda w: packed.fp8(w, 1, 9999, ".weight_scale")),
    "fp8 whole": ({"quant_method": "fp8"}, lambda w: packed.fp8(w, 9999, 9999, ".weight_scale")),
    "gptq": ({"quant_method": "gptq", "bits": 4}, lambda w: packed.gptq(w, 4, 32, 1, ordered=True)),
    "gptq act order": ({"quant_method": "gptq", "bits": 4}, lambda w: packed.gptq(w, 4, 16, 1, ordered=False)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8}, lambda w: packed.gptq(w, 8, 64, 1, ordered=True)),
    "gptq 2": ({"quant_method": "gptq", "bits": 2}, lambda w: packed.gptq(w, 2, 16, 1, ordered=True)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda w: packed.gptq(w, 4, 32, 0, ordered=False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, lambda w: packed.awq(w, 32)),
}


def folder_of(tmp_path: Path, way: str) -> tuple[Path, dict[str, Tensor]]:
    """Return a tiny Llama in this format, and its exact weights."""
    settings, pack = WAYS[way]
    folder = tiny_folder(tmp_path, "llama")
    return folder, packed.rewrite(folder, settings, of_linear(pack))


def base_of(folder: Path, kind: str = "none", dtype: str = "float32") -> load.Base:
    model = config.Model(path=str(folder), dtype=config.Dtype[dtype])
    return load.load_base(model, config.Quant(QuantKind(kind)), "cpu")


def assert_exact(base: load.Base, exact: dict[str, Tensor]) -> None:
    """Compare each weight with its exact value, rounded once."""
    weights = weights_of(base.model)
    assert weights.keys() == exact.keys()
    for name, weight in weights.items():
        rounded = exact[name].to(torch.float32).to(weight.dtype)
        assert torch.equal(weight, rounded), name


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return the weights that a model computes with, also of layers that are stored in another form."""
    scaled = {f"{n}.weight": layer.weight for n, layer in model.named_modules() if isinstance(layer, ScaledLinear)}
    plain = {n: p.detach() for n, p in model.named_parameters() if not n.endswith(".codes")}
    experts = {n: expert_codes.dequantize(p) for n, p in model.named_parameters() if expert_codes.is_quantized(p)}
    return plain | scaled | experts


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_the_exact_products_rounded_once(tmp_path: Path, way: str) -> None:
    folder, exact = folder_of(tmp_path, way)
    changed = sum(tensor.dtype == torch.float64 for tensor in exact.values())
    assert changed == 14
    base = base_of(folder)
    assert_exact(base, exact)
    assert base.identity.stored.record() == {"method": WAYS[way][0]["quant_method"]}
    assert not hasattr(base.model.config, "quantization_config")
    assert base.model.generation_config.eos_token_id == 2
    assert base.model.config.name_or_path == str(folder)
    assert base.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_8_bit_float_has_the_bits_of_torchs_cast(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(8, 32)
    assert torch.equal(float8_values(codes).view(torch.int32), codes.float().view(torch.int32))
    scales = torch.rand(3, 2)
    expected = codes.float() * scales.repeat_interleave(3, 0)[:8].repeat_interleave(16, 1)
    found = scaled(codes, scales, (3, 16))
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("way", "adapter"),
    [("fp8 ragged", "lora"), ("mxfp4", "lora"), pytest.param("fp8 rows", "dora", marks=pytest.mark.nightly)],
)
def test_weights_as_stored_train_to_the_adapter_of_dequantized_ones(tmp_path: Path, way: str, adapter: str) -> None:
    folder, exact = mxfp4_folder(tmp_path) if way == "mxfp4" else folder_of(tmp_path, way)
    plain = tiny_folder(tmp_path / "plain", folder.name)
    save_file({n: t.float().contiguous() for n, t in exact.items()}, plain / "model.safetensors", {"format": "pt"})
    rows, adapters = rows_file(tmp_path), []
    for number, base in enumerate((folder, plain)):
        words = ["model=local", f"model.path={base}", f"data.path={rows}", "data.eval_fraction=0", "adapter.r=4",
                 f"adapter={adapter}", "train.max_steps=2", "train.tokens_per_step=40", "device=cpu"]  # fmt: skip
        run = lora_ft.train(lora_ft.compose("train", words), folder=tmp_path / f"run{number}")
        adapters.append(load_file(run.folder / "adapter" / "adapter_model.safetensors"))
    # Not bit for bit: the order of sums may depend on the address of a weight, which is that of its file or a new one.
    assert_equal_within_rounding(*adapters)
    model, _ = lora_ft.load(tmp_path / "run0")
    codes = [layer.codes for layer in model.modules() if isinstance(layer, ScaledLinear)]
    codes += [p for p in model.parameters() if expert_codes.is_quantized(p)]
    assert {c.dtype for c in codes} == {torch.uint8}
    assert len(codes) == (4 if way == "mxfp4" else 14)
    if way != "fp8 ragged":
        assert_equal_merges(tmp_path)


def assert_equal_merges(tmp_path: Path) -> None:
    merged = lora_ft.merge(tmp_path / "run0", tmp_path / "merged").out
    twin = lora_ft.merge(tmp_path / "run1", tmp_path / "twin").out
    ours, theirs = (load_file(each / "model.safetensors") for each in (merged, twin))
    assert_equal_within_rounding(ours, theirs)


def assert_equal_within_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare whole tensors: Adam divides by a gradient's size, so one that is near zero may move to either side."""
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    assert max(apart.values()) < 1e-4, apart


@pytest.mark.parametrize("way", ["fp8", "gptq", "awq"])
def test_dtype_and_quantization_of_the_run_apply_to_dequantized_weights(tmp_path: Path, way: str) -> None:
    folder, exact = folder_of(tmp_path, way)
    assert_exact(base_of(folder, dtype="bfloat16"), exact)
    plain = tiny_folder(tmp_path / "plain", "llama")
    save_file({n: t.float().contiguous() for n, t in exact.items()}, plain / "model.safetensors", {"format": "pt"})
    for kind in ("nf4", "int8"):
        found, expected = base_of(folder, kind), base_of(plain, kind)
        assert found.quantized == expected.quantized
        assert len(found.quantized) == 14
        assert torch.equal(found.model(IDS).logits, expected.model(IDS).logits)


def test_generation_on_a_cpu_dequantizes_stored_weights_once(tmp_path: Path) -> None:
    base = base_of(folder_of(tmp_path, "fp8 ragged")[0])
    expected = base.model(IDS).logits
    forwards = dequantized_forwards(base.model)
    assert len(forwards) == 14
    with replaced_forwards(forwards):
        assert torch.equal(base.model(IDS).logits, expected)


def test_fp8_experts_equal_transformers_dequantization(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen3_moe")
    exact = packed.rewrite(
        folder, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        of_linear(lambda w: packed.fp8(w, 32, 32)),
    )  # fmt: skip
    assert sum("experts" in name and tensor.dtype == torch.float64 for name, tensor in exact.items()) == 24
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    ours = base_of(folder).model
    assert all(torch.equal(weight, theirs.get_parameter(name)) for name, weight in weights_of(ours).items())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_experts_equal_transformers_dequantization(tmp_path: Path, dtype: str) -> None:
    folder, exact = mxfp4_folder(tmp_path)
    base = base_of(folder, dtype=dtype)
    weights = weights_of(base.model)
    for name, values in exact.items():
        if values.dtype == torch.float64:  # every value is one of bfloat16
            assert base.model.state_dict()[name].dtype == torch.uint8
            assert torch.equal(weights[name].double(), values), name
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=getattr(torch, dtype)
    )
    assert all(torch.equal(weight, theirs.get_parameter(name)) for name, weight in weights.items())
    found, expected = base.model(IDS).logits, theirs(IDS).logits
    assert (found - expected).norm() <= (1e-6 if dtype == "float32" else 1e-2) * expected.norm()
    if dtype == "float32":
        plain = tiny_folder(tmp_path / "plain", "gpt_oss")
        save_file({n: t.float().contiguous() for n, t in exact.items()}, plain / "model.safetensors", {"format": "pt"})
        quantized, twin = base_of(folder, "nf4"), base_of(plain, "nf4")
        assert quantized.quantized == twin.quantized
        assert any("experts" in name for name in quantized.quantized)
        assert torch.equal(quantized.model(IDS).logits, twin.model(IDS).logits)


def mxfp4_folder(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    folder = tiny_folder(tmp_path, "gpt_oss")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    exact = packed.rewrite(folder, settings, lambda n, t: packed.mxfp4(t) if n.endswith("proj") else None)
    assert sum(tensor.dtype == torch.float64 for tensor in exact.values()) == 4
    return folder, exact


def test_a_run_on_fp8_from_training_to_merge(tmp_path: Path) -> None:
    folder, exact = folder_of(tmp_path, "fp8")
    words = ["model=local", f"model.path={folder}", f"data.path={rows_file(tmp_path)}", "data.eval_fraction=0",
             "adapter.r=4", "train.max_steps=1", "device=cpu", "quant=nf4"]  # fmt: skip
    lora_ft.train(lora_ft.compose("train", words), folder=tmp_path / "run")
    record = provenance.read_record(tmp_path / "run" / "adapter")
    assert record["quant"]["kind"] == "nf4"
    assert record["base"]["stored"] == {"method": "fp8"}
    # The original weights are the dequantized ones of the files.
    merged = lora_ft.merge(tmp_path / "run", tmp_path / "merged", ["base_weights=original"]).out
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    found, adapter = (
        load_file(merged / "model.safetensors"),
        load_file(tmp_path / "run/adapter/adapter_model.safetensors"),
    )
    a, b = (adapter[f"base_model.model.{UP}.lora_{part}.weight"] for part in "AB")
    assert torch.allclose(found[f"{UP}.weight"].double(), exact[f"{UP}.weight"] + 8 * (b @ a).double(), atol=1e-6)
    assert call("publish", f"run={tmp_path / 'run'}", f"to=dir:{tmp_path / 'package'}", "model.hub_id=me/base") == 2


def test_a_plan_counts_dequantized_weights(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "fp8")
    words = ["model=local", f"model.path={folder}", "hardware=rtx_4090", "data.max_length=64", "model.dtype=bf16"]
    cfg = lora_ft.compose("plan", words)
    found = planning.make(cfg, cfg.hardware)
    base = load.load_base(config.Model(path=str(folder), dtype=config.Dtype.bfloat16), config.Quant(), "cpu")
    parts = [part for m in base.model.modules() if isinstance(m, ScaledLinear) for part in (m.codes, m.scales)]
    rounded = sum(-(-part.nbytes // 512) * 512 for part in parts)  # as CUDA's allocator does
    assert found.prediction.trace.base_bytes["fp8"] == rounded
    assert found.storage.mapped_bytes == (folder / "model.safetensors").stat().st_size
    assert found.storage.loading_host_bytes > 0
    meta = load_meta_model(cfg.model, config.Quant(QuantKind.nf4), "cpu", tiny_tokenizer())
    assert {n: p.shape for n, p in meta.model.named_parameters()} == {
        n: w.shape for n, w in weights_of(base.model).items()
    }
    assert stored.of_config(read_config(cfg.model)).method == "fp8"


def test_a_plan_counts_experts_as_stored(tmp_path: Path) -> None:
    folder, _ = mxfp4_folder(tmp_path)
    words = ["model=local", f"model.path={folder}", "hardware=rtx_4090", "data.max_length=64", "model.dtype=bf16"]
    cfg = lora_ft.compose("plan", words)
    found = planning.make(cfg, cfg.hardware)
    codes = [p for p in base_of(folder, dtype="bfloat16").model.parameters() if expert_codes.is_quantized(p)]
    parts = [part for each in codes for part in (each, each.exponents)]
    assert found.prediction.trace.base_bytes["mxfp4"] == sum(-(-part.nbytes // 512) * 512 for part in parts)


@pytest.mark.parametrize(
    ("way", "change", "message"),
    [
        ("fp8", lambda t: t.pop("lm_head.weight") is None, "weights lack lm_head.weight"),
        ("fp8", lambda t: t.pop(f"{UP}.weight_scale_inv"), f"{UP}.weight has codes of 8 bits and no scales"),
        ("fp8", lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(3, 2)}), "do not belong together"),
        ("fp8", lambda t: t.update({f"{UP}.weight": torch.ones(128, 64, dtype=torch.int8)}), "codes of 4 bits"),
        ("gptq", lambda t: t.pop(f"{UP}.scales"), rf"weights lack {UP}\.scales"),
        ("gptq", lambda t: t.update({f"{UP}.qweight": torch.zeros(4, 128, dtype=torch.int32)}), "not belong together"),
        ("awq", lambda t: t.update({f"{UP}.qzeros": torch.zeros(2, 3, dtype=torch.int32)}), "do not belong together"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together_are_refused(tmp_path: Path, way: str, change: Any, message: str) -> None:
    folder, _ = folder_of(tmp_path, way)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        base_of(folder)


def test_files_without_any_quantized_weight_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    settings = json.loads((folder / "config.json").read_text())
    for method in ("fp8", "gptq", "awq", "mxfp4"):
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(ConfigError, match=rf"no weights quantized by {method}, as its config\.json says"):
            base_of(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "it has 3 bits in the layout gptq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the layout marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the layout gemv"),
        ({"quant_method": "awq", "w_bit": 3}, "known are 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "must be two positive integers"),
    ],
)
def test_layouts_that_are_not_known_are_refused_before_a_download(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{message}.*\(by its name probably org/model\), and choose quant="):
        stored.of({"quantization_config": settings}, "folder", "org/model-GPTQ")
