"""Describe signs of overfitting after a run."""

import math

from lora_ft import metric_table
from lora_ft.metric_table import LOSS
from lora_ft.training.state import TrainingState


def overfitting(state: TrainingState) -> list[str]:
    """Describe signs of overfitting, in sentences; empty without an eval set."""
    finite = [loss for loss in state.losses if math.isfinite(loss)]  # others: skipped steps in float16
    if not state.best or not finite:
        return []
    metric = state.cfg.train.best_metric
    of_best = "" if metric == LOSS else f", best {metric} {state.best.value(metric):.4f} at step {state.best.step}"
    best = min(state.evaluations, key=lambda evaluation: evaluation.result.loss)
    last = state.evaluations[-1].result.loss
    window = finite[-max(1, len(finite) // 10) :]
    train_loss = math.fsum(window) / len(window)
    sentences = [
        f"train loss {train_loss:.4f} (mean of the last steps: {len(window)}), eval loss {last:.4f}, "
        f"best {best.result.loss:.4f} at step {best.step}{of_best}"
    ]
    if state.best.step == 0:
        sentences.append("no evaluation was better than before training: the learning rate may be too high")
    rising, patience = state.evaluations_without_gain, state.cfg.train.patience or 2
    if rising >= patience:
        sentences.append(
            f"{metric_table.title(metric)} has not improved for {rising} evaluations: the adapter overfits. Use "
            "fewer epochs, train.keep=best, a lower adapter.r or adapter.lora_dropout."
        )
    return sentences
