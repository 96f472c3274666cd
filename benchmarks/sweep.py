"""A sweep over one base beside the same jobs as separate commands: time, memory of the process tree, and the bytes.

    python benchmarks/sweep.py                        # adapter.r=2,4,8 on SmolLM2 and chatterbot, three rounds
    python benchmarks/sweep.py --rounds 5 adapter.r=4,8 quant=nf4

One round is each job by `lora-ft train`, one after the other, and then the sweep, all in fresh processes. It ends with
an error where an adapter of the sweep has not the sha256 of its job alone.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Measurement, run

COMMON = ["model=smollm2_135m", "data=chatterbot", "train.max_steps=10", "train.tokens_per_step=512"]
PROGRAM = str(Path(sys.executable).with_name("lora-ft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*", default=["adapter.r=2,4,8"])
    chosen = parser.parse_args()
    swept = [word for word in chosen.words if "," in word]
    if len(swept) != 1:
        parser.error("one of the words must name several values, as adapter.r=2,4,8")
    key, _, values = swept[0].partition("=")
    jobs = [[*COMMON, *(w for w in chosen.words if w != swept[0]), f"{key}={value}"] for value in values.split(",")]
    rounds = []
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as place:
            rounds.append(compared(jobs, [*COMMON, *chosen.words], Path(place)))
        sys.stdout.write(f"round {number + 1}: {json.dumps(rounds[-1])}\n")
        sys.stdout.flush()
    for name in rounds[0]:
        found = [one[name] for one in rounds]
        sys.stdout.write(f"{name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})\n")


def compared(jobs: list[list[str]], together: list[str], place: Path) -> dict[str, float]:
    """One round: figures in seconds and GB, and the sweep's over those of its jobs alone."""
    alone = [command("train", [*words, f"hydra.run.dir={place / f'alone{n}'}"], place) for n, words in enumerate(jobs)]
    sweep = command("sweep", [*together, f"hydra.sweep.dir={place / 'sweep'}"], place)
    for n in range(len(jobs)):
        here, there = (result(place / name)["adapter_sha256"] for name in (f"alone{n}", f"sweep/{n}"))
        if here != there:
            raise SystemExit(f"job {n}: {there} in the sweep, {here} alone")
    seconds, peak = sum(one.seconds for one in alone), max(one.peak_tree_bytes for one in alone)
    return {
        "seconds_alone": round(seconds, 1),
        "seconds_sweep": round(sweep.seconds, 1),
        "time_ratio": sweep.seconds / seconds,
        "peak_alone_gb": peak / 1e9,
        "peak_sweep_gb": sweep.peak_tree_bytes / 1e9,
        "memory_ratio": sweep.peak_tree_bytes / peak,
    }


def command(command: str, words: list[str], place: Path) -> Measurement:
    log = place / "log"
    measured = run([PROGRAM, command, *words], dict(os.environ), log)
    if measured.returncode:
        raise SystemExit(f"{command} {' '.join(words)} ended with {measured.returncode}:\n{log.read_text()}")
    return measured


def result(folder: Path) -> dict[str, str]:
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    main()
