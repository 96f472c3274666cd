"""Two ranks of one thread each against one process of two threads: speed, and the time of the reduction.

python benchmarks/ranks.py --rounds 3

Trains SmolLM2-135M, in turns: one process, two ranks with the whole base, two ranks with a part of it each. Prints
tokens per second of each run, ratios of medians, the time to add the gradients, and what 8 GPUs move on paper.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("model=smollm2_135m", "data=chatterbot", "adapter.r=16", "train.max_steps=6", "train.tokens_per_step=1024",
         "train.eval_rows=2", "train.samples=0", "train.save_every_steps=null")  # fmt: skip
KINDS = {"one process": (1, 2, ()), "two ranks": (2, 1, ("dist=ddp",)), "two ranks, shard": (2, 1, ("dist=shard",))}
REDUCE = """
import os, time, torch, torch.distributed as d
d.init_process_group("gloo")
x, times = torch.randn(int(os.environ["VALUES"])), []
for _ in range(20):
    d.barrier(); t = time.perf_counter(); d.all_reduce(x); times.append(time.perf_counter() - t)
if d.get_rank() == 0: print(sorted(times)[10])
d.destroy_process_group()
"""


def run(kind: str, quant: str, folder: Path) -> dict[str, float]:
    """Train once; return tokens per second after the first step and the number of trained parameters."""
    ranks, threads, more = KINDS[kind]
    words = [*WORDS, *more, f"quant={quant}", f"hydra.run.dir={folder}"]
    launch(ranks, threads, ["-m", "lora_ft.train", *words])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line][1:]
    return {
        "tokens_per_second": sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps),
        "parameters": json.loads((folder / "result.json").read_text())["trainable_parameters"],
    }


def launch(ranks: int, threads: int, words: list[str], **more: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | more
    made = subprocess.run(command if ranks > 1 else [sys.executable, *words], env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if made.returncode:
        sys.exit(made.stderr)
    return made.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quant", default="none,nf4")
    options = parser.parse_args()
    for quant in options.quant.split(","):
        speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        parameters = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                for kind, found in speeds.items():
                    made = run(kind, quant, Path(folder) / f"{number}-{kind.replace(' ', '-')}")
                    found.append(made["tokens_per_second"])
                    parameters = made["parameters"]
        one = statistics.median(speeds["one process"])
        for kind, found in speeds.items():
            each = ", ".join(f"{speed:.0f}" for speed in found)
            print(f"{quant:5s} {kind:17s} {each} tokens/s, ratio {statistics.median(found) / one:.2f}")
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(REDUCE)
            script.flush()
            seconds = float(launch(2, 1, [script.name], VALUES=str(int(parameters))))
        print(f"{quant:5s} adding {parameters:,.0f} gradients: {1000 * seconds:.1f} ms")
    on_paper()


def on_paper(gpus: int = 8, tokens: int = 4096) -> None:
    """Print the bytes that each of 8 GPUs receives per step, and their time beside that of the products.

    Llama-3.1-8B, NF4 with nested scales, rank 16 on all linear layers, one micro-batch of 4,096 tokens on each GPU,
    every layer recomputed. Half of the peak speed is reached.
    """
    layers, ends, trained = 6.979e9, 128_256 * 4096, 41.9e6
    products = 3 * 2 * (layers + ends) * tokens  # forward, forward again, and the gradient of the inputs
    others = (gpus - 1) / gpus
    reduced = 2 * others * 4 * trained
    gathered = others * (2 * layers * (0.5 + 0.0159) + 2 * 2 * ends)
    for name, flops, rate in (("H100, NVLink", 989e12, 450e9), ("H100, 400 Gb/s network", 989e12, 50e9),
                              ("RTX 4090, PCIe 4", 165e12, 25e9)):  # fmt: skip
        seconds = products / (flops / 2)
        print(f"{name:23s} products {1000 * seconds:5.0f} ms"
              f", ddp {reduced / 1e9:.2f} GB {1000 * reduced / rate:4.0f} ms"
              f", shard {gathered / 1e9:.1f} GB {1000 * gathered / rate:4.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
