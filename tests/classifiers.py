"""Classifiers for tests: rows with labels, the settings of a short run, and the logits of a loaded model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import SENTENCES, tiny_folder, tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lora_ft.classes import Classes
from lora_ft.models import heads

LABELS = ("bad", "good", "so so")
ONE = Classes(LABELS, counts=(4, 2, 6), rows=12)
SEVERAL = Classes(("a", "b", "c", "d"), is_multi=True, counts=(6, 3, 2, 1), rows=12)
_WORDS = [word for sentence in SENTENCES for word in sentence.split()]


def tiny_classifier(family: str, classes: Classes, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model with a head for classes, as loading a base makes it."""
    model = tiny_model(family, dtype=dtype)
    heads.describe(model.config, classes)
    with torch.random.fork_rng(devices=[]):
        made = AutoModelForSequenceClassification.from_config(model.config, dtype=dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    heads.draw(made)
    return made.eval()


def rows_file(path: Path, number: int = 36, label: Any = lambda n: LABELS[n % 3], seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(generator.choice(_WORDS, 3 + n % 9)) + f" {LABELS[n % 3]} {n}", "label": label(n)}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def words_of(tmp_path: Path, family: str = "llama", **options: Any) -> list[str]:
    """Return the overrides of a short run on a tiny base and labelled rows."""
    base = tmp_path / family if (tmp_path / family).is_dir() else tiny_folder(tmp_path, family)
    rows = tmp_path / "rows.jsonl" if (tmp_path / "rows.jsonl").is_file() else rows_file(tmp_path / "rows.jsonl")
    given = {
        "model": "local", "model.path": base, "data": "classify", "data.path": rows, "data.eval_fraction": 0.3,
        "objective": "classification", "adapter.r": 4, "adapter.lora_alpha": 8, "optim.lr": 3e-3,
        "train.max_steps": 6, "train.tokens_per_step": 150, "hydra.run.dir": tmp_path / "run",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (given | options).items()]


TEXTS = ["The fox is good", "a tree", "What is close to pi? so so"]


def logits_of(model: Any, tokenizer: Any, device: str = "cpu") -> Tensor:
    """Return the logits of a padded batch and of each text alone, which are the same rows."""
    found = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
        alone = [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits for text in TEXTS]
    return torch.cat([together, *alone]).double()
