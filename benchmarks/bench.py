"""Every trainer on the same case, in turns: A B C A B C, each in a fresh process. What is measured: README.md.

python benchmarks/bench.py --rounds 3 --cases mixed-all,mixed-answers,equal-all --write
python benchmarks/bench.py --rounds 1 --cases mixed-all --trainers ours:fp32,peft_loop:sorted

Peers get virtual environments of their own under .venvs, made from peers/NAME.txt when they are not there. Nothing
else should run on the machine meanwhile. Without --write the results are printed and go to .cache only.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import case
import ceiling
import measure
import summary
from peers import protocol

HERE = Path(__file__).resolve().parent
VENVS, RUNS, RESULTS = HERE / ".venvs", case.CACHE / "runs", HERE / "results"


@dataclass(frozen=True)
class Peer:
    """variants: in the order of a round. prepares: writes its own form of base or rows first. alone: packages that are
    installed without what they depend on."""

    variants: tuple[str, ...]
    prepares: bool = False
    alone: tuple[str, ...] = ()


PEERS = {
    "ours": Peer(("fp32", "nf4", "int8", "checkpoint", "plain")),
    "peft_loop": Peer(("sorted", "nf4")),
    "trl_sft": Peer(("default", "best", "padding_free")),
    "llama_factory": Peer(("default", "best"), prepares=True, alone=("llamafactory==0.9.5",)),
    "litgpt_lora": Peer(("default", "batch"), prepares=True),
    # Without torchvision, which it requires and does not use here: it refuses a build for another torch.
    "unsloth_cpu": Peer(("default", "best"), alone=("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")),
}
ALL = [f"{name}:{variant}" for name, peer in PEERS.items() for variant in peer.variants]
# mixed-all: everybody, but for ours without fast paths. answers: ours and what PEFT and TRL do at their fastest.
# equal-all: the fastest settings of each project.
CASES = {
    "mixed-all": [trainer for trainer in ALL if trainer != "ours:plain" and not trainer.startswith("unsloth")],
    "mixed-answers": ["ours:fp32", "peft_loop:sorted", "trl_sft:best", "trl_sft:padding_free"],
    "equal-all": [
        "ours:fp32",
        "peft_loop:sorted",
        "trl_sft:best",
        "trl_sft:padding_free",
        "llama_factory:best",
        "litgpt_lora:batch",
    ],
    "equal-answers": ["ours:fp32", "peft_loop:sorted", "trl_sft:best"],
}
GPU_ONLY = "axolotl needs a GPU, and has no script here"


def main() -> None:
    given = parsed(sys.argv[1:])
    say(GPU_ONLY)
    asked = {name: given.trainers or CASES[name] for name in given.cases}
    names = list(dict.fromkeys(summary.project(trainer) for trainers in asked.values() for trainer in trainers))
    interpreters = {name: interpreter(name) for name in names}
    now = datetime.now()
    results = {
        "date": f"{now:%Y-%m-%d %H:%M}", "machine": machine(), "threads": given.threads, "rounds": given.rounds,
        "cases": [],
    }  # fmt: skip
    for name in given.cases:
        kind, _, supervision = name.partition("-")
        folder = case.build(kind, supervision, given.steps)
        results["cases"].append(run_case(name, folder, asked[name], given, interpreters))
    text = summary.document(results)
    target = RESULTS if given.write else case.CACHE / "results"
    target.mkdir(parents=True, exist_ok=True)
    stem = f"{now:%Y-%m-%d_%H%M}"
    (target / f"{stem}.json").write_text(json.dumps(results, indent=1), "utf-8")
    summary.draw(results, target / f"{stem}.png")
    if given.write:
        readme = HERE / "README.md"
        picture = f"![speed and memory of each trainer](results/{stem}.png)"
        readme.write_text(summary.written_between(readme.read_text("utf-8"), f"{text}\n\n{picture}"), "utf-8")
    say(text)
    say(f"written: {target / stem}.json and .png")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=_names, default=["mixed-all", "mixed-answers", "equal-all"],
                        help=f"of {','.join(CASES)}")  # fmt: skip
    parser.add_argument("--trainers", type=_names, default=[],
                        help=f"of {','.join(ALL)}; a bare name: all of its; default: by case")  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into results/ and README.md")
    given = parser.parse_args(arguments)
    given.trainers = [t for asked in given.trainers for t in ([asked] if ":" in asked else _variants(asked))]
    if unknown := [t for t in given.trainers if t not in ALL]:
        parser.error(f"no such trainer: {', '.join(unknown)}; there are {', '.join(ALL)}")
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if given.steps < 2 or given.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    return given


def _names(text: str) -> list[str]:
    return text.split(",")


def _variants(name: str) -> list[str]:
    return [trainer for trainer in ALL if trainer.startswith(f"{name}:")] or [name]


def interpreter(name: str) -> Path:
    """The Python that runs a peer; its environment is made if it is not there or its requirements changed."""
    if name == "ours":
        return Path(sys.executable)
    folder, requirements = VENVS / name, HERE / "peers" / f"{name}.txt"
    asked = requirements.read_bytes() + repr(PEERS[name].alone).encode()
    mark, digest = folder / "requirements.sha256", hashlib.sha256(asked).hexdigest()
    python = folder / "bin" / "python"
    if not mark.exists() or mark.read_text() != digest:
        say(f"{name}: making its environment")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", requirements], check=True)
        if PEERS[name].alone:
            subprocess.run([*install, "--no-deps", *PEERS[name].alone], check=True)
        mark.write_text(digest)
    return python


def run_case(
    name: str, folder: Path, trainers: list[str], given: argparse.Namespace, interpreters: dict[str, Path]
) -> summary.Record:
    """All rounds of a case; the GEMM rate is taken before and after each."""
    environment = quiet_environment(given.threads)
    unprepared: dict[str, summary.Record] = {}
    for peer in dict.fromkeys(map(summary.project, trainers)):
        if PEERS[peer].prepares:
            record = one_run(f"{peer}:prepare", folder, 0, interpreters[peer], environment)
            if record["error"]:
                unprepared[peer] = record | {"error": f"prepare: {record['error']}"}
    total, tokens = ceiling.case_flop(folder)
    runs, rates = [], []
    for number in range(given.rounds):
        rates.append(gemm_rate(folder, environment))
        of_round = []
        for trainer in trainers:
            peer = summary.project(trainer)
            if peer in unprepared:
                record = unprepared[peer] | {"trainer": trainer, "round": number}
            else:
                record = one_run(trainer, folder, number, interpreters[peer], environment)
            of_round.append(record)
            say(f"{name} round {number + 1} {told(record)}")
        evaluate(folder, of_round, environment)
        runs += of_round
        rates.append(gemm_rate(folder, environment))
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings["model"] = Path(settings["model"]).name
    return {
        "name": name, "rows": case.described(folder), "steps": given.steps, "tokens": tokens, "flop": asdict(total),
        "gemm_flop_per_second": rates, "settings": settings,
        "verdicts": summary.verdicts(runs, tokens, given.steps), "runs": runs,
    }  # fmt: skip


def one_run(trainer: str, folder: Path, number: int, python: Path, environment: dict[str, str]) -> summary.Record:
    """One training in a fresh process; the round's number is its seed."""
    peer, _, variant = trainer.partition(":")
    out = RUNS / f"{folder.name}-{number}-{peer}-{variant}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [str(python), str(HERE / "peers" / f"{peer}.py"), str(folder), str(out), variant, str(number)]
    log = out.with_suffix(".log")
    measured = measure.run(command, environment, log)
    output = log.read_text("utf-8", errors="replace")
    record: summary.Record = {"trainer": trainer, "round": number, "error": "", "wall_seconds": measured.seconds,
                              "peak_tree_bytes": measured.peak_tree_bytes,
                              "peak_process_bytes": measured.peak_process_bytes}  # fmt: skip
    if measured.stopped:
        return record | {"error": measured.stopped}
    if measured.returncode:
        shown = output.strip().splitlines()[-1:] or ["no output"]
        return record | {"error": f"ended with {measured.returncode}: {shown[0][:200]} (.cache/runs/{log.name})"}
    if variant == "prepare":
        return record
    try:
        outcome = protocol.parse(output)
    except (ValueError, TypeError):
        return record | {"error": f"printed no outcome (.cache/runs/{log.name})"}
    speed = summary.tokens_per_second(outcome.tokens, outcome.seconds)
    return record | asdict(outcome) | {"tokens_per_second": speed,
                                       "first_step_seconds": outcome.first_forward - measured.started}  # fmt: skip


