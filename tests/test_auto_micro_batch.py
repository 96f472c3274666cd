"""train.tokens_per_microbatch=auto: the largest micro-batch that fits, or the fastest pair with the recomputation."""

import itertools
import json
import math
from pathlib import Path

import hypothesis
import pytest
from finished import call, rows_file, settings
from hypothesis import given
from hypothesis import strategies as st
from states import detach, state_on
from tiny import tiny_folder, tiny_model

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError
from lora_ft.memory import auto
from lora_ft.memory.pairs import Sizes, fastest, largest_that_fits, spacing
from lora_ft.memory.trace import trace_loaded
from lora_ft.training.state import TrainingState

PLENTY = 10**12


def auto_state(folder: Path, family: str = "llama", **train: object) -> TrainingState:
    settings = {"max_steps": 6, "tokens_per_step": 200, "tokens_per_microbatch": "auto"}
    return state_on(tiny_model(family), folder, settle=False, train=config.Train(**(settings | train)))


def free(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(auto, "available_bytes", lambda device: number)


@given(
    st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 10**6), st.floats(0.1, 100), st.floats(1, 1.2),
    st.integers(0, 10**6),
)  # fmt: skip
def test_largest_size_that_fits_is_found_with_few_traces(
    least: int, more: int, fixed: int, slope: float, power: float, budget: int
) -> None:
    sizes, asked = Sizes(least, least + more, least + more), set()

    def needed(tokens: int) -> int:
        asked.add(tokens)
        return fixed + int(slope * tokens**power)

    found = largest_that_fits(sizes, needed, budget)
    assert len(asked) <= 10
    assert needed(found) <= budget or found == sizes.least
    # The next size, and one that needs a hundredth of the memory more, do not fit.
    larger = sizes.rounded(found + 2 * spacing(found))
    assert found == sizes.most or needed(larger) > budget or budget - needed(found) <= 0.01 * budget


@hypothesis.settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 1000), st.integers(0, 4000), st.integers(0, 3 * 10**6), st.integers(0, 3000))
def test_pair_fits_and_few_pairs_are_faster(layers: int, least: int, more: int, budget: int, launches: int) -> None:
    """Against all pairs of settings and sizes, by a model in which layers and tokens add up."""
    sizes, settings = Sizes(least, least + more, least + more), auto.settings_of(layers)

    def recomputed(setting: str) -> int:
        return 0 if setting == "off" else math.ceil(layers / int(setting.removeprefix("every_")))

    def needed(setting: str, tokens: int) -> int:
        return 1000 + tokens * (20 * (layers - recomputed(setting)) + 2 * layers)

    def seconds(setting: str, tokens: int) -> float:
        return (layers * 3 + recomputed(setting)) * max(launches, tokens)

    setting, tokens = fastest(settings, sizes, needed, seconds, budget)
    assert least <= tokens <= sizes.most
    possible = [
        (sizes.micro_batches(n) * seconds(s, n), s, n)
        for s, n in itertools.product(settings, {least, sizes.most, *range(least, sizes.most, 100)})
        if needed(s, n) <= budget
    ]
    if not possible:
        assert (setting, tokens) == (settings[-1], least)
        return
    assert needed(setting, tokens) <= budget
    # Sizes between two of the search, and settings whose estimates are close, may be a little better.
    assert sizes.micro_batches(tokens) * seconds(setting, tokens) <= 1.35 * min(possible)[0]


@pytest.mark.parametrize("setting", ["off", "every_1"])
def test_size_follows_the_free_memory_by_the_traced_peak(setting: str, tmp_path: Path, monkeypatch) -> None:
    state = auto_state(tmp_path, gradient_checkpointing=setting)
    longest = max(len(example.ids) for example in state.examples)
    peaks = {n: trace_loaded(state, [n], setting) for n in (longest, 128)}
    needed = {n: found.peak_bytes - found.loaded_bytes for n, found in peaks.items()}
    chosen = {}
    for number in (0, needed[longest], needed[128], PLENTY):
        free(monkeypatch, math.ceil(number / auto.USABLE) + 4096)
        tokens, same, reason = auto.choose_micro_batch(state)
        assert same == setting and (number == PLENTY or f"{tokens:,} tokens" in reason)
        chosen[number] = tokens
    step = max(sum(len(state.examples[i].ids) for i in each) for each in state.steps)
    assert list(chosen.values()) == sorted(chosen.values())
    assert chosen[0] == longest and chosen[PLENTY] == step and chosen[needed[128]] >= 128 - 64
    detach(state)


def test_both_on_auto_give_a_pair_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = auto_state(tmp_path, gradient_checkpointing="auto")
    for setting, tokens in (("off", 128), ("every_2", 192), ("every_1", 64)):
        found = trace_loaded(state, [tokens], setting)
        budget = found.peak_bytes - found.loaded_bytes
        free(monkeypatch, math.ceil(budget / auto.USABLE) + 1)
        size, chosen, _ = auto.choose_micro_batch(state)
        traced = trace_loaded(state, [size], chosen)
        assert traced.peak_bytes - traced.loaded_bytes <= budget
    detach(state)


