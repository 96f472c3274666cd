"""The loop that one writes by hand: PEFT, padded batches, transformers' own loss, no checkpointing.

sorted: batches of rows of like length, so that little is padded.
nf4:    the same over a base that bitsandbytes holds in 4 bits.
"""

import random

import protocol
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

QUANTIZATION = {"sorted": None, "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)}  # fmt: skip


def batches(rows: list[dict[str, list[int]]], size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    random.Random(seed).shuffle(groups)
    return [
        {
            "input_ids": padded(group, "input_ids", 0),
            "labels": padded(group, "labels", -100),
            "attention_mask": pad_sequence([torch.ones(len(row["labels"]), dtype=torch.long) for row in group], True),
        }
        for group in groups
    ]


def padded(group: list[dict[str, list[int]]], name: str, value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row[name]) for row in group], True, value)


def main() -> None:
    given = protocol.arguments()
    case, watch = given.settings, protocol.Stopwatch()
    torch.manual_seed(given.seed)
    model = AutoModelForCausalLM.from_pretrained(
        case.model, dtype=torch.float32, quantization_config=QUANTIZATION[given.variant]
    )
    lora = LoraConfig(r=case.r, lora_alpha=case.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.lr, weight_decay=0.0, fused=True)
    for batch in batches(protocol.token_rows(given.case, "train"), case.rows_per_step, given.seed):
        watch.forward(int(batch["attention_mask"].sum()))
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, case.clip)
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
        watch.learned(loss.item(), norm.item())
    model.save_pretrained(given.out / "adapter")
    protocol.report(watch.outcome(given.out / "adapter", "transformers", "peft"))


main()
