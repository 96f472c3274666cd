"""Compatibility: faults of an adapter's files, and programs that can load it; no folder crashes the check."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finished import call, finished_run
from peft import LoraConfig
from tiny import tiny_folder

from lora_ft.adapters import peft_folder
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.export import mlx
from lora_ft.export.gguf import adapter as gguf_adapter
from lora_ft.publishing import compatibility
from lora_ft.publishing.adapter_facts import Level
from lora_ft.publishing.compatibility import FILES, Verdict

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7.0}}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_head": ("llama", {"target_modules": ["q_proj"]}),
    "gpt2": ("gpt2", {}),
    "neox": ("gpt_neox", {}),
    "granitemoe": ("granitemoe", {"target_modules": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Create an adapter folder of each type, its base's folder beside it as `base`."""
    found = {}
    for kind, (family, options) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = finished_run(folder, family, **options) / "adapter"
        (folder / family).rename(folder / "base")
    return found


def base_config(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter.parents[1] / "base" / "config.json").read_text())
    return found


def checked(adapter: Path, *, base: bool = True) -> dict[str, Verdict]:
    """Return the verdicts by program; for the files, the worst."""
    found = compatibility.verdicts(adapter, base_config(adapter) if base else None)
    by_level = sorted(found, key=lambda v: v.level)
    return {v.program: v for v in by_level}


def copied(adapter: Path, to: Path) -> Path:
    shutil.copytree(adapter, to / "run" / "adapter")
    shutil.copytree(adapter.parents[1] / "base", to / "base")
    return to / "run" / "adapter"


def with_config(folder: Path, **values: Any) -> Path:
    path = folder / peft_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = folder / peft_folder.WEIGHTS
    path.write_bytes(safetensors.torch.save(change(safetensors.torch.load_file(path))))
    return folder


def test_every_program_has_one_verdict_after_the_files(made: dict[str, Path]) -> None:
    found = [v.program for v in compatibility.verdicts(made["plain"], None)]
    assert found == [FILES] * (len(found) - len(compatibility.PROGRAMS)) + [*compatibility.PROGRAMS]


def test_plain_adapter_is_loaded_by_all_programs_but_ollama(made: dict[str, Path]) -> None:
    found = checked(made["plain"])
    refused = {name for name, verdict in found.items() if verdict.level is Level.REFUSED}
    assert refused == {"Ollama"}
    assert "gguf=" in found["Ollama"].remedy
    assert {name for name in found if name != FILES and found[name].level is Level.OK} == {*compatibility.PROGRAMS} - {
        "Ollama"
    }


@pytest.mark.parametrize(
    ("kind", "program", "level", "reason"),
    [
        ("rslora", "llama.cpp", Level.WARN, "rsLoRA's scale"),
        ("dora", "PEFT", Level.OK, "0.14.0 or newer"),
        ("dora", "transformers", Level.REFUSED, "DoRA"),
        ("dora", "vLLM", Level.REFUSED, "DoRA"),
        ("dora", "llama.cpp", Level.REFUSED, "DoRA"),
        ("dora", "MLX", Level.OK, ""),
        ("patterns", "SGLang", Level.WARN, "differ between layers"),
        ("patterns", "llama.cpp", Level.WARN, "alpha_pattern"),
        ("saved", "vLLM", Level.REFUSED, "trained in full"),
        ("saved", "transformers", Level.REFUSED, "trained in full"),
        ("gpt2", "vLLM", Level.REFUSED, "GPT-2"),
        ("gpt2", "llama.cpp", Level.WARN, "GPT-2's layout"),
        ("neox", "llama.cpp", Level.OK, ""),
        ("granitemoe", "llama.cpp", Level.REFUSED, "granitemoe"),
        ("neox", "MLX", Level.REFUSED, "gpt_neox"),
    ],
)
def test_verdict_of_each_program(made: dict[str, Path], kind: str, program: str, level: Level, reason: str) -> None:
    verdict = checked(made[kind])[program]
    assert verdict.level is level
    assert reason in verdict.reason
    assert verdict.level is Level.OK or verdict.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_on_gguf_and_mlx_match_their_writers(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    described = base_config(made[kind])
    writers: dict[str, Callable[[], None]] = {
        "llama.cpp": lambda: gguf_adapter.write(made[kind], described, tmp_path / "adapter.gguf"),
        "MLX": lambda: mlx.write(made[kind], described, tmp_path / "mlx"),
    }
    found = checked(made[kind])
    for program, write in writers.items():
        try:
            write()
            written = True
        except (MismatchError, ConfigError):
            written = False
        assert written is (found[program].level is not Level.REFUSED), (program, found[program])


def test_gguf_file_in_the_folder_removes_the_converters_warning(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["rslora"], tmp_path)
    gguf_adapter.write(folder, base_config(made["rslora"]), folder / "adapter.gguf")
    assert checked(folder)["llama.cpp"].level is Level.OK


@pytest.mark.parametrize(("rank", "needed"), [(16, None), (17, 32), (200, 256), (512, 512)])
def test_vllm_verdict_names_the_next_allowed_rank(
    made: dict[str, Path], tmp_path: Path, rank: int, needed: int | None
) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: torch.ones((rank, t.shape[1]) if ".lora_A." in key else (t.shape[0], rank))
            for key, t in tensors.items()
        }

    folder = with_tensors(with_config(copied(made["plain"], tmp_path), r=rank), wider)
    verdict = checked(folder)["vLLM"]
    assert verdict.level is (Level.WARN if needed else Level.OK)
    assert verdict.reason.endswith(f"--max-lora-rank {needed}" if needed else "")


