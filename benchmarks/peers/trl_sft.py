"""TRL's SFTTrainer on the pre-tokenized rows.

default:      its own defaults (activation checkpointing, chunked loss, rows in random order) but for what the case
              fixes, fp32 being one of them.
best:         checkpointing off and batches of rows of like length.
padding_free: as best, and the rows of a batch laid end to end. transformers' sdpa keeps them apart by their
              position_ids, at the price of scores over the whole of the batch. No max_length: it refuses both together.
"""

import protocol
from datasets import Dataset
from hf_trainer import timed
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

BEST = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
VARIANTS = {"default": {}, "best": BEST, "padding_free": BEST | {"padding_free": True, "max_length": None}}


def main() -> None:
    given = protocol.arguments()
    case, watch = given.settings, protocol.Stopwatch()
    config = SFTConfig(
        output_dir=str(given.out), per_device_train_batch_size=case.rows_per_step, max_steps=case.steps,
        learning_rate=case.lr, lr_scheduler_type="constant", max_grad_norm=case.clip, weight_decay=0.0,
        seed=given.seed, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        model_init_kwargs={"dtype": "float32"}, disable_tqdm=True, **VARIANTS[given.variant],
    )  # fmt: skip
    lora = LoraConfig(r=case.r, lora_alpha=case.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list(protocol.token_rows(given.case, "train"))
    trainer = SFTTrainer(case.model, config, train_dataset=rows, peft_config=lora, callbacks=[timed(watch)])
    trainer.train()
    trainer.model.save_pretrained(given.out / "adapter")
    protocol.report(watch.outcome(given.out / "adapter", "trl", "transformers", "peft"))


main()