@pytest.mark.parametrize("packing", [True, False])
def test_auto_is_settled_once_and_logged(packing: bool, tmp_path: Path, monkeypatch, caplog) -> None:
    state = auto_state(tmp_path, packing=packing, gradient_checkpointing="auto")
    free(monkeypatch, PLENTY)
    with caplog.at_level("INFO", "lora_ft"):
        auto.settle(state)
    lengths = [[len(state.examples[i].ids) for i in step] for step in state.steps]
    assert state.tokens_per_microbatch == max(map(sum if packing else max, lengths))
    assert state.gradient_checkpointing == "off"
    assert f"train.tokens_per_microbatch=auto: {state.tokens_per_microbatch}, " in caplog.text
    state.tokens_per_microbatch = 77  # as restored from a checkpoint
    auto.settle(state)
    assert state.tokens_per_microbatch == 77
    detach(state)


def test_step_that_cannot_be_traced_has_the_smallest_micro_batches(tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no meta function")

    state = auto_state(tmp_path, gradient_checkpointing="auto")
    free(monkeypatch, 0)
    monkeypatch.setattr(auto, "trace_loaded", fail)
    longest = max(len(example.ids) for example in state.examples)
    assert auto.choose_micro_batch(state)[:2] == (longest, "every_1")
    assert "the step cannot be traced" in caplog.text
    detach(state)


QUICK = ("model=local", "train.tokens_per_step=160", "adapter.r=2", "adapter.lora_dropout=0.1", "optim.lr=0.01",
         "data.eval_fraction=0.4", "train.eval_every_steps=2", "train.samples=0", "train.save_every_steps=2",
         "optim.schedule=constant")  # fmt: skip


def test_auto_run_has_the_bytes_of_the_number_and_of_a_resumed_run(tmp_path: Path, monkeypatch) -> None:
    tiny_folder(tmp_path, "llama")
    inputs = (*QUICK, f"model.path={tmp_path / 'llama'}", f"data.path={rows_file(tmp_path)}")
    with monkeypatch.context() as patch:
        free(patch, 0)
        assert call("train", *inputs, "train.tokens_per_microbatch=auto", "train.max_steps=4",
                    f"hydra.run.dir={tmp_path / 'auto'}") == 0  # fmt: skip
        assert call("train", *inputs, "train.tokens_per_microbatch=auto", "train.max_steps=2",
                    f"hydra.run.dir={tmp_path / 'resumed'}") == 0  # fmt: skip
    number = runs.read_result(tmp_path / "auto")["tokens_per_microbatch"]
    assert number < 160
    # Now more memory is free, but the masks of dropout depend on the micro-batches.
    assert call("train", f"resume={tmp_path / 'resumed'}", "train.max_steps=4") == 0
    assert call("train", *inputs, f"train.tokens_per_microbatch={number}", "train.max_steps=4",
                f"hydra.run.dir={tmp_path / 'typed'}") == 0  # fmt: skip
    results = {name: runs.read_result(tmp_path / name) for name in ("auto", "resumed", "typed")}
    assert {found["tokens_per_microbatch"] for found in results.values()} == {number}
    assert len({found["adapter_sha256"] for found in results.values()}) == 1
    metrics = runs.read_metrics(tmp_path / "auto")
    assert {m["tokens_per_microbatch"] for m in metrics if "loss" in m} == {number}
    stored = runs.read_config(tmp_path / "auto")["train"]["tokens_per_microbatch"]
    assert stored == "auto"
    assert runs.read_config(tmp_path / "typed")["train"]["tokens_per_microbatch"] == number


@pytest.mark.parametrize("value", ["auto", 128, None])
def test_setting_keeps_its_type(value: object, tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.train.tokens_per_microbatch = value
    kept = validation.from_plain(config.TrainRun, json.loads(json.dumps(validation.to_plain(cfg))))
    validation.validate(kept)
    assert kept.train.tokens_per_microbatch == value and type(kept.train.tokens_per_microbatch) is type(value)
    assert kept.train.microbatch_limit == (value if value != "auto" else None)


@pytest.mark.parametrize("value, rule", [(0, "at least 1"), ("most", "a number or auto"), ("64", "a number or auto")])
def test_other_values_are_refused(value: object, rule: str, tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.train.tokens_per_microbatch = value
    with pytest.raises(ConfigError, match=f"train.tokens_per_microbatch must be {rule}, got {value}"):
        validation.validate(validation.typed(cfg, config.TrainRun))


def test_command_line_explains_the_type(capfd) -> None:
    assert call("train", "train.tokens_per_microbatch=1.5") == 2
    assert "train.tokens_per_microbatch must be an integer or auto, got 1.5" in capfd.readouterr().err