def test_rank_above_vllms_limit_is_refused_with_the_remedy(made: dict[str, Path], tmp_path: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.ones((600, t.shape[1]) if ".lora_A." in k else (t.shape[0], 600)) for k, t in tensors.items()}

    verdict = checked(with_tensors(with_config(copied(made["plain"], tmp_path), r=600), wider))["vLLM"]
    assert verdict.level is Level.REFUSED
    assert "truncate_rank=512" in verdict.remedy


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("1.mlp.up_proj.lora_B", "1.mlp.up_projection.lora_B"): t for key, t in tensors.items()}


def both_renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("mlp.up_proj.", "mlp.up_projection."): t for key, t in tensors.items()}


def with_lora_c(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"base_model.model.model.layers.0.mlp.up_proj.lora_C.weight": torch.ones(4, 4)}


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t[:, :2].contiguous() if "0.mlp.down_proj.lora_B" in key else t for key, t in tensors.items()}


def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values()))[0, 0] = torch.nan
    return tensors


def untrained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(t) if ".lora_B." in key else t for key, t in tensors.items()}


@pytest.mark.closes("D01", "D09")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, "has no lora_B: a tensor is missing or was renamed"),
        (both_renamed, "is in the weights, but is not a target"),
        (with_lora_c, "lora_C.weight is not part of a LoRA"),
        (cut, "which do not match a rank in adapter_config.json"),
        (broken, "1 of 28 tensors hold NaN or infinities, first base_model"),
        (untrained, "every lora_B is zero: the adapter changes nothing"),
    ],
)
def test_broken_tensors_are_refused_without_a_base(
    made: dict[str, Path], tmp_path: Path, change: Callable[..., dict[str, torch.Tensor]], reason: str
) -> None:
    folder = with_tensors(copied(made["plain"], tmp_path), change)
    verdict = checked(folder, base=False)[FILES]
    assert verdict.level is Level.REFUSED
    assert any(reason in v.reason for v in compatibility.verdicts(folder, None) if v.level is Level.REFUSED)
    assert compatibility.is_unusable(compatibility.verdicts(folder, None))


