"""train.gradient_checkpointing=auto: as few recomputed layers as fit into the free memory, by the traced step."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import detach, state_on
from tiny import FAMILIES, tiny_model

from lora_ft import config
from lora_ft.data.packing import largest_micro_batch
from lora_ft.memory import auto
from lora_ft.memory.trace import trace_loaded
from lora_ft.training.state import TrainingState


def auto_state(family: str, folder: Path, **train: object) -> TrainingState:
    settings = {"max_steps": 6, "tokens_per_step": 60, "gradient_checkpointing": "auto"}
    return state_on(tiny_model(family), folder, settle=False, train=config.Train(**(settings | train)))


def largest(state: TrainingState) -> list[int]:
    train = state.cfg.train
    return largest_micro_batch(state.examples, state.steps, train.tokens_per_microbatch, train.packing)


def recomputed(setting: str, layers: int) -> int:
    return 0 if setting == "off" else math.ceil(layers / int(setting.removeprefix("every_")))


@given(st.integers(1, 80), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 90_000), st.integers(0, 90_000))
def test_fewest_layers_that_fit_are_recomputed(layers: int, kept: int, fixed: int, budget: int, more: int) -> None:
    asked: list[str] = []

    def needed(setting: str) -> int:
        asked.append(setting)
        return fixed + kept * (layers - recomputed(setting, layers))

    chosen = auto.fewest_recomputed(layers, needed, budget)
    assert len(set(asked)) <= 2 + math.log2(2 * math.isqrt(layers) + 3)
    count = recomputed(chosen, layers)
    assert needed(chosen) <= budget or count == layers
    possible = sorted({0, *(math.ceil(layers / every) for every in range(1, layers + 1))})
    fewer = [each for each in possible if each < count]
    assert all(fixed + kept * (layers - each) > budget for each in fewer)
    assert recomputed(auto.fewest_recomputed(layers, needed, budget + more), layers) <= count


@pytest.mark.parametrize("family", FAMILIES)
def test_setting_follows_the_free_memory_by_the_traced_peak(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = auto_state(family, tmp_path)
    lengths = largest(state)
    for setting in ("off", "every_2", "every_1"):
        found = trace_loaded(state, lengths, setting)
        free = math.ceil((found.peak_bytes - found.loaded_bytes) / auto.USABLE) + 1
        monkeypatch.setattr(auto, "available_bytes", lambda device, free=free: free)
        chosen, reason = auto.choose(state)
        assert chosen == setting
        assert f"a step of {sum(lengths)} tokens" in reason and "GB free" in reason
    detach(state)


@pytest.mark.parametrize("free, setting", [(10**12, "off"), (0, "every_1"), (None, "off")])
def test_auto_is_settled_and_logged(
    free: int | None, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = auto_state("llama", tmp_path)
    monkeypatch.setattr(auto, "available_bytes", lambda device: free)
    with caplog.at_level("INFO", "lora_ft"):
        auto.settle(state)
    assert state.gradient_checkpointing == setting
    assert f"train.gradient_checkpointing=auto: {setting}, " in caplog.text
    detach(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_traced_if_memory_is_plentiful(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = auto_state(family, tmp_path)
    found = trace_loaded(state, [60], "off")
    assert 60 * auto.more_than_kept(state.base) > found.at_peak["forward"]
    monkeypatch.setattr(auto, "available_bytes", lambda device: 10**12)
    monkeypatch.setattr(auto, "trace_loaded", None)
    assert auto.choose(state)[0] == "off"
    detach(state)


def test_step_that_cannot_be_traced_recomputes_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no meta function")

    state = auto_state("llama", tmp_path)
    monkeypatch.setattr(auto, "available_bytes", lambda device: 0)
    monkeypatch.setattr(auto, "trace_loaded", fail)
    assert auto.choose(state)[0] == "every_1"
    assert "the step cannot be traced" in caplog.text and "NotImplementedError: no meta function" in caplog.text
    detach(state)
