"""The adapter folder: what others load, byte for byte the same twice, and what our loader refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from tiny import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer

from lora_ft import config
from lora_ft.adapters import attach, files, origin
from lora_ft.errors import MismatchError, SecurityError
from lora_ft.models.load import Base, Identity

IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])
BASE = Identity(
    id="org/tiny", path="somewhere", folder=None, revision="abc", config_sha256="c", weights_sha256={"w": "1"}
)
ORIGIN = origin.Origin(BASE, config.Quant(), data_sha256="d")

VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "rslora": ("llama", {"rslora": True}),
    "dora": ("llama", {"dora": True}),
    "gpt2_dora": ("gpt2", {"dora": True}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    "saved_norm": ("llama", {"modules_to_save": ["norm"]}),
    "head": ("llama", {"targets": ["q_proj", "lm_head"]}),
}

# transformers 5.23 reads A and B only: it reports DoRA's magnitudes as unexpected, and modules saved whole.
PEFT_ONLY = ("dora", "gpt2_dora", "saved_norm")


def trained(family: str, settings: dict, tokens: tuple[int, ...] = ()) -> PeftModel:
    """A tiny model with an adapter whose every parameter differs from its start."""
    model = tiny_model(family).requires_grad_(False)
    peft_model = attach.attach(model, config.Adapter(**{"r": 4, "alpha": 8, **settings}), "adapter0", 1, list(tokens))
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
def test_peft_alone_and_transformers_alone_compute_what_was_trained(tmp_path: Path) -> None:
    """In a process of their own that never imports lora_ft; 1e-5 of the largest logit, in fp32."""
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
def test_what_is_saved_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    family, settings = VARIANTS[name]
    model = trained(family, settings)
    loaded = files.load(tiny_model(family), saved(model, tmp_path / "adapter"), "again")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.closes("A22", "D05")
@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_added_tokens_travel_with_the_adapter(tie: bool, tmp_path: Path) -> None:
    """Ids behind the base's vocabulary: the loader makes room, the adapter brings the rows."""

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
    torch.manual_seed(1)  # other rows in the base: those of the adapter must replace them
    loaded = files.load(wider(), folder, "again")
    assert torch.equal(loaded(input_ids=ids).logits[..., new], model(input_ids=ids).logits[..., new])


