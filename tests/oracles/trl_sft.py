"""TRL's SFTTrainer over the rows and from the adapter that it is given; test_trl_oracle.py runs it where TRL is.

    python tests/oracles/trl_sft.py CASE
    CASE/  settings.json  rows.jsonl  adapter/     ->     losses.json, one a step; trained/, the adapter

A step's rows come in several padded micro-batches, so that TRL has to count tokens over all of them.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    case = Path(sys.argv[1])
    given = json.loads((case / "settings.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (case / "rows.jsonl").read_text("utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(case / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, max_steps=given["steps"], per_device_train_batch_size=given["rows_per_microbatch"],
        gradient_accumulation_steps=given["microbatches"], learning_rate=given["lr"], lr_scheduler_type="cosine",
        weight_decay=given["weight_decay"], max_grad_norm=given["clip"], optim="adamw_torch", max_length=None,
        train_sampling_strategy="sequential", completion_only_loss=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        PeftModel.from_pretrained(base, case / "adapter", is_trainable=True),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    (case / "losses.json").write_text(json.dumps(losses), "utf-8")
    trainer.model.save_pretrained(case / "trained")


main()