def test_embeddings_saved_by_peft_are_accepted(made: dict[str, Path], tmp_path: Path) -> None:
    def with_embeddings(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("model.embed_tokens.base_layer.weight", "lm_head.weight")
        return tensors | {f"base_model.model.{name}": torch.ones(514, 64) for name in names}

    folder = with_tensors(copied(made["plain"], tmp_path), with_embeddings)
    assert not compatibility.is_unusable(compatibility.verdicts(folder, base_config(made["plain"])))
    assert "trained in full" in checked(folder)["vLLM"].reason


def test_adapter_of_parameters_is_not_checked_as_layers(made: dict[str, Path], tmp_path: Path) -> None:
    def of_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight": torch.ones(shape)
                for part, shape in (("A", (32, 64)), ("B", (128, 32)))}  # fmt: skip

    folder = copied(made["plain"], tmp_path)
    with_config(folder, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    found = compatibility.verdicts(with_tensors(folder, of_experts), base_config(made["plain"]))
    assert not compatibility.is_unusable(found)
    assert {v.program: v.level for v in found}["vLLM"] is Level.REFUSED


def test_target_without_a_tensor_is_compared_with_the_base(made: dict[str, Path], tmp_path: Path) -> None:
    targets = json.loads((made["plain"] / peft_folder.CONFIG).read_text())["target_modules"]
    folder, described = copied(made["plain"], tmp_path), base_config(made["plain"])

    def levels(target: str, config: dict[str, Any] | None) -> list[Level]:
        found = compatibility.verdicts(with_config(folder, target_modules=[*targets, target]), config)
        return [v.level for v in found if v.program == FILES and "has no tensor" in v.reason]

    assert levels("query_key_value", described) == [], "PEFT ignores targets that the base does not have"
    assert checked(folder)["vLLM"].level is Level.REFUSED
    assert levels("query_key_value", None) == [Level.WARN]
    assert levels("lm_head", described) == [Level.REFUSED]


def test_untrained_layers_are_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    def one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.zeros_like(t) if "0.mlp.up_proj.lora_B" in k else t for k, t in tensors.items()}

    found = compatibility.verdicts(with_tensors(copied(made["plain"], tmp_path), one), None)
    assert [v.level for v in found if "1 of 14 lora_B are zero" in v.reason] == [Level.WARN]
    assert not compatibility.is_unusable(found)


@pytest.mark.closes("D03")
def test_wrong_base_is_found_by_its_config(made: dict[str, Path], tmp_path: Path) -> None:
    other = json.loads((tiny_folder(tmp_path, "llama") / "config.json").read_text())
    for config, reason in (
        (other | {"intermediate_size": 96}, "in the base, but A"),
        (other | {"num_hidden_layers": 1}, "the base has no layer model.layers.1"),
        (base_config(made["gpt2"]), "the base has no layer"),
    ):
        found = compatibility.verdicts(made["plain"], config)
        assert any(reason in v.reason and v.level is Level.REFUSED for v in found), config
    assert not compatibility.is_unusable(compatibility.verdicts(made["plain"], {"model_type": "of the future"}))


def test_local_base_closed_mode_and_missing_license_are_warnings(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["plain"], tmp_path)
    (folder / peft_folder.WEIGHTS).chmod(0o600)
    found = [v for v in compatibility.verdicts(folder, None) if v.program == FILES]
    assert [v.level for v in found] == [Level.WARN] * 3
    assert [v.remedy for v in found] == [
        "chmod 644; publishing does that as well", "publish with model.hub_id=OWNER/NAME", "publish with license=NAME",
    ]  # fmt: skip
    assert "0600" in found[0].reason and "not a hub id" in found[1].reason


def test_correct_folder_has_no_findings(made: dict[str, Path], tmp_path: Path) -> None:
    folder = with_config(copied(made["plain"], tmp_path), base_model_name_or_path="org/base", revision="0" * 40)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for path in folder.iterdir():
        path.chmod(0o644)
    assert [v for v in compatibility.verdicts(folder, base_config(made["plain"])) if v.program == FILES] == []


@pytest.mark.closes("D08")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda"])
def test_adapter_that_changed_its_base_is_refused_outside_peft(
    made: dict[str, Path], tmp_path: Path, init: str
) -> None:
    found = checked(with_config(copied(made["plain"], tmp_path), init_lora_weights=init))
    assert {name for name, v in found.items() if v.level is Level.REFUSED} == {*compatibility.PROGRAMS} - {
        "PEFT",
        "transformers",
    }
    assert "path_initial_model_for_weight_conversion" in found["PEFT"].remedy


def test_more_tokens_than_embedding_rows_are_reported(made: dict[str, Path]) -> None:
    smaller = base_config(made["plain"]) | {"vocab_size": 500}
    found = {v.program: v for v in compatibility.verdicts(made["plain"], smaller)}
    assert "base.resize_token_embeddings(512, mean_resizing=False)" in found["PEFT"].reason
    assert found["vLLM"].level is Level.REFUSED


def test_adapted_head_of_a_tied_base_is_refused(made: dict[str, Path]) -> None:
    tied = base_config(made["embedding"]) | {"tie_word_embeddings": True}
    found = {v.program: v for v in compatibility.verdicts(made["embedding"], tied)}
    assert found["llama.cpp"].level is Level.REFUSED and "share one matrix" in found["llama.cpp"].reason
    assert checked(made["embedding"])["llama.cpp"].level is not Level.REFUSED