@pytest.mark.closes("C09")
def test_saving_twice_gives_the_same_bytes_readable_by_others(tmp_path: Path) -> None:
    os.umask(0o022)
    first, second = (saved(trained("llama", {}), tmp_path / name) for name in ("one", "two"))
    names = {p.name for p in first.iterdir()}
    assert {files.WEIGHTS, files.CONFIG, origin.RECORD, "tokenizer.json", "chat_template.jinja"} <= names
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.closes("D04")
def test_the_config_names_the_public_base_and_sorts_its_targets(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    fields = json.loads((folder / files.CONFIG).read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/tiny", "abc")
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert fields["inference_mode"] is True
    assert "somewhere" not in (folder / files.CONFIG).read_text()


def base_of(**changes: object) -> Base:
    return Base(model=None, tokenizer=tiny_tokenizer(), identity=Identity(**{**vars(BASE), **changes}), quantized=())


def check(folder: Path, base: Base, **quant: object) -> None:
    origin.check_source(folder, files.read_config(folder), base, config.Quant(**quant))


@pytest.mark.closes("D03")
def test_another_base_quantization_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    check(folder, base_of())
    with pytest.raises(MismatchError, match=r"another base \(org/tiny\).*\n.*weights_sha256"):
        check(folder, base_of(weights_sha256={"w": "2"}))
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
def test_a_base_quantized_in_another_way_is_another_base(kind: str, double: bool, tmp_path: Path) -> None:
    nf4 = config.Quant(kind=config.QuantKind.nf4)
    files.save(trained("llama", {}), "adapter0", tmp_path / "a", tiny_tokenizer(), origin.Origin(BASE, nf4, "d"))
    check(tmp_path / "a", base_of(), kind=config.QuantKind.nf4)
    with pytest.raises(MismatchError, match=r"quantization: trained on .*'nf4', 'double': True.*, now"):
        check(tmp_path / "a", base_of(), kind=config.QuantKind[kind], double=double)


@pytest.mark.closes("D08")
def test_an_adapter_made_elsewhere_is_compared_by_name_and_refused_by_kind(tmp_path: Path, caplog) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    (folder / origin.RECORD).unlink()
    check(folder, base_of())
    assert caplog.text == ""
    check(folder, base_of(id="org/other", path="org/other"))
    assert "trained on org/tiny; the base given is org/other" in caplog.text
    settings = json.loads((folder / files.CONFIG).read_text())
    for changed, said in (({"init_lora_weights": "pissa"}, "pissa changes the base"), ({"bias": "all"}, "bias=all")):
        (folder / files.CONFIG).write_text(json.dumps(settings | changed))
        with pytest.raises(MismatchError, match=said):
            check(folder, base_of())


def test_a_broken_record_or_config_is_named(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    for name, text, said in (
        (origin.RECORD, "{}", "not a record of format 1"),
        (origin.RECORD, '{"format": 1', "lora_ft.json is not valid JSON"),
        (origin.RECORD, "[]", "must hold a JSON object"),
        (files.CONFIG, '{"peft_type": ', "adapter_config.json is not valid JSON"),
        (files.CONFIG, '{"peft_type": "LORA", "r": 0}', "adapter"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(MismatchError, match=said):
            check(folder, base_of())
            files.load(tiny_model("llama"), folder, "again")
        (folder / name).write_text(before)


@pytest.mark.closes("D01")
def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    with pytest.raises(MismatchError, match="does not fit this base"):
        files.load(tiny_model("gpt2"), folder, "again")


def rewrite(folder: Path, change) -> None:
    path = folder / files.WEIGHTS
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def first_key(tensors: dict) -> str:
    return sorted(tensors)[0]


@pytest.mark.closes("D01")
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(first_key(t)), "missing tensors: 1, first .*lora_A"),
        (lambda t: t.__setitem__("stray", torch.zeros(1)), "unexpected tensors: 1, first stray"),
        (lambda t: t.__setitem__(first_key(t), torch.zeros(4, 63)), r"other shapes: 1, .*\(4, 63\) instead of \(4,"),
    ],
)
def test_a_key_too_few_too_many_or_of_another_shape_is_refused(change, said: str, tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    rewrite(folder, change)
    with pytest.raises(MismatchError, match=said):
        files.load(tiny_model("llama"), folder, "again")


def test_a_cut_file_other_formats_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    weights, settings = folder / files.WEIGHTS, folder / files.CONFIG
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MismatchError, match="not a safetensors file"):
        files.load(tiny_model("llama"), folder, "again")
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps(fields | {"use_telepathy": True}))
    with pytest.raises(MismatchError, match="use_telepathy"):
        files.read_config(folder)
    settings.write_text(json.dumps(fields | {"peft_type": "IA3"}))
    with pytest.raises(MismatchError, match="LORA, got IA3"):
        files.read_config(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(SecurityError, match="can run code"):
        files.read_config(folder)


def test_continuing_needs_the_same_method(tmp_path: Path) -> None:
    folder = saved(trained("llama", {}), tmp_path / "adapter")
    model = attach.attach(tiny_model("llama").requires_grad_(False), config.Adapter(r=4, alpha=9), "next", 1, [])
    with pytest.raises(MismatchError, match=r"init_from.*lora_alpha 8.* instead of 9"):
        files.check_same_method(folder, model.peft_config["next"])


@pytest.mark.closes("A15")
def test_an_adapter_continues_where_it_was(tmp_path: Path) -> None:
    source = trained("llama", {})
    folder = saved(source, tmp_path / "adapter")
    model = attach.attach(tiny_model("llama").requires_grad_(False), config.Adapter(r=4, alpha=8), "next", 1, [])
    files.check_same_method(folder, model.peft_config["next"])
    files.load_tensors(model, folder, "next")
    assert torch.equal(model.eval()(input_ids=IDS).logits, source(input_ids=IDS).logits)
    assert all(p.requires_grad for p in attach.trainable(model, "next").values())
