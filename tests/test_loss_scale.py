"""Training in float16: a step that overflows is skipped, the loss scale follows, and a resume repeats both."""

import json
import math
from pathlib import Path

import pytest
import torch
from finished import call, rows_file
from states import SETTINGS, Observer, some_rows, state_on, trained
from tiny import tiny_folder, tiny_model
from torch import Tensor

from lora_ft import config, runs
from lora_ft.errors import NonFiniteError
from lora_ft.models import load, meta_model
from lora_ft.training import checkpoint, loss_scale
from lora_ft.training.loss_scale import MOST_IN_A_ROW, LossScale
from lora_ft.training.state import TrainingState
from lora_ft.training.trainer import fit


def float16_state(folder: Path, *overflowing: int, **settings: object) -> TrainingState:
    """Return a state in float16 whose gradient overflows in the given steps."""
    train = {"train": config.Train(max_steps=8, tokens_per_step=60)}
    model = tiny_model("llama", dtype=torch.float16)
    state = state_on(model, folder, eval_examples=some_rows(3, seed=9), **train | settings)
    first = next(iter(state.parameters.values()))
    first.register_hook(lambda gradient: gradient * (math.inf if state.step + 1 in overflowing else 1.0))
    return state


def contents(state: TrainingState) -> dict[str, Tensor]:
    moments = {str(k): v.clone() for p in state.optimizer.state.values() for k, v in p.items()}
    return {"values": state.flat.values.clone(), **moments}


def test_adapter_and_optimizer_stay_in_float32(tmp_path: Path) -> None:
    state = float16_state(tmp_path)
    before = state.flat.values.clone()
    fit(state)
    assert {t.dtype for t in (state.flat.values, state.flat.gradients, *contents(state).values())} == {torch.float32}
    assert {p.dtype for n, p in state.base.named_parameters() if "lora" not in n} == {torch.float16}
    assert state.loss_scale == LossScale(1.0) and not torch.equal(before, state.flat.values)


def test_first_gradient_agrees_with_float64(tmp_path: Path) -> None:
    """The same weights, rounded to float16, in both models."""
    gradients = []
    for number, dtype in enumerate((torch.float16, torch.float64)):
        model = tiny_model("llama", dtype=torch.float16).to(dtype)
        state = state_on(model, tmp_path / str(number), optim=config.Optim(max_grad_norm=0))
        fit(state, until=1)
        gradients.append(state.flat.gradients.double())
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 5e-3


