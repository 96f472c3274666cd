"""The adapter folder: PEFT and transformers load it, its bytes are reproducible, and damaged ones are refused."""

import dataclasses
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import finished
import pytest
import safetensors.torch
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from tiny import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer

from lora_ft import config, runs
from lora_ft.adapters import attach, files, peft_folder, provenance
from lora_ft.errors import MismatchError, SecurityError
from lora_ft.io import durable
from lora_ft.models.load import Base, Identity

IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])
BASE = Identity(
    id="org/tiny", path="somewhere", folder=None, revision="abc", config_sha256="c", weights_sha256={"w": "1"}
)
ORIGIN = provenance.Provenance(BASE, config.Quant(), data_sha256="d")

VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "gpt2_dora": ("gpt2", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    "saved_norm": ("llama", {"modules_to_save": ["norm"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
}

# transformers 5.23 reads only A and B: it reports DoRA's magnitudes and modules saved in full as unexpected.
PEFT_ONLY = ("dora", "gpt2_dora", "saved_norm")


def trained(family: str, settings: dict, tokens: tuple[int, ...] = ()) -> PeftModel:
    """Return a tiny model with an adapter of which every parameter differs from its initial value."""
    model = tiny_model(family).requires_grad_(False)
    peft_model = attach.attach(
        model, config.Adapter(**{"r": 4, "lora_alpha": 8, **settings}), "adapter0", 1, list(tokens)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attach.trainable(peft_model, "adapter0").values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


def saved(model: PeftModel, folder: Path) -> Path:
    files.save(model, "adapter0", folder, tiny_tokenizer(), ORIGIN)
    return folder


READER = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
sys.path.insert(0, sys.argv[2])
import torch
from peft import PeftModel
from tiny import tiny_model
out = {}
for name, family in json.loads(sys.argv[1]).items():
    ids = torch.tensor([[5, 99, 42, 7, 300, 11]])
    with torch.no_grad():
        out[name] = PeftModel.from_pretrained(tiny_model(family), name).eval()(input_ids=ids).logits
        model = tiny_model(family)
        model.load_adapter(name)
        out[name + "+transformers"] = model.eval()(input_ids=ids).logits
assert not any(m.startswith("lora_ft") for m in sys.modules)
from safetensors.torch import save_file
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[3])
"""


@pytest.mark.closes("A19")
def test_peft_and_transformers_compute_the_trained_logits(tmp_path: Path) -> None:
    """In a separate process that does not import lora_ft; within 1e-5 of the largest logit, in fp32."""
    models = {name: trained(family, settings) for name, (family, settings) in VARIANTS.items()}
    folders = {str(saved(model, tmp_path / name)): VARIANTS[name][0] for name, model in models.items()}
    script, results = tmp_path / "reader.py", tmp_path / "logits.safetensors"
    script.write_text(READER)
    arguments = [sys.executable, str(script), json.dumps(folders), str(Path(__file__).parent), str(results)]
    subprocess.run(arguments, check=True, cwd=tmp_path)
    found = safetensors.torch.load_file(results)
    with torch.no_grad():
        for name, model in models.items():
            expected = model(input_ids=IDS).logits
            assert not torch.allclose(expected, tiny_model(VARIANTS[name][0])(input_ids=IDS).logits, atol=1e-2)
            for reader in ("",) if name in PEFT_ONLY else ("", "+transformers"):
                error = (found[str(tmp_path / name) + reader] - expected).abs().max()
                assert error <= 1e-5 * expected.abs().max(), (name, reader)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_adapter_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    family, settings = VARIANTS[name]
    model = trained(family, settings)
    loaded = files.load(tiny_model(family), saved(model, tmp_path / "adapter"), "again")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(
        module.training for module in files.load(tiny_model(family).train(), tmp_path / "adapter", "b").modules()
    )


@pytest.mark.closes("A22", "D05")
@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_added_tokens_are_saved_and_loaded(tie: bool, tmp_path: Path) -> None:
    """Their ids are beyond the base's vocabulary: the loader extends the embedding, and the adapter fills the rows."""

    def wider() -> torch.nn.Module:
        model = tiny_model("llama", tie=tie).requires_grad_(False)
        model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        return model

    new = [VOCABULARY, VOCABULARY + 1]
    torch.manual_seed(0)
    model = attach.attach(wider(), config.Adapter(r=4), "adapter0", 1, new)
    with torch.no_grad():
        for parameter in attach.trainable(model, "adapter0").values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = saved(model.eval(), tmp_path / "adapter")
    ids = torch.tensor([[new[0], 5, new[1]]])
    torch.manual_seed(1)  # the base has other rows, which those of the adapter must replace
    loaded = files.load(wider(), folder, "again")
    assert torch.equal(loaded(input_ids=ids).logits[..., new], model(input_ids=ids).logits[..., new])


@pytest.mark.closes("C09")
def test_saving_twice_gives_the_same_bytes_with_public_file_modes(tmp_path: Path) -> None:
    os.umask(0o022)
    first, second = (saved(trained("llama", {}), tmp_path / name) for name in ("one", "two"))
    names = {p.name for p in first.iterdir()}
    assert {
        peft_folder.WEIGHTS,
        peft_folder.CONFIG,
        provenance.RECORD,
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.closes("D04")
def test_config_has_the_public_base_and_sorted_targets(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/tiny", "abc")
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert fields["inference_mode"] is True
    assert "somewhere" not in (folder / peft_folder.CONFIG).read_text()


def test_config_has_the_basic_settings_and_others_that_differ_from_their_default(tmp_path: Path) -> None:
    """So an older PEFT can read it. Dicts are sorted."""
    plain = json.loads((saved(trained("llama", {}), tmp_path / "plain") / peft_folder.CONFIG).read_text())
    assert plain.keys() == {*files._ALWAYS, "peft_version"}
    assert list(plain) == sorted(plain)
    model = trained("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 7, "q_proj": 9}})
    model.peft_config["adapter0"].layers_to_transform = [1]
    text = (saved(model, tmp_path / "more") / peft_folder.CONFIG).read_text()
    assert json.loads(text).keys() - plain.keys() == {"layers_to_transform"}
    assert text.index('"q_proj": 9') < text.index('"v_proj": 7')
    local = provenance.Provenance(dataclasses.replace(BASE, id=None, revision=None), config.Quant(), "d")
    files.save(model, "adapter0", tmp_path / "local", tiny_tokenizer(), local)
    fields = json.loads((tmp_path / "local" / peft_folder.CONFIG).read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("somewhere", None)


@pytest.mark.parametrize("templated", [True, False])
def test_record_has_the_hashes_of_base_tokenizer_and_template(templated: bool, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), trained("llama", {})
    if not templated:
        tokenizer.chat_template = None
    source = provenance.Provenance(dataclasses.replace(BASE, folder="/home/alice/tiny"), config.Quant(), "d")
    files.save(model, "adapter0", tmp_path / "a", tokenizer, source)
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()  # noqa: E731
    assert json.loads((tmp_path / "a" / provenance.RECORD).read_text()) == {
        "format": 1,
        "base": {"id": "org/tiny", "path": "somewhere", "folder": None, "revision": "abc", "config_sha256": "c",
                 "weights_sha256": {"w": "1"}},
        "quant": {"kind": "none"},
        "data_sha256": "d",
        "tokenizer_sha256": digest(tokenizer.backend_tokenizer.to_str()),
        "chat_template_sha256": digest(tokenizer.chat_template) if templated else None,
        "tensors": {key: list(tensor.shape) for key, tensor in files.tensors_of(model, "adapter0").items()},
        "packages": runs.versions(),
    }  # fmt: skip


@pytest.mark.closes("C10")
def test_adapter_with_a_byte_changed_on_disk_is_not_saved(tmp_path: Path, monkeypatch) -> None:
    write = durable.write_stream

    def damaged(path: Path, chunks: Iterable[bytes], num_bytes: int) -> None:
        data = b"".join(chunks)
        write(path, [data[:-1] + bytes([data[-1] ^ 1])])

    monkeypatch.setattr(durable, "write_stream", damaged)
    with pytest.raises(MismatchError, match=r"adapter: the bytes read back differ from the bytes written"):
        saved(trained("llama", {}), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def base_of(**changes: object) -> Base:
    return Base(model=None, tokenizer=tiny_tokenizer(), identity=Identity(**{**vars(BASE), **changes}), quantized=())


def check(folder: Path, base: Base, **quant: object) -> None:
    provenance.check_source(folder, peft_folder.read_config(folder), base, config.Quant(**quant))


@pytest.mark.closes("D03")
def test_other_base_quantization_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    check(folder, base_of())
    with pytest.raises(MismatchError, match=r"another base \(org/tiny\).*\n.*weights_sha256"):
        check(folder, base_of(weights_sha256={"w": "2"}))
    with pytest.raises(MismatchError, match=r"another base \(org/tiny\):\nbase config_sha256: trained on c, now d$"):
        check(folder, base_of(config_sha256="d"))
    with pytest.raises(MismatchError, match=r"quantization.*nf4"):
        check(folder, base_of(), kind=config.QuantKind.nf4)
    base = base_of()
    base.tokenizer.chat_template += " "
    with pytest.raises(MismatchError, match="chat_template_sha256: trained on"):
        check(folder, base)
    base = base_of()
    base.tokenizer.add_tokens(["<more>"])
    with pytest.raises(MismatchError, match="tokenizer_sha256: trained on"):
        check(folder, base)


@pytest.mark.closes("B05")
@pytest.mark.parametrize(("kind", "double"), [("none", True), ("fp4", True), ("int8", True), ("nf4", False)])
def test_base_with_another_quantization_is_refused(kind: str, double: bool, tmp_path: Path) -> None:
    nf4 = config.Quant(kind=config.QuantKind.nf4)
    files.save(
        trained("llama", {}), "adapter0", tmp_path / "a", tiny_tokenizer(), provenance.Provenance(BASE, nf4, "d")
    )
    check(tmp_path / "a", base_of(), kind=config.QuantKind.nf4)
    with pytest.raises(MismatchError, match=r"quantization: trained on .*'nf4', 'double': True.*, now"):
        check(tmp_path / "a", base_of(), kind=config.QuantKind[kind], double=double)


@pytest.mark.closes("D08")
def test_adapter_without_a_record_is_compared_by_name_and_refused_if_it_changes_the_base(
    tmp_path: Path, caplog
) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    (folder / provenance.RECORD).unlink()
    check(folder, base_of())
    for same in ({"id": None, "path": "/models/tiny/"}, {"id": None, "folder": "/models/tiny"}, {"id": "else/tiny"}):
        check(folder, base_of(**same))
    assert caplog.text == ""
    check(folder, base_of(id="org/other", path="org/other"))
    assert "the adapter names the base org/tiny, but the configured base is org/other" in caplog.text
    settings = json.loads((folder / peft_folder.CONFIG).read_text())
    for changed, message in (({"init_lora_weights": "pissa"}, "pissa changes the base"), ({"bias": "all"}, "bias=all")):
        (folder / peft_folder.CONFIG).write_text(json.dumps(settings | changed))
        with pytest.raises(MismatchError, match=message):
            check(folder, base_of())


def test_damaged_record_or_config_is_an_error(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    for name, text, message in (
        (provenance.RECORD, "{}", "not a record of format 1"),
        (provenance.RECORD, '{"format": 2, "base": {}}', "not a record of format 1, got 2"),
        (provenance.RECORD, '{"format": 1, "base": "tiny"}', "not a record of format 1"),
        (provenance.RECORD, '{"format": 1', "lora_ft.json is not valid JSON"),
        (provenance.RECORD, "[]", "must contain a JSON object"),
        (peft_folder.CONFIG, '{"peft_type": ', "adapter_config.json is not valid JSON"),
        (peft_folder.CONFIG, '{"peft_type": "LORA", "r": 0}', "adapter"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(MismatchError, match=message):
            check(folder, base_of())
            files.load(tiny_model("llama"), folder, "again")
        (folder / name).write_text(before)


@pytest.mark.closes("D01")
def test_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    with pytest.raises(MismatchError, match="does not fit this base"):
        files.load(tiny_model("gpt2"), folder, "again")


def rewrite(folder: Path, change) -> None:
    path = folder / peft_folder.WEIGHTS
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def test_truncated_files_other_formats_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    weights, settings = folder / peft_folder.WEIGHTS, folder / peft_folder.CONFIG
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MismatchError, match="not a safetensors file"):
        files.load(tiny_model("llama"), folder, "again")
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps(fields | {"use_telepathy": True}))
    with pytest.raises(MismatchError, match="use_telepathy"):
        peft_folder.read_config(folder)
    settings.write_text(json.dumps(fields | {"peft_type": "IA3"}))
    with pytest.raises(MismatchError, match="LORA, got IA3"):
        peft_folder.read_config(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(SecurityError, match="can run code"):
        peft_folder.read_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 9}, r"lora_alpha 8(\.0)? instead of 9"),
        ({"use_rslora": True}, "use_rslora False instead of True"),
        ({"use_dora": True}, "use_dora False instead of True"),
        ({"alpha_pattern": {"q_proj": 7}}, "alpha_pattern {} instead of {'q_proj': 7"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern {} instead of {'q_proj': 2"),
        ({"r": 3}, "r 4 instead of 3"),
    ],
)
def test_init_from_requires_the_same_method(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    settings = config.Adapter(**{"r": 4, "lora_alpha": 8} | change)
    model = attach.attach(tiny_model("llama").requires_grad_(False), settings, "next", 1, [])
    with pytest.raises(
        MismatchError, match=rf"init_from=.*/adapter has {message}[^,]*: set the same values in adapter"
    ):
        peft_folder.check_same_method(folder, model.peft_config["next"])


def test_different_tensors_are_counted_and_five_are_named(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    whole = sorted(safetensors.torch.load_file(folder / peft_folder.WEIGHTS))
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in whole[:7]] and tensors.update(x=torch.zeros(1)))
    message = f"missing tensors: 7, first {', '.join(whole[:5])}; unexpected tensors: 1, first x"
    with pytest.raises(MismatchError) as caught:
        files.load(tiny_model("llama"), folder, "again")
    assert str(caught.value) == f"the adapter in {folder} does not fit this base: {message}"


def test_missing_config_and_invalid_metadata_are_errors(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    weights = (folder / peft_folder.WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.dumps({**json.loads(weights[8 : 8 + length]), "__metadata__": {"format": 1}}).encode()
    (folder / peft_folder.WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + weights[8 + length :])
    with pytest.raises(MismatchError, match=r"adapter_model\.safetensors is not a safetensors file: "):
        files.load(tiny_model("llama"), folder, "again")
    (folder / peft_folder.CONFIG).unlink()
    with pytest.raises(MismatchError, match=r"adapter is not an adapter: adapter_config\.json is missing"):
        peft_folder.read_config(folder)


@pytest.mark.parametrize(
    ("mapping", "refused"),
    [
        (None, None),
        ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}, None),
        ({"parent_library": "peft"}, None),
        ({}, None),
        ({"parent_library": "transformers_evil.models"}, "transformers_evil.models"),
        ("evil", "evil"),
        ({"parent_library": "e" * 90}, "e" * 80),
    ],
)
def test_auto_mapping_may_name_only_peft_and_transformers(mapping: object, refused: str | None, tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(fields | {"auto_mapping": mapping}))
    if refused is None:
        assert peft_folder.read_config(folder).r == 4
    else:
        with pytest.raises(SecurityError, match=f"auto_mapping asks to import {refused}$"):
            peft_folder.read_config(folder)


@pytest.mark.closes("D09")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT
@pytest.mark.parametrize("quant", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("added", [[], ["<new>", "<newer>"]])
def test_loading_lines_work_with_only_transformers_and_peft(quant: str, added: list[str], tmp_path: Path) -> None:
    cfg = finished.settings(tmp_path, "llama", quant=quant)
    cfg.model.added_tokens = added
    base, model = finished.adapted(cfg)
    files.save(model, "first", tmp_path / "it's", base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d"))
    names = {"torch": torch, "PeftModel": PeftModel} | {
        name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "BitsAndBytesConfig")
    }
    exec("\n".join(provenance.loading_lines(tmp_path / "it's", base, cfg)), names)  # noqa: S102
    if quant in ("nf4", "fp4"):  # unmodified 4-bit layers round more than ours, so their weights are compared
        pairs = zip(names["model"].modules(), model.modules(), strict=True)
        weights = [(m.weight, n.weight) for m, n in pairs if isinstance(m, Linear4bit)]
        assert len(weights) == 14
        assert all(torch.equal(*(dequantize_4bit(w.data, w.quant_state) for w in pair)) for pair in weights)
        return
    ids = torch.tensor([[5, 99, 42, VOCABULARY + len(added) - 1]])
    # bitsandbytes' int8 layers round activations, except when they train on a CPU; ours never do.
    theirs = names["model"].train(quant == "int8")
    found, expected = (m(input_ids=ids).logits.detach() for m in (theirs, model.eval()))
    assert found.dtype == expected.dtype and torch.allclose(found, expected, atol=1e-4)


def test_loading_lines_use_the_commit_of_a_hub_base_and_the_folder_of_a_local_one(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    hub = dataclasses.replace(base_of(folder="/cache/x"), model=model)
    local = dataclasses.replace(base_of(folder="/models/x", revision=None), model=model)
    first = [provenance.loading_lines(tmp_path, base, config.TrainRun())[0] for base in (hub, local)]
    assert first == [
        "base = AutoModelForCausalLM.from_pretrained('org/tiny', revision='abc', dtype=torch.bfloat16)",
        "base = AutoModelForCausalLM.from_pretrained('/models/x', dtype=torch.bfloat16)",
    ]


@pytest.mark.closes("A15")
def test_adapter_initialized_from_a_saved_one_computes_the_same(tmp_path: Path) -> None:
    source = trained("llama", {})
    folder = saved(source, tmp_path / "adapter")
    model = attach.attach(tiny_model("llama").requires_grad_(False), config.Adapter(r=4, lora_alpha=8), "next", 1, [])
    peft_folder.check_same_method(folder, model.peft_config["next"])
    files.load_tensors(model, folder, "next")
    assert torch.equal(model.eval()(input_ids=IDS).logits, source(input_ids=IDS).logits)
    assert all(p.requires_grad for p in attach.trainable(model, "next").values())
