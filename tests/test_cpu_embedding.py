"""model.embedding_device=cpu: the same numbers in every command, less memory on the device, and clear refusals."""

import json
from pathlib import Path

import pytest
import torch
from finished import call, rows_file, settings
from tiny import tiny_folder, tiny_model

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.errors import ConfigError
from lora_ft.memory.trace import trace_step
from lora_ft.models.cpu_embedding import is_on_cpu, keep_on_cpu
from lora_ft.models.fingerprint import fingerprint

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])


def test_model_keeps_its_device_its_hash_and_its_logits() -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    keep_on_cpu(model, CPU)
    assert is_on_cpu(model.get_input_embeddings()) and not is_on_cpu(plain.get_input_embeddings())
    assert "model.embed_tokens.weight" not in dict(model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.device == plain.device and fingerprint(model) == fingerprint(plain)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_embedding_moves_ids_to_the_cpu_and_rows_to_the_device() -> None:
    model = tiny_model("llama")
    keep_on_cpu(model, torch.device("meta"))
    rows = model.get_input_embeddings()(IDS)
    assert rows.is_meta and not model.get_input_embeddings().weight.is_meta


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.nightly
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_commands_give_the_same_bytes(quant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows = tiny_folder(tmp_path, "llama"), rows_file(tmp_path)
    common = [f"model.path={base}", f"quant.kind={quant}", f"data.path={rows}", "data.eval_fraction=0.4", "device=cpu"]
    found = []
    for device in ("auto", "cpu"):
        run, merged = tmp_path / device, tmp_path / f"merged-{device}"
        train = ["train.max_steps=3", f"model.embedding_device={device}", f"hydra.run.dir={run}"]
        assert call("train", *common, *train) == 0
        assert call("eval", f"run={run}", "device=cpu") == 0
        assert call("merge", f"run={run}", f"out={merged}", "device=cpu") == 0
        capsys.readouterr()
        assert call("chat", f"run={run}", "device=cpu", "prompt=Hello") == 0
        found.append(
            [
                (run / "adapter" / "adapter_model.safetensors").read_bytes(),
                json.loads((run / "eval.json").read_text())["adapter"]["loss"],
                (merged / "model.safetensors").read_bytes(),
                capsys.readouterr().out,
            ]
        )
    assert found[0] == found[1]


def test_head_that_shares_the_weight_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "llama", tie=True)
    words = [f"model.path={cfg.model.path}", f"data.path={cfg.data.path}", "device=cpu", "model.embedding_device=cpu"]
    for command in ("check", "train"):
        assert call(command, *words, f"hydra.run.dir={tmp_path / 'run'}") == 2
        assert "the head of llama shares the embedding's weight" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "adapter", "token_ids"),
    [
        ("adapter.target_modules", config.Adapter(target_modules=["embed_tokens", "q_proj"]), []),
        ("adapter.modules_to_save", config.Adapter(modules_to_save=["embed_tokens"]), []),
        ("model.added_tokens", config.Adapter(), [7]),
    ],
)
def test_embedding_that_trains_is_refused(key: str, adapter: config.Adapter, token_ids: list[int]) -> None:
    model = tiny_model("llama").requires_grad_(False)
    keep_on_cpu(model, CPU)
    with pytest.raises(ConfigError, match=f"{key} trains model.embed_tokens"):
        attach.attach(model, adapter, "first", 0, token_ids)


def test_traced_step_has_the_embedding_less_on_the_device() -> None:
    cfg, shape = config.TrainRun(), tiny_model("llama").config
    shape.vocab_size = 5120
    cfg.train.gradient_checkpointing = "off"
    plain = trace_step(cfg, shape, [40])
    cfg.model.embedding_device = "cpu"
    found = trace_step(cfg, shape, [40])
    of_embedding = 2 * shape.vocab_size * shape.hidden_size
    assert plain.resident["base"] - found.resident["base"] == of_embedding
    assert plain.peak_bytes - found.peak_bytes == of_embedding
    assert len(found.synchronisations) == len(plain.synchronisations) + 1
