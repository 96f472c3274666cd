"""Other trainers at the same work: a plain PEFT loop, and TRL's SFTTrainer where it is installed.

8B QLoRA over the rows of qlora_8b (512 tokens each, no padding), and the 0.6B shape over those of mixed_0_6b, in padded
batches. They recompute every layer, as their users do. Counted are real tokens. lora_ft runs here once more, so that
each comparison is of one process and one state of the machine. Unsloth needs a process of its own: unsloth_peer.py.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_stages import mixed_0_6b, qlora_8b
from gpu_stages.bases import Batch, batches_of
from gpu_stages.machine import now, peaks
from gpu_stages.setting import NotHere, Part, Setting, attempt
from gpu_stages.training import WARM_UP, compose, measure
from lora_ft import config

DTYPE, LEARNING_RATE = torch.bfloat16, 2e-4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def works(setting: Setting) -> dict[str, list[str]]:
    """Return the overrides of each work by its name."""
    steps = WARM_UP + setting.sized(4, 1)
    large, small = setting.sized((qlora_8b.TOKENS[0], 8192), (qlora_8b.TINY_TOKENS[0], 64))
    return {
        f"8B nf4, {large} tokens": qlora_8b.overrides(setting, large, steps),
        f"0.6B, {small} tokens": mixed_0_6b.overrides(setting, small, steps),
    }


def run(setting: Setting) -> Iterator[Part]:
    for work, overrides in works(setting).items():
        yield f"peft, {work}", attempt(other, setting, peft_loop, overrides)
        yield f"lora_ft, {work}", attempt(measure, setting, overrides)
        yield f"trl, {work}", attempt(other, setting, trl, overrides)


Trainer = Callable[[config.TrainRun, list[Batch], torch.device], list[float]]


def other(setting: Setting, trainer: Trainer, overrides: list[str]) -> dict[str, Any]:
    """Run another trainer over the batches of a run; return its figures after the warm-up."""
    cfg, device = compose(setting, overrides), torch.device(setting.device)
    batches = batches_of(Path(cfg.data.path), cfg.train.tokens_per_step, cfg.train.max_steps or 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    moments = trainer(cfg, batches, device)
    seconds, tokens = moments[-1] - moments[WARM_UP - 1], sum(len(row) for batch in batches[WARM_UP:] for row in batch)
    per_step = seconds / len(batches[WARM_UP:])
    return {"tokens_per_second": tokens / seconds, "seconds_per_step": per_step, **peaks(device)}


def quantization(cfg: config.TrainRun) -> Any:
    from transformers import BitsAndBytesConfig

    if cfg.quant.kind is config.QuantKind.none:
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=DTYPE)  # fmt: skip


def load(cfg: config.TrainRun, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        cfg.model.path, dtype=DTYPE, device_map={"": device}, quantization_config=quantization(cfg)
    )


def lora_config(cfg: config.TrainRun) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=cfg.adapter.r, lora_alpha=cfg.adapter.lora_alpha, target_modules=LINEAR, task_type="CAUSAL_LM")


def peft_loop(cfg: config.TrainRun, batches: list[Batch], device: torch.device) -> list[float]:
    """Train as PEFT's documentation shows it; return the time at the end of each step."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = load(cfg, device)
    if cfg.quant.kind is not config.QuantKind.none:
        model = prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return padded_loop(get_peft_model(model, lora_config(cfg)).train(), batches, device)


def padded_loop(model: Any, batches: list[Batch], device: torch.device) -> list[float]:
    pad = torch.nn.utils.rnn.pad_sequence
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    moments = []
    for batch in batches:
        mask = pad([torch.ones_like(row) for row in batch], batch_first=True).to(device)
        ids = pad(batch, batch_first=True).to(device)
        with torch.autocast(device.type, dtype=DTYPE):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise ValueError(f"loss {float(loss)}")
        moments.append(now(device))
    return moments


def trl(cfg: config.TrainRun, batches: list[Batch], device: torch.device) -> list[float]:
    """Run TRL's SFTTrainer with its defaults over the same rows in order."""
    if importlib.util.find_spec("trl") is None:
        raise NotHere("trl is not installed")
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(now(device))

    size = len(batches[0])
    if any(len(batch) != size for batch in batches):
        raise NotHere("TRL counts rows, which differ between these steps")
    rows = [{"input_ids": row.tolist()} for batch in batches for row in batch]
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, max_steps=len(batches), max_length=None,
        learning_rate=LEARNING_RATE, bf16=True, use_cpu=device.type == "cpu", report_to="none", save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    SFTTrainer(
        model=load(cfg, device), args=arguments, train_dataset=Dataset.from_list(rows), peft_config=lora_config(cfg),
        processing_class=AutoTokenizer.from_pretrained(cfg.model.path), callbacks=[Clock()],
    ).train()  # fmt: skip
    return moments
