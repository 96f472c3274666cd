"""Changes to a run that must not change its adapter, losses and gradient norms.

Relative bounds of the norm are 1e-12 in float64 and 1e-6 in float32. Results are bit-identical if the order of
additions is the same. Each case is an epoch of three steps with 8, 8 and 3 rows of different lengths.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from states import Observer, some_rows, state_on
from tiny import tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lora_ft import config, runs
from lora_ft.data.packing import micro_batches
from lora_ft.evaluation.loss import eval_loss
from lora_ft.objectives import sft
from lora_ft.ops.batch import Batch
from lora_ft.ops.token_loss import Paths, token_loss_sum
from lora_ft.training import trackers, trainer
from lora_ft.training.callbacks import Callback
from lora_ft.training.progress import Progress
from lora_ft.training.trainer import fit

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
ROWS, EVAL_ROWS = some_rows(19), some_rows(5, seed=9)
OPTIM = config.Optim(lr=1e-3, weight_decay=0.01, schedule=config.Schedule.cosine, warmup_steps=1, max_grad_norm=0.5)
STEPS = np.split(np.arange(19), [8, 16])

Outcome = tuple[Tensor, Tensor, Tensor]


def outcome(
    family: str,
    dtype: torch.dtype,
    folder: Path,
    *,
    steps: list[np.ndarray] = STEPS,
    callbacks: Sequence[Callback] = (),
    fast: bool = True,
    track: config.Tracker = config.Tracker.none,
    **train: object,
) -> Outcome:
    """Train; return the final adapter, and the loss and gradient norm of every step."""
    state = state_on(
        tiny_model(family, dtype=dtype), folder, examples=ROWS, eval_examples=EVAL_ROWS, fast=fast,
        track=config.Track(track),
        train=config.Train(**{"tokens_per_step": 100, "gradient_checkpointing": "off", **train}), optim=OPTIM,
    )  # fmt: skip
    state.steps = steps
    seen = Observer()
    for callback in callbacks:
        callback.on_start(state)
    fit(state, [seen, *callbacks])
    for callback in callbacks:
        callback.on_end(state, None)
    seen = [metrics for metrics in seen.seen if "loss" in metrics]
    adapter = torch.cat([p.detach().flatten() for _, p in sorted(state.parameters.items())])
    assert len(seen) == len(steps)
    losses, norms = (torch.tensor([m[name] for m in seen], dtype=torch.float64) for name in ("loss", "grad_norm"))
    return adapter, losses, norms


@dataclass(frozen=True)
class Baseline:
    """A model family in a dtype, and the expected outcome: one packed micro-batch per step, no recomputation."""

    family: str
    dtype: torch.dtype
    expected: Outcome

    def check(self, found: Outcome, *, bit_identical: bool = False) -> None:
        for ours, theirs in zip(found, self.expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < BOUNDS[self.dtype]
            assert torch.equal(ours, theirs) or not bit_identical


@pytest.fixture(
    scope="module",
    params=[("gpt2", torch.float64), ("llama", torch.float64), ("qwen3", torch.float64), ("llama", torch.float32)],
    ids=str,
)
def baseline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    family, dtype = request.param
    return Baseline(family, dtype, outcome(family, dtype, tmp_path_factory.mktemp("expected")))


@pytest.mark.closes("A01")
@pytest.mark.parametrize("rows_together", [4, 1])
def test_the_cut_into_micro_batches_does_not_change_training(
    rows_together: int, baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows as 2 x 4 and 8 x 1."""

    def cut(rows, capacity, packing):
        parts = [rows[i : i + rows_together] for i in range(0, len(rows), rows_together)]
        return [batch for part in parts for batch in micro_batches(part, None, True)]

    monkeypatch.setattr(trainer, "micro_batches", cut)
    baseline.check(outcome(baseline.family, baseline.dtype, tmp_path))


@pytest.mark.parametrize("change", [{"tokens_per_microbatch": 40}, {"packing": False}], ids=str)
def test_packing_and_micro_batch_size_do_not_change_training(change: dict, baseline: Baseline, tmp_path: Path) -> None:
    baseline.check(outcome(baseline.family, baseline.dtype, tmp_path, **change))


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_of_rows_within_a_step_does_not_change_training(
    packing: bool, baseline: Baseline, tmp_path: Path
) -> None:
    generator = np.random.default_rng(1)
    steps = [generator.permutation(step) for step in STEPS]
    baseline.check(outcome(baseline.family, baseline.dtype, tmp_path, steps=steps, packing=packing))


