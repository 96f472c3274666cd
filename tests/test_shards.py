"""A base in parts trains the adapter of a whole base, to the bit, and holds two units at a time.

One process stands for one of several ranks here: a gather copies what the other ranks would send. test_ranks.py has
real ones.
"""

from pathlib import Path

import pytest
import torch
from ranked import watched
from states import detach, state_on, trained
from tiny import tiny_model
from torch import Tensor, distributed
from zoo import ZOO, zoo_model

from lora_ft import config
from lora_ft.errors import ConfigError
from lora_ft.models.shards import sharded
from lora_ft.ops.ranks import Ranks

PART = Ranks(shards=True)
SOME = ("llama", "gpt2", "gemma2", "gpt_oss", "lfm2")
REST = [pytest.param(name, marks=pytest.mark.nightly) for name in ZOO if name not in SOME]


class Done:
    def wait(self) -> None:
        pass


@pytest.fixture(autouse=True)
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(buffer: Tensor, part: Tensor, async_op: bool) -> Done:
        assert async_op
        buffer.copy_(part)
        return Done()

    monkeypatch.setattr(distributed, "all_gather_single", gather)


def train(name: str, folder: Path, ranks: Ranks | None, **settings: object) -> Tensor:
    state = state_on(zoo_model(name), folder, optim=config.Optim(lr=1e-3), **settings)
    with sharded(state.base, ranks or Ranks()) as shards:
        held = watched(state, shards) if shards else []
        adapter = trained(state)
    detach(state)
    assert not shards or max(held) <= shards.held_bytes
    return adapter


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", [*SOME, *REST])
def test_family_trains_the_same_adapter(name: str, tmp_path: Path) -> None:
    settings = {"train": config.Train(max_steps=3, tokens_per_step=60)}
    whole = train(name, tmp_path / "whole", None, **settings)
    assert torch.equal(train(name, tmp_path / "parts", PART, **settings), whole)


@pytest.mark.parametrize("setting", ["every_1", "every_2"])
def test_recomputed_layers_are_gathered_again(setting: str, tmp_path: Path) -> None:
    settings = {"train": config.Train(max_steps=3, tokens_per_step=60, gradient_checkpointing=setting)}
    whole = train("llama", tmp_path / "whole", None, **settings)
    assert torch.equal(train("llama", tmp_path / "parts", PART, **settings), whole)


def test_base_that_training_changes_is_noticed(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    with sharded(state.base, PART) as shards:
        before = shards.checksum()
        shards.units[1].part[0] += 1
        assert shards.checksum() != before
    detach(state)


def test_freed_weights_take_no_memory(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    weight = state.base.model.layers[1].mlp.up_proj.base_layer.weight
    with sharded(state.base, PART) as shards:
        assert [unit.buffer.untyped_storage().nbytes() for unit in shards.units] == [0] * 4
        assert weight.untyped_storage().nbytes() == 0 and weight.shape == (128, 64)
        shards.need(2, 3)
        assert weight.untyped_storage().nbytes() > 0
    detach(state)


def test_hooks_are_removed(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    count = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in state.base.modules())
    with sharded(state.base, PART):
        pass
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in state.base.modules()) == count
    detach(state)


def test_model_without_an_adapter_in_its_layers_is_refused(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    state.base.requires_grad_(False)
    with pytest.raises(ConfigError, match="no decoder layer of llama has an adapter"), sharded(state.base, PART):
        pass
    detach(state)
