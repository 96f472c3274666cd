"""The work of a run that its memory and time depend on: documents of its largest micro-batch, steps, tokens.

of_rows(cfg, dataset, packs)      from the run's own rows
of_settings(cfg)                  without rows: every micro-batch is full, of rows of data.max_length
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_ft import config


@dataclass(frozen=True)
class Workload:
    """Lengths of documents in tokens. `largest`: of the micro-batch with the most tokens, in the step with the most.

    typical: of the documents of a step of median size, all its micro-batches. steps, tokens: of the run, None if they
    depend on rows that are not there. assumed: "" if the lengths are those of rows, else a sentence that says what was
    assumed.
    """

    largest: Sequence[int]
    typical: Sequence[int]
    steps: int | None
    tokens: int | None
    assumed: str = ""


def of_settings(cfg: config.TrainRun) -> Workload:
    """Return the work of a run without rows: every step and micro-batch is full."""
    row = cfg.data.max_length
    step = max(row, cfg.train.tokens_per_step)
    most = max(row, min(step, cfg.train.microbatch_limit or step))
    return Workload(
        largest=_rows(most, row),
        typical=_rows(step, row),
        steps=cfg.train.max_steps,
        tokens=cfg.train.max_steps * step if cfg.train.max_steps else None,
        assumed=f"rows of {row:,} tokens, the most that data.max_length allows",
    )


def _rows(tokens: int, longest: int) -> list[int]:
    return [min(longest, tokens - start) for start in range(0, tokens, longest)]
