"""The work of a run that its memory and time depend on: documents of its micro-batches, steps, tokens.

of_rows(cfg, dataset)     from the run's own rows
of_settings(cfg)          without rows: every micro-batch is full, of rows of data.max_length
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_ft import config, objectives
from lora_ft.data.dataset import Dataset
from lora_ft.data.mixed_dataset import mix_of
from lora_ft.data.packing import largest_micro_batch, longest_group, micro_batch_lengths
from lora_ft.training.state import longest, plan_steps


@dataclass(frozen=True)
class Workload:
    """Lengths of documents in tokens.

    largest: documents of the micro-batch with the most tokens in any step. typical: micro-batches of a step of median
    size, each as the lengths of its documents. steps, tokens, epochs: of the run, None if they depend on rows that are
    not there. longest: row of the run, evaluation included, which a micro-batch must hold. assumed: "" if the lengths
    are those of rows, else a sentence that says what was assumed.
    """

    largest: Sequence[int]
    typical: Sequence[Sequence[int]]
    steps: int | None
    tokens: int | None
    epochs: float | None = None
    longest: int = 0
    assumed: str = ""

    @property
    def typical_tokens(self) -> int:
        """Tokens of a step of median size."""
        return sum(map(sum, self.typical))

    @property
    def typical_micro_batch(self) -> Sequence[int]:
        """Documents of the micro-batch of that step whose size is nearest to the mean."""
        mean = self.typical_tokens / len(self.typical)
        return min(self.typical, key=lambda lengths: abs(sum(lengths) - mean))

    def of_largest(self) -> "Workload":
        """Return the work as if its steps were the largest micro-batch alone: nothing else is traced."""
        return replace(self, typical=[self.largest])


def of_rows(cfg: config.TrainRun, dataset: Dataset, packs: bool = True) -> Workload:
    """Return the work of a run on its rows; `packs` is false if documents of this model cannot share a sequence."""
    examples, capacity, packs = dataset.train, cfg.train.microbatch_limit, cfg.train.packing and packs
    mix = mix_of(dataset, cfg.data)
    steps = plan_steps(examples, cfg.train, cfg.seed, mix)
    median = steps[int(np.argsort(steps.tokens)[len(steps) // 2])]
    return Workload(
        largest=largest_micro_batch(examples, steps, capacity, packs),
        typical=micro_batch_lengths([examples[i] for i in median], capacity, packs),
        steps=len(steps),
        tokens=int(steps.tokens.sum()),
        epochs=mix.epochs(steps) if mix else int(steps.documents.sum()) / len(examples),
        longest=max(longest(cfg, examples), longest_group(dataset.eval)),
    )


def of_settings(cfg: config.TrainRun, context: int | None = None) -> Workload:
    """Return the work of a run without rows: steps and micro-batches are full, of rows as long as the settings allow.

    `context` is the most tokens that the model can read.
    """
    capacity = cfg.train.microbatch_limit
    limits = {"data.max_length": cfg.data.max_length, "train.tokens_per_microbatch": capacity, "the context": context}
    row, limit = min((tokens, name) for name, tokens in limits.items() if tokens)
    step = max(row, cfg.train.tokens_per_step)
    most = max(row, min(step, capacity or step)) if cfg.train.packing else row
    return Workload(
        largest=_rows(most, row),
        typical=[_rows(each, row) for each in _rows(step, most)],
        steps=cfg.train.max_steps,
        tokens=cfg.train.max_steps * step if cfg.train.max_steps else None,
        longest=row,
        assumed=f"rows of {row:,} tokens, the most that {limit} allows"
        + (", and 2 classes" if objectives.classifies(cfg.objective) else ""),
    )


def _rows(tokens: int, longest: int) -> list[int]:
    return [min(longest, tokens - start) for start in range(0, tokens, longest)]
