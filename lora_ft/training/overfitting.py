"""Describe signs of overfitting after a run."""

import math

from lora_ft.training.state import TrainingState


def overfitting(state: TrainingState) -> list[str]:
    """Describe signs of overfitting, in sentences; empty without an eval set."""
    finite = [loss for loss in state.losses if math.isfinite(loss)]  # others: skipped steps in float16
    if not state.best or not finite:
        return []
    last = state.evaluations[-1].result.loss
    window = finite[-max(1, len(finite) // 10) :]
    train_loss = math.fsum(window) / len(window)
    sentences = [
        f"train loss {train_loss:.4f} (mean of the last steps: {len(window)}), eval loss {last:.4f}, "
        f"best {state.best.result.loss:.4f} at step {state.best.step}"
    ]
    if state.best.step == 0:
        sentences.append("no evaluation was better than before training: the learning rate may be too high")
    rising, patience = state.evaluations_without_gain, state.cfg.train.patience or 2
    if rising >= patience:
        sentences.append(
            f"eval loss has not improved for {rising} evaluations: the adapter overfits. Use fewer epochs, "
            "train.keep=best, a lower adapter.r or adapter.lora_dropout."
        )
    return sentences