def evaluate(folder: Path, records: list[summary.Record], environment: dict[str, str]) -> None:
    """Add the eval losses to the records of a round, then remove what the runs wrote."""
    done = [record for record in records if not record["error"]]
    command = [
        sys.executable,
        str(HERE / "eval_loss.py"),
        str(folder),
        *(f"{summary.base(record['trainer'])}={record['result']}" for record in done),
    ]
    if done:
        losses = json.loads(last_line(command, environment))
        for record in done:
            record |= {
                "eval_loss": losses[record["result"]],
                "base_eval_loss": losses[summary.base(record["trainer"])],
            }
            shutil.rmtree(next(p for p in Path(record.pop("result")).parents if p.parent == RUNS))


def gemm_rate(folder: Path, environment: dict[str, str]) -> float:
    shown = last_line([sys.executable, str(HERE / "ceiling.py"), str(folder)], environment)
    rate: float = json.loads(shown)["gemm_flop_per_second"]
    say(f"GEMM {rate / 1e9:.0f} GFLOP/s")
    return rate


def last_line(command: list[str], environment: dict[str, str]) -> str:
    """What a script of ours prints last; the benchmark ends where one fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:3])} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def quiet_environment(threads: int) -> dict[str, str]:
    """The same for all: so many threads, no GPU, no network, caches of its own."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME") if name in os.environ
    }
    return kept | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(case.CACHE / "hf"), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    return f"{cpu}, {os.cpu_count()} cores, {measure.MEMORY_BYTES / 1e9:.0f} GB"


def told(record: summary.Record) -> str:
    if record["error"]:
        return f"{record['trainer']}: {record['error']}"
    speed, memory = f"{record['tokens_per_second']:.0f} tokens/s", f"{record['peak_tree_bytes'] / 1e9:.2f} GB"
    losses = " ".join(f"{loss:.2f}" for loss in record["losses"])
    return f"{record['trainer']}: {speed}, {memory}, first step after {record['first_step_seconds']:.1f} s, {losses}"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
