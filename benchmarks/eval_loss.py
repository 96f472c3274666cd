"""One evaluator for all trainers: plain PEFT and transformers, row by row, on the same held-out ids and labels.

python benchmarks/eval_loss.py CASE BASE=FOLDER ...   prints nats per token: {"fp32": 3.91, "FOLDER": 3.42}

A folder is a PEFT adapter, or a transformers model with the adapter merged into it. BASE is what an adapter was trained
on, fp32 or nf4: one trained on 4 bits makes up for their error first, and loses on the unquantized base.
"""

import json
import sys
from pathlib import Path

import torch
from peers.protocol import token_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_ft.io import allocator


@torch.no_grad()
def loss(model: PreTrainedModel, rows: list[dict[str, list[int]]]) -> float:
    """Mean over the supervised tokens of all rows; the sum is kept in Python's double precision."""
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += int((labels[1:] != -100).sum())
    return total / tokens


def load(folder: str, base: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quantization = config if base == "nf4" else None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)


def main() -> None:
    allocator.configure()
    case, trained = Path(sys.argv[1]), [argument.partition("=") for argument in sys.argv[2:]]
    rows = token_rows(case, "eval")
    model = json.loads((case / "settings.json").read_text("utf-8"))["model"]
    losses = {base: loss(load(model, base), rows) for base in sorted({base for base, _, _ in trained})}
    for base, _, folder in trained:
        if (Path(folder) / "adapter_config.json").exists():
            losses[folder] = loss(PeftModel.from_pretrained(load(model, base), folder), rows)
        else:
            losses[folder] = loss(load(folder, base), rows)
    sys.stdout.write("\n" + json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
