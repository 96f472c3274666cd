"""Train an adapter with TRL's SFTTrainer on given rows; test_trl_oracle.py runs this file in TRL's environment.

    python tests/oracles/trl_sft.py CASE
    CASE/  settings.json  rows.jsonl  adapter/     ->     losses.json (a loss per step), trained/ (the adapter)

Each step has several padded micro-batches, so TRL has to count the tokens of all of them.
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
    settings = json.loads((case / "settings.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (case / "rows.jsonl").read_text("utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(case / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, max_steps=settings["steps"], per_device_train_batch_size=settings["rows_per_microbatch"],
        gradient_accumulation_steps=settings["microbatches"], learning_rate=settings["lr"], lr_scheduler_type="cosine",
        weight_decay=settings["weight_decay"], max_grad_norm=settings["clip"], optim="adamw_torch", max_length=None,
        train_sampling_strategy="sequential", completion_only_loss=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        PeftModel.from_pretrained(base, case / "adapter", is_trainable=True),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    (case / "losses.json").write_text(json.dumps(losses), "utf-8")
    trainer.model.save_pretrained(case / "trained")


main()
