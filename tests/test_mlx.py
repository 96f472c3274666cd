"""The adapter folder for mlx-lm: its layers compute the same as PEFT."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lora_ft.adapters import files, provenance
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.export import mlx

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3_rslora": ("qwen3", {"use_rslora": True, "r": 8}),
    "llama_patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7, "q_proj": 3}}),
    "llama_one_layer": ("llama", {"target_modules": ["layers.1.mlp.up_proj", "q_proj"]}),
    "llama_ends": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "llama_dora": ("llama", {"use_dora": True}),
    "gpt2": ("gpt2", {}),
    "gpt2_dora": ("gpt2", {"use_dora": True}),
}
IDS = [5, 99, 42, 7, 300, 11]


def written(tmp_path: Path, family: str, **options: Any) -> tuple[PeftModel, Path]:
    cfg = finished.settings(tmp_path, family, **options)
    base, model = finished.adapted(cfg)
    files.save(
        model, "first", tmp_path / "adapter", base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d")
    )
    mlx.write(tmp_path / "adapter", base_config(tmp_path / family), tmp_path / "mlx")
    return model, tmp_path / "mlx"


def base_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_scale_a_b_is_pefts_update_of_every_layer(name: str, tmp_path: Path) -> None:
    family, options = VARIANTS[name]
    model, folder = written(tmp_path, family, **options)
    settings = json.loads((folder / "adapter_config.json").read_text())
    arrays, scale = safetensors.numpy.load_file(folder / "adapters.safetensors"), settings["lora_parameters"]["scale"]
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    leaves = 3 if options.get("use_dora") else 2
    assert len(arrays) == leaves * len(layers)
    for module, layer in layers.items():
        stored = module.replace("transformer.", "model.")
        a, b = arrays[f"{stored}.lora_a"], arrays[f"{stored}.lora_b"]
        assert a.shape[1] == b.shape[0] == settings["lora_parameters"]["rank"]
        delta = layer.get_delta_weight("first").detach().numpy()
        if family == "gpt2" or stored.endswith("embed_tokens"):
            delta = delta.T  # of a Conv1D and of an embedding, [in, out]
        assert np.allclose(scale * (b.T.astype(np.float64) @ a.T.astype(np.float64)), delta, rtol=1e-5, atol=1e-6)
        if leaves == 3:
            magnitude = layer.lora_magnitude_vector["first"].weight.detach().numpy()
            assert np.array_equal(arrays[f"{stored}.m"], magnitude.reshape(-1))


def test_uniformly_adapted_layers_are_named_once(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "llama", target_modules=ALL)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["num_layers"] == 2 and settings["fine_tune_type"] == "lora"
    assert settings["lora_parameters"]["keys"] == sorted(
        [f"self_attn.{name}" for name in ALL[:4]] + [f"mlp.{name}" for name in ALL[4:]]
    )
    _, folder = written(tmp_path, "llama", target_modules=["layers.1.mlp.up_proj"])
    keys = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["model.layers.1.mlp.up_proj"]


def test_mlx_folder_is_reproducible_and_names_no_local_path(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mlx.write(tmp_path / "adapter", base_config(tmp_path / "llama"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(str(tmp_path).encode() in data for data in before.values())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt_neox", {}, "models of type llama, mistral, qwen2, qwen3, gpt2, got gpt_neox"),
        ("llama", {"modules_to_save": ["norm"]}, "modules_to_save=.* not a plain LoRA; write a merged model"),
        (
            "llama",
            {"target_modules": ["embed_tokens"], "use_dora": True},
            "mlx-lm computes DoRA of an embedding differently",
        ),
    ],
)
def test_adapters_that_mlx_cannot_compute_are_refused(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((MismatchError, ConfigError), match=message):
        written(tmp_path, family, **options)
    assert not (tmp_path / "mlx").exists()


def test_adapter_on_one_of_two_tied_matrices_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    tied = base_config(tmp_path / "llama") | {"tie_word_embeddings": True}
    with pytest.raises(MismatchError, match="apply the adapter of lm_head to embedding and head"):
        mlx.write(tmp_path / "adapter", tied, tmp_path / "other")


READER = """
import json, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import load
model, _ = load(sys.argv[1], adapter_path=sys.argv[2])
print(json.dumps(model(mx.array([json.loads(sys.argv[3])]))[0].astype(mx.float32).tolist()))
"""


@pytest.mark.interop
@pytest.mark.parametrize(
    "name", [n for n in VARIANTS if "gpt2" not in n]
)  # mlx-lm's has other names, and n_inner fixed
def test_mlx_lm_matches_peft_logits(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("mlx_lm", reason='pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2')
    family, options = VARIANTS[name]
    model, folder = written(tmp_path, family, **options)
    # mlx-lm reads the old name of the setting, and assumes 10,000 if it is missing; the same for ties
    fields = base_config(tmp_path / family)
    fields |= {"rope_theta": fields["rope_parameters"]["rope_theta"], "tie_word_embeddings": False}
    (tmp_path / family / "config.json").write_text(json.dumps(fields))
    command = [sys.executable, "-c", READER, str(tmp_path / family), str(folder), json.dumps(IDS)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = torch.tensor(json.loads(answer.splitlines()[-1]))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits[0]
        with model.disable_adapter():
            plain = model(input_ids=torch.tensor([IDS])).logits[0]
    away = float((found - expected).abs().max() / expected.abs().max())
    record_property("figure", f"mlx-lm {name}: {away:.1e} of the largest logit")
    assert away <= 1e-4 < 0.1 * float((plain - expected).abs().max() / expected.abs().max())
