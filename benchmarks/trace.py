"""Trace a training step of a published model's shape, without weights and without a GPU; print one line of JSON.

    python benchmarks/trace.py shape=llama3_1_8b quant=nf4 tokens=4096 gradient_checkpointing=every_1

shape=     one of benchmarks/shapes.py
tokens=    tokens of the step, 4096 by default          documents=    documents of equal length in it, 1 by default
Other arguments are overrides of `lora-ft train`, such as adapter.r=8; gradient_checkpointing= is short for that of
train. The bytes are those of tensors: the CUDA context, workspaces and the allocator's gaps come on top.
"""

import json
import sys
import time

import lora_ft
from lora_ft.memory.trace import trace_step


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    shape = given.pop("shape", "llama3_1_8b")
    tokens, documents = int(given.pop("tokens", 4096)), int(given.pop("documents", 1))
    given["train.gradient_checkpointing"] = given.pop("gradient_checkpointing", "every_1")
    cfg = lora_ft.compose("train", [f"{name}={value}" for name, value in given.items()])

    from shapes import config_of

    started = time.perf_counter()
    found = trace_step(cfg, config_of(shape), [tokens // documents] * documents)
    line = {
        "shape": shape,
        "tokens": tokens,
        "documents": documents,
        **given,
        "peak_bytes": found.peak_bytes,
        "peak_gib": round(found.peak_bytes / 2**30, 2),
        "peak_phase": found.peak_phase,
        "resident_bytes": found.resident_bytes,
        "resident": found.resident,
        "at_peak": found.at_peak,
        "dispatches": found.dispatches,
        "dispatches_of_the_step": sum(found.dispatches.values()),
        "plain_lora_layers": len(found.plain_lora_layers),
        "synchronisations": found.synchronisations,
        "matmul_tflop": round(found.flops / 1e12, 1),
        "reasons": found.reasons,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