@pytest.mark.parametrize(
    ("config", "release"),
    [
        ({}, "0.5.0"),
        ({"use_dora": False, "rank_pattern": {}}, "0.9.0"),  # 0.8 raises an error for an unknown key
        ({"use_dora": True, "use_rslora": True}, "0.9.0"),
        ({"peft_version": "0.21.2"}, "0.14.0"),  # drops unknown keys with a warning
        ({"target_parameters": ["experts.weight"], "peft_version": "0.21.2"}, "0.19.0"),
        ({"init_lora_weights": "pissa_niter_4"}, "0.11.0"),
        ({"kasa_config": None}, "0.14.0"),
    ],
)
@pytest.mark.closes("D06")
def test_minimum_peft(config: dict[str, Any], release: str) -> None:
    assert compatibility.minimum_peft(config) == release


def test_minimum_peft_of_a_config_with_all_defaults() -> None:
    """It also holds for a later PEFT, unless a new key has a default other than None and False."""
    assert compatibility.minimum_peft(LoraConfig(target_modules=["q_proj"]).to_dict()) == "0.14.0"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"peft_type": "IA3"}'),
        *(b'{"peft_type": "LORA", "r": "x"}', b'{"peft_type": "LORA", "r": 4, "rank_pattern": 3}'),
        b'{"peft_type": "LORA", "new": 1}',
    ],
)
def test_broken_config_is_a_finding(made: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    folder = copied(made["plain"], tmp_path)
    (folder / peft_folder.CONFIG).write_bytes(content)
    found = compatibility.verdicts(folder, base_config(made["plain"]))
    assert compatibility.is_unusable(found)
    assert all(v.level is Level.REFUSED for v in found if v.program != FILES)


def test_mutated_folders_do_not_crash_the_check(made: dict[str, Path], tmp_path: Path) -> None:
    """Change values of the config and bytes of the weights' header, or remove files, by a seeded generator."""
    folder = copied(made["plain"], tmp_path)
    draw, kept = random.Random(6), {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(kept[peft_folder.CONFIG])
    strange = [None, True, -1, 0, 1e308, "", "x" * 300, "../..", [], [1], [[]], {}, {"a": []}, {"q_proj": "b"}, ["\0"]]
    described = base_config(made["plain"])
    for _ in range(60):
        match draw.randrange(3):
            case 0:
                keys = draw.sample([*config, "loftq_config", "megatron_config", "layer_replication"], 2)
                mutated = config | {key: draw.choice(strange) for key in keys}
                (folder / peft_folder.CONFIG).write_text(json.dumps(mutated))
            case 1:
                data = bytearray(kept[peft_folder.WEIGHTS])
                for _ in range(3):
                    data[draw.randrange(3000)] = draw.randrange(256)
                (folder / peft_folder.WEIGHTS).write_bytes(data)
            case _:
                (folder / draw.choice(sorted(kept))).unlink()
        assert len(compatibility.verdicts(folder, described if draw.random() < 0.2 else None)) >= len(
            compatibility.PROGRAMS
        )
        for name, data in kept.items():
            (folder / name).write_bytes(data)


def test_command_prints_the_table_and_exits_with_0(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("publish", "lint_only=true", f"adapter_path={made['dora']}") == 0
    shown = capsys.readouterr().out
    assert all(program in shown for program in compatibility.PROGRAMS)
    assert "REFUSED" in shown and "DoRA" in shown


def test_command_exits_with_5_if_the_files_are_broken(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tensors(copied(made["plain"], tmp_path), broken)
    assert call("publish", "lint_only=true", f"adapter_path={folder}") == 5
    shown = capsys.readouterr()
    assert "PEFT" in shown.out and "hold NaN" in shown.err


def test_command_compares_the_adapter_with_the_named_base(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_folder(tmp_path, "gpt2")
    overrides = ("lint_only=true", f"adapter_path={made['plain']}", "model=local")
    assert call("publish", *overrides, f"model.path={other}") == 5
    assert "the base has no layer" in capsys.readouterr().err
    assert call("publish", *overrides, f"model.path={made['plain'].parents[1] / 'base'}") == 0
