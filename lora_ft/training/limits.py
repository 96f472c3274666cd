"""Check that a run can train on its rows: their lengths, the steps of its warm-up, the tokens that it adds."""

import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.data.examples import Examples, lengths_of
from lora_ft.data.packing import check_capacity, longest_group
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError
from lora_ft.evaluation.generation import context_length


def check_lengths(
    examples: Sequence[Example], eval_examples: Sequence[Example], model: PreTrainedModel, cfg: config.TrainRun
) -> None:
    """Raise an error if an example is longer than a micro-batch or than the model's context, or may be in a stream."""
    limit = cfg.train.microbatch_limit
    check_capacity(max((eval_examples, examples), key=longest_group), limit)
    if cfg.data.stream and (most := min(limit or math.inf, context_length(model))) < cfg.data.max_length:
        raise ConfigError(
            f"data.max_length={cfg.data.max_length} allows rows of a stream that are longer than "
            f"{'train.tokens_per_microbatch' if most == limit else 'the context of the model'}: lower it to {most}"
        )
    longest = max((examples, eval_examples), key=lambda side: lengths_of(side).max(initial=0))
    lengths, context = lengths_of(longest), context_length(model)
    if lengths.max() > context:
        source = longest[int(lengths.argmax())].source
        raise DataError(
            f"{source} has {lengths.max()} tokens, but the model's context is {context} tokens: lower data.max_length"
        )


def check_warmup(optim: config.Optim, num_steps: int) -> None:
    if optim.warmup_steps and optim.warmup_steps >= num_steps:
        raise ConfigError(f"optim.warmup_steps must be less than the run's {num_steps} steps, got {optim.warmup_steps}")


def check_added_tokens(model: config.Model, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    """Raise DataError for an added token that no training row contains: its embedding would not be trained (A22)."""
    if not model.added_tokens:
        return
    unseen = set(tokenizer.convert_tokens_to_ids(list(model.added_tokens)))
    for block in examples.blocks():
        unseen.difference_update(np.unique(block.ids).tolist())
        if not unseen:
            return
    missing = [token for token in model.added_tokens if tokenizer.convert_tokens_to_ids(token) in unseen]
    raise DataError(f"model.added_tokens: no training row contains {', '.join(missing)}, so they would not be trained")
