"""Predict the memory and the time of a training on any device, before anything is downloaded.

lora-ft plan model=llama3_1_8b quant=nf4 adapter.r=16 data.max_length=4096 hardware=rtx_4090
"""

import sys

from lora_ft import config, objectives
from lora_ft.cli import entry
from lora_ft.memory import machine, workload
from lora_ft.memory.prediction import predict
from lora_ft.models.load import load_tokenizer
from lora_ft.models.meta_model import load_meta_model


def main(cfg: config.PlanRun, invocation: entry.Invocation) -> None:
    """Print the plan."""
    model_class = objectives.find(cfg.objective).model_class
    base = load_meta_model(cfg.model, cfg.quant, cfg.device, load_tokenizer(cfg.model), model_class)
    device = machine.resolve(cfg.hardware, cfg.device)
    found = predict(cfg, base.model.config, workload.of_settings(cfg), device)
    for term in found.terms:
        sys.stdout.write(f"{term.name:<20} {term.bytes / 2**30:8.2f} GiB  {term.source}\n")
    sys.stdout.write(f"{'peak':<20} {found.peak_bytes / 2**30:8.2f} GiB  in the {found.phase}: fits {found.fits}\n")


if __name__ == "__main__":
    entry.run("plan")
