"""LLaMA-Factory's own sft workflow on the pre-tokenized rows.

default: its own defaults, activation checkpointing and rows in random order among them.
best:    checkpointing off and batches of rows of like length.

Its torchaudio import gets an empty module: the wheels need CUDA, and no text uses it.
prepare writes the rows as the tokenized dataset that it loads by tokenized_path.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import protocol
from datasets import Dataset, DatasetDict

VARIANTS = {
    "default": {},
    "best": {"disable_gradient_checkpointing": True, "train_sampling_strategy": "group_by_length"},
}

# Before LLaMA-Factory is imported; with a spec, since transformers asks whether there is such a package.
sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))


def prepare(given: protocol.Arguments) -> None:
    rows = [row | {"attention_mask": [1] * len(row["labels"]), "images": None, "videos": None, "audios": None}
            for row in protocol.token_rows(given.case, "train")]  # fmt: skip
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(given.case / "llama_factory"))


def train(given: protocol.Arguments) -> None:
    from hf_trainer import timed
    from llamafactory.train.tuner import run_exp

    case, watch = given.settings, protocol.Stopwatch()
    recipe = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": case.r, "lora_alpha": case.alpha,
        "lora_target": "all", "lora_dropout": 0.0, "model_name_or_path": case.model, "template": "smollm2",
        "dataset": "named, but not read",
        "tokenized_path": str(given.case / "llama_factory"), "output_dir": str(given.out / "adapter"),
        "per_device_train_batch_size": case.rows_per_step, "gradient_accumulation_steps": 1, "max_steps": case.steps,
        "learning_rate": case.lr, "lr_scheduler_type": "constant", "max_grad_norm": case.clip, "weight_decay": 0.0,
        "seed": given.seed, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": False, "fp16": False, **VARIANTS[given.variant],
    }  # fmt: skip
    run_exp(recipe, callbacks=[timed(watch)])
    protocol.report(watch.outcome(given.out / "adapter", "llamafactory", "transformers", "peft"))


given = protocol.arguments()
if given.variant == "prepare":
    prepare(given)
else:
    train(given)
