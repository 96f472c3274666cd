"""Unsloth's path for CPUs, with TRL's SFTTrainer on the pre-tokenized rows.

default:  its own gradient checkpointing, rows in random order.     best: no checkpointing, rows grouped by length.
"""

import protocol
from unsloth import FastLanguageModel  # before transformers and TRL, which it changes

# isort: split
from datasets import Dataset
from hf_trainer import timed
from trl import SFTConfig, SFTTrainer

VARIANTS = {"default": {}, "best": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    given = protocol.arguments()
    case, watch = given.settings, protocol.Stopwatch()
    checkpointing = "unsloth" if given.variant == "default" else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        case.model, max_seq_length=2048, dtype="float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=case.r, lora_alpha=case.alpha, lora_dropout=0, bias="none", target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing, random_state=given.seed,
    )  # fmt: skip
    config = SFTConfig(
        output_dir=str(given.out), per_device_train_batch_size=case.rows_per_step, max_steps=case.steps,
        learning_rate=case.lr, lr_scheduler_type="constant", max_grad_norm=case.clip, weight_decay=0.0,
        optim="adamw_torch", seed=given.seed, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True, **VARIANTS[given.variant],
    )  # fmt: skip
    rows = Dataset.from_list(protocol.token_rows(given.case, "train"))
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[timed(watch)])
    trainer.train()
    trainer.model.save_pretrained(given.out / "adapter")
    protocol.report(watch.outcome(given.out / "adapter", "unsloth", "trl", "transformers", "peft"))


main()