def padded(side: str, more: int) -> Callable[[PreTrainedModel, Batch, Paths], Tensor]:
    """Return a loss function that uses transformers' forward on rows padded to the longest length plus `more`."""

    def loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
        longest = max(end - start for start, end in pairwise(batch.starts)) + more
        shape = (len(batch.starts) - 1, longest)
        ids, mask, targets = torch.full(shape, 3), torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        for row, (start, end) in enumerate(pairwise(batch.starts)):
            at = slice(0, end - start) if side == "right" else slice(longest - (end - start), longest)
            ids[row, at], mask[row, at], targets[row, at] = batch.ids[start:end], 1, batch.targets[start:end]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return loss_sum


@pytest.mark.closes("A10")
@pytest.mark.parametrize(("side", "more"), [("right", 9), ("left", 0)])
def test_packed_rows_train_like_padded_rows(
    side: str, more: int, baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows use transformers' own forward, attention and mask."""
    monkeypatch.setattr(sft, "token_loss_sum", padded(side, more))
    baseline.check(outcome(baseline.family, baseline.dtype, tmp_path, fast=False))


@pytest.mark.parametrize("every", ["every_1", "every_2"])
def test_recomputing_activations_is_bit_identical(every: str, baseline: Baseline, tmp_path: Path) -> None:
    baseline.check(outcome(baseline.family, baseline.dtype, tmp_path, gradient_checkpointing=every), bit_identical=True)


def test_evaluation_settings_do_not_change_training(baseline: Baseline, tmp_path: Path) -> None:
    found = outcome(baseline.family, baseline.dtype, tmp_path, eval_every_steps=2, eval_rows=1)
    baseline.check(found, bit_identical=True)


def test_trackers_and_progress_do_not_change_training(baseline: Baseline, tmp_path: Path) -> None:
    screen, track = Console(file=StringIO()), config.Tracker.tensorboard
    callbacks = [*trackers.callbacks(config.Track(track)), Progress(screen, None)]
    found = outcome(baseline.family, baseline.dtype, tmp_path, callbacks=callbacks, track=track)
    baseline.check(found, bit_identical=True)
    assert [m["step"] for m in runs.read_metrics(tmp_path)] == [*range(len(STEPS) + 1)]
    assert "eval loss" in screen.file.getvalue()


@pytest.mark.closes("A14", "A25")
def test_the_eval_loss_is_a_mean_over_tokens_however_it_is_batched(baseline: Baseline, tmp_path: Path) -> None:
    """Dropout is off during evaluation, and the model is in training mode again afterwards."""
    state = state_on(
        tiny_model(baseline.family, dtype=baseline.dtype),
        tmp_path,
        adapter=config.Adapter(r=4, lora_alpha=64, lora_dropout=0.3),
        examples=ROWS,
        optim=OPTIM,
    )
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.add_(0.1 * ("lora_B" in name))
    model = state.base.train()
    (batch,) = [b.to(model.device) for b in micro_batches(EVAL_ROWS, None, True)]
    assert token_loss_sum(model, batch, state.paths) != token_loss_sum(model, batch, state.paths)
    generator = torch.get_rng_state()
    separate = [eval_loss(model, sft.Sft().loss, [row], state.paths, 1) for row in EVAL_ROWS]
    mean = math.fsum(h.loss * h.tokens for h in separate) / sum(h.tokens for h in separate)
    for capacity in (1, 40, 90, 10_000):
        found = eval_loss(model, sft.Sft().loss, EVAL_ROWS, state.paths, capacity)
        assert found.loss == pytest.approx(mean, rel=BOUNDS[baseline.dtype])
        assert found.tokens == sum(int(row.supervised.sum()) for row in EVAL_ROWS)
        assert found == eval_loss(model, sft.Sft().loss, EVAL_ROWS, state.paths, capacity)
    assert mean != pytest.approx(math.fsum(h.loss for h in separate) / len(separate), rel=1e-5)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_missing_row_exceeds_the_bounds(baseline: Baseline, tmp_path: Path) -> None:
    """The bounds of the tests above are tight: one row less in one step changes the adapter by far more."""
    found = outcome(baseline.family, baseline.dtype, tmp_path, steps=[STEPS[0][:-1], *STEPS[1:]])
    for ours, theirs in zip(found, baseline.expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) > 1e3 * BOUNDS[torch.float32]