def test_step_with_an_overflow_is_skipped_and_the_next_one_trains(tmp_path: Path, caplog) -> None:
    state, kept, lines = float16_state(tmp_path, 3), {}, {}
    fit(state, [Observer(lambda s, m: (kept.update({m["step"]: contents(s)}), lines.update({m["step"]: m})))], until=4)
    assert kept[3].keys() == kept[2].keys()
    assert all(torch.equal(kept[3][name], kept[2][name]) for name in kept[2])
    assert not any(torch.equal(kept[4][name], kept[3][name]) for name in ("values", "exp_avg", "step"))
    assert [lines[step]["skipped"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert lines[3]["grad_norm"] == math.inf and lines[3]["loss"] == state.losses[2]
    del lines[3]["grad_norm"]  # JSON has no infinity
    assert runs.read_metrics(tmp_path) == [lines[step] for step in range(5)]
    assert [state.loss_scale.at(step) for step in (3, 4)] == [1.0, 0.5]
    assert "step 3 is skipped: loss" in caplog.text


def test_scale_is_halved_until_the_gradient_fits(tmp_path: Path) -> None:
    """A real overflow: with this scale the gradients of the first steps are too large for float16."""
    state = float16_state(tmp_path)
    state.loss_scale.start = 2.0**18
    fit(state)
    assert 1 <= len(state.loss_scale.skipped) <= 6
    assert state.loss_scale.skipped == [*range(1, len(state.loss_scale.skipped) + 1)]
    assert state.losses[-1] < state.losses[0]


def test_scale_changes_only_rounding(tmp_path: Path) -> None:
    results = []
    for start in (1.0, 0.25):
        state = float16_state(tmp_path / str(start))
        state.loss_scale.start = start
        results.append(trained(state) - torch.cat([p.flatten() for _, p in sorted(state.start.items())]))
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.05


@pytest.mark.parametrize("until", [3, 4])
def test_resumed_run_skips_and_scales_as_an_uninterrupted_one(until: int, tmp_path: Path) -> None:
    """A wrong scale would change the rounding of every later gradient."""
    whole = trained(float16_state(tmp_path / "whole", 1, 3, 6))
    trained(float16_state(tmp_path / "parts", 1, 3, 6), until)
    state = float16_state(tmp_path / "parts", 1, 3, 6)
    checkpoint.resume(state)
    assert state.loss_scale == LossScale(1.0, [1, 3], [1, 3])
    assert torch.equal(trained(state), whole)
    assert state.loss_scale.skipped == [1, 3, 6]
    keys = ("step", "loss", "grad_norm", "skipped")
    lines = {
        name: [[m.get(key) for key in keys] for m in runs.read_metrics(tmp_path / name)] for name in ("whole", "parts")
    }
    assert lines["parts"] == lines["whole"]


def test_too_many_overflows_in_a_row_stop_training(tmp_path: Path) -> None:
    state = float16_state(tmp_path, *range(3, 50), train=SETTINGS["train"])
    with pytest.raises(NonFiniteError, match=r"step 13: loss \d.*gradient norm (nan|inf)"):
        fit(state)
    assert state.loss_scale.skipped == [*range(3, 3 + MOST_IN_A_ROW)]


def test_loss_that_overflows_skips_the_step_and_keeps_the_scale(tmp_path: Path) -> None:
    state = float16_state(tmp_path)
    own = state.objective.loss

    class Broken:
        metrics = ()

        def loss(self, *arguments):
            found = own(*arguments)
            return found if state.step != 1 or not state.model.training else type(found)(found.sum * math.nan, 1.0)

    state.objective = Broken()
    fit(state, until=3)
    assert (state.loss_scale.skipped, state.loss_scale.overflows) == ([2], [])
    assert [math.isfinite(loss) for loss in state.losses] == [True, False, True]
    assert [("loss" in m, m.get("skipped")) for m in runs.read_metrics(tmp_path) if m["step"]] == [
        (True, 0), (False, 1), (True, 1)
    ]  # fmt: skip


def test_scale_starts_below_the_largest_sum_and_grows_back() -> None:
    starts = {tokens: loss_scale.for_tokens(tokens).start for tokens in (8, 65504, 65505, 131008, 200_000)}
    assert starts == {8: 1.0, 65504: 1.0, 65505: 0.5, 131008: 0.5, 200_000: 0.25}
    scale = LossScale(0.5)
    assert scale.skips(7, 2.0, math.inf) and not scale.skips(8, 2.0, 1.0) and scale.skips(9, 2.0, math.nan)
    assert [scale.at(step) for step in (10, 1007, 1008, 1009, 1010)] == [0.125, 0.125, 0.25, 0.25, 0.5]
    assert min(LossScale(1.0, overflows=[*range(1, 100, 2)]).at(100), 1) == 2.0**-MOST_IN_A_ROW


def test_other_dtypes_have_no_scale_and_ignore_no_overflow(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama", dtype=torch.bfloat16), tmp_path)
    assert state.loss_scale is None
    next(iter(state.parameters.values())).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="step 1"):
        fit(state)


def test_command_trains_in_float16(tmp_path: Path, monkeypatch) -> None:
    """The refusal of float16 on a CPU is switched off."""
    for module in (load, meta_model):
        monkeypatch.setattr(module, "resolve_dtype", lambda *_: torch.float16)
    run = tmp_path / "run"
    overrides = [f"model.path={tiny_folder(tmp_path, 'llama')}", f"data.path={rows_file(tmp_path)}"]
    steps = ["train.max_steps=4", "train.tokens_per_step=100", "data.eval_fraction=0.4", "train.log_every_steps=3"]
    assert call("train", *overrides, *steps, f"hydra.run.dir={run}") == 0
    assert [m["step"] for m in runs.read_metrics(run)] == [0, 1, 2, 3, 4]
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss"] < result["base_eval_loss"]
