"""GGUF export of every family that is not like Llama: llama.cpp computes the same from the written files as PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import llamacpp
import numpy as np
import pytest
import torch
from llamacpp import ALLOWED, PROMPTS, distance, distance_of_adapter, expected
from peft import LoraConfig, PeftModel, get_peft_model
from sentencepieces import bpe
from tiny import VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lora_ft.config import GgufType
from lora_ft.errors import ConfigError
from lora_ft.export.gguf import model as gguf_model
from lora_ft.export.gguf.layout import Layout, layout_of
from lora_ft.models import families
from lora_ft.models.gguf import convert, reader

EXACT = 2e-5  # for families with SiLU
UNITS = {GgufType.f16: 2**-11, GgufType.q8_0: 1 / 254}

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.1, "max_position_embeddings": 256,
         "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}  # fmt: skip
# The window is shorter than the longest prompt.
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
GEMMA3_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
               "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                "logits_scaling": 1.5},
    "mixtral": EXPERTS,
    "olmo2": {},
    "gpt_neox": {"hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "partial_rotary_factor": 0.5}},
    "phi": {},
    "phi3": {},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 96, "head_dim": 32, "norm_topk_prob": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": {},
}  # fmt: skip
GELU = ("gpt_neox", "phi", "gemma", "gemma2", "gemma3_text", "starcoder2")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    # llama.cpp's smallest context has 256 tokens.
    "phi3_short": (
        "phi3",
        {"max_position_embeddings": 1024, "original_max_position_embeddings": 512, "rope_parameters": LONGROPE},
    ),
    "phi3_long": ("phi3", {"original_max_position_embeddings": 12, "rope_parameters": LONGROPE}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "smollm3_tied": ("smollm3", {"tie_word_embeddings": True}),
    "qwen3_moe_tied": ("qwen3_moe", {"tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def family_folder(tmp_path: Path, family: str, **changes: Any) -> Path:
    """Save a tiny model whose norms and biases are random, too."""
    tie = {"tie_word_embeddings": "tie_word_embeddings" in families.family(family).limits and family != "olmo2"}
    config = AutoConfig.for_model(family, **SIZES | tie | FAMILIES[family] | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    return tmp_path / family


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# The model


@pytest.mark.parametrize("name", VARIANTS)
def test_written_model_matches_in_llamacpp_and_in_our_reader(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family, changes = VARIANTS[name]
    source = loaded(family_folder(tmp_path, family, **changes))
    prompts = PROMPTS[2:] if name == "phi3_long" else PROMPTS  # transformers' divisors depend on the prompt's length
    wanted = expected(source, prompts)
    gguf_model.write(tmp_path / family, tmp_path / "m.gguf", GgufType.f32)
    by_llamacpp = llamacpp.logprobs(tmp_path / "m.gguf", prompts, size=VOCABULARY)
    record_property("figure", f"GGUF {name}: {distance(by_llamacpp, wanted):.1e}")
    assert distance(by_llamacpp, wanted) <= (ALLOWED if family in GELU else EXACT)
    assert wanted.std() > 0.5
    back = loaded(convert.converted(tmp_path / "m.gguf")[0])
    assert back.config.tie_word_embeddings is source.config.tie_word_embeddings
    assert back.state_dict().keys() == source.state_dict().keys()
    for key, tensor in source.state_dict().items():
        rounding = 2e-7 if families.family(family).offset(key.rpartition(".")[0]) else 0  # weight + 1 - 1
        assert (back.state_dict()[key] - tensor).abs().max() <= rounding, key
    assert distance(expected(back, prompts), wanted) <= 1e-5


@pytest.mark.parametrize("kind", [GgufType.f16, GgufType.q8_0])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "olmo2", "qwen3_moe"])
def test_llamacpp_differs_by_the_rounding_of_the_type_only(
    family: str, kind: GgufType, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = family_folder(tmp_path, family)
    gguf_model.write(folder, tmp_path / "m.gguf", kind)
    wanted = expected(loaded(folder))
    found = llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY)
    size = np.linalg.norm(wanted - wanted.mean(1, keepdims=True), axis=1)
    away = float(np.median(np.linalg.norm(found - wanted, axis=1) / size))
    record_property("figure", f"GGUF {family} {kind.value}: {away / UNITS[kind]:.2f} units")
    assert away <= 16 * UNITS[kind]


def test_experts_are_stacked_and_routers_stay_float32(tmp_path: Path) -> None:
    folder = family_folder(tmp_path, "qwen3_moe")
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.q8_0)
    found = reader.read(tmp_path / "m.gguf").tensors
    assert reader.shape(found["blk.1.ffn_up_exps.weight"]) == (4, 96, 64)
    assert reader.shape(found["blk.1.ffn_down_exps.weight"]) == (4, 64, 96)
    assert reader.dtype_code(found["blk.1.ffn_gate_inp.weight"]) == "F32"
    assert found["blk.1.ffn_gate_exps.weight"].tensor_type.name == "Q8_0"


# The adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_llamacpp_with_adapter_matches_peft(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family_folder(tmp_path, family)
    away = distance_of_adapter(*finished.saved_adapter(tmp_path, family), tmp_path / family)
    record_property("figure", f"GGUF adapter {family}: {away:.1e}")
    assert away <= (ALLOWED if family in GELU else EXACT)


# The comparison


def without_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families.Family, "offset", lambda self, module: 0.0)


def swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Layout.arrays
    monkeypatch.setattr(Layout, "arrays", lambda self, name, values: right(self, name, values)[::-1])


def unpermuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "rows", lambda self, module, values: values)


def without(*keys: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave metadata out, or change it."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        right = gguf_model._sizes
        monkeypatch.setattr(
            gguf_model, "_sizes", lambda layout: {k: v for k, v in right(layout).items() if k not in keys} | changes
        )

    return mutate


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (without_offset, "gemma2"),
        (without_offset, "gemma3_text"),
        (without("attn_logit_softcapping"), "gemma2"),
        (without("final_logit_softcapping"), "gemma2"),
        (without("attention.sliding_window"), "gemma2"),
        (without("attention.sliding_window"), "gemma3_text"),
        (without("rope.freq_base_swa"), "gemma3_text"),
        (without("rope.scaling.type", "rope.scaling.factor"), "gemma3_text"),
        (without("rope.dimension_count"), "phi3_short"),
        (without("rope.scaling.attn_factor"), "phi3_short"),
        (without("rope.scaling.original_context_length"), "phi3_long"),
        (without(expert_used_count=1), "qwen3_moe"),
        (swapped_experts, "qwen3_moe"),
        (unpermuted, "mixtral"),
        (unpermuted, "gpt_neox"),
        (unpermuted, "smollm3"),
        (without("residual_scale"), "granite"),
    ],
)  # fmt: skip
def test_comparison_with_llamacpp_finds_a_wrong_writer(
    mutant: Callable[[Any], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = VARIANTS[name]
    wanted = expected(loaded(family_folder(tmp_path, family, **changes)), PROMPTS[2:])
    mutant(monkeypatch)
    gguf_model.write(tmp_path / family, tmp_path / "m.gguf", GgufType.f32)
    try:
        found = llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS[2:], size=VOCABULARY)
    except RuntimeError:
        return  # llama.cpp refuses the file
    assert distance(found, wanted) > 10 * (ALLOWED if family in GELU else EXACT)


# What llama.cpp computes differently


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "gemma2 with query_pre_attn_scalar=32, .*=16"),
        ("gemma2", {"attn_logit_softcapping": None}, "needs a number for attn_logit_softcapping of gemma2"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "with layer_types=.*sliding_attention', 'full_attention'"),
        ("gemma2", {"tie_word_embeddings": False}, "with tie_word_embeddings=True, .*=False"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "with final_logit_softcapping=None, .*=30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "with use_bidirectional_attention=False"),
        ("olmo2", {"tie_word_embeddings": True}, "olmo2 with tie_word_embeddings=False"),
        ("olmo2", {"rope_parameters": LONGROPE}, "llama.cpp rotates the whole head of olmo2, .*factor=0.75"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3_moe with norm_topk_prob=True, .*=False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"qwen3_moe with mlp_only_layers=\[\], .*=\[1\]"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 0]}, r"smollm3 with no_rope_layers=\[1, 1, 1, 0\]"),
        ("starcoder2", {"hidden_act": "relu"}, "starcoder2 with hidden_act=gelu_pytorch_tanh"),
    ],
)  # fmt: skip
def test_models_that_llamacpp_computes_differently_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | {"tie_word_embeddings": family != "olmo2"})
    config.update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | changes))
    with pytest.raises(ConfigError, match=message):
        gguf_model.check(tmp_path, tiny_tokenizer())


def test_windows_of_gemma_are_written_and_do_not_limit_the_context(tmp_path: Path, caplog: Any) -> None:
    layout = layout_of(AutoConfig.for_model("gemma2", **SIZES | GEMMA).to_dict())
    sizes = gguf_model._sizes(layout)
    assert (sizes["context_length"], sizes["attention.sliding_window"], caplog.text) == (256, 6, "")
    layout = layout_of(AutoConfig.for_model("phi3", **SIZES, sliding_window=48).to_dict())
    sizes = gguf_model._sizes(layout)
    assert (sizes["context_length"], sizes["attention.sliding_window"]) == (48, 0)
    assert "llama.cpp ignores the sliding window" in caplog.text


def expert_adapter(tmp_path: Path, family: str, parameters: list[str], **options: Any) -> tuple[PeftModel, Path]:
    """Attach a random adapter of experts by PEFT alone, and save it."""
    saved = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], target_parameters=parameters, **options)
    with warnings.catch_warnings(action="ignore"):  # PEFT's own, and its of patterns that name no module
        model = get_peft_model(loaded(tmp_path / family), saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "parameters", "options"),
    [
        ("qwen3_moe", BOTH, {}),
        ("qwen3_moe", BOTH[1:], {"use_rslora": True}),
        ("mixtral", BOTH, {"alpha_pattern": {"down_proj": 8}, "rank_pattern": {"gate_up_proj": 2}}),
    ],
)
def test_llamacpp_with_adapter_of_experts_matches_peft(
    family: str, parameters: list[str], options: dict[str, Any], tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    family_folder(tmp_path, family)
    away = distance_of_adapter(*expert_adapter(tmp_path, family, parameters, **options), tmp_path / family)
    record_property("figure", f"GGUF adapter of experts {family}: {away:.1e}")
    assert away <= EXACT
    assert reader.shape(reader.read(tmp_path / "adapter.gguf").tensors["blk.0.ffn_down_exps.weight.lora_a"])[0] == 4


# The command


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "phi3", "qwen3_moe"])
def test_llamacpp_with_merged_file_matches_peft(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family_folder(tmp_path, family)
    bpe("prefix").save_pretrained(tmp_path / family)
    run = finished.finished_run(tmp_path, family)
    assert finished.call("merge", f"run={run}", f"out={tmp_path / 'm.gguf'}", "gguf=f32") == 0
    _, model = finished.adapted(finished.settings(tmp_path, family))
    found, wanted = llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY), expected(model)
    record_property("figure", f"GGUF {family} merged: {distance(found, wanted):.1e}")
    assert distance(found, wanted) <= (ALLOWED if family in GELU else EXACT)
