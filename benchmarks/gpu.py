"""LoRA and QLoRA on a GPU: lora_ft beside plain PEFT, TRL and Unsloth, on random weights of real shapes.

    python benchmarks/gpu.py                                   # three shapes, four trainers, 4,096 tokens a step
    python benchmarks/gpu.py --shapes llama3_1_8b --methods qlora --rows mixed
    python benchmarks/gpu.py --tiny                            # what runs where no GPU is: a tiny shape on the CPU

Nothing is downloaded: weights and token ids are drawn, and a speed does not depend on their values. Each
trainer runs in a process of its own. One that is not installed, or runs out of memory, is skipped with the
reason; one that fails makes the exit code 1.

Before ours is timed, loss and gradient of its fast paths are compared with those of its plain paths, which are
transformers' and PEFT's own forward. Counted are real tokens, padding is not. `share` is the model's floating
point operations (no recomputation counted) at that speed, over what one large matrix product reaches here.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_ft import config, durable
from lora_ft.adapters import attach, fast
from lora_ft.models.blocks import use_fast_blocks
from lora_ft.models.quantize import import_bitsandbytes, settle
from lora_ft.ops.recompute import recompute_layers, settle_checkpoint
from lora_ft.ops.token_loss import Batch, choose_paths, token_loss_sum
from lora_ft.training import optimizers
from lora_ft.training.metrics import peak_memory_bytes

RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, RATE = 16, 32.0, 2e-4
WARM_UP = 2  # steps in which kernels are chosen, compiled and loaded; not counted
PACKAGES = {"peft": "peft", "trl": "trl", "unsloth": "unsloth"}
TRAINERS = ("lora_ft", *PACKAGES)
METHODS = ("qlora", "lora")

# Sizes as published in the models' config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True),
    "smollm2_135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama3_2_1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "llama3_1_8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a trainer on a shape; `rows` is equal (512 tokens each) or mixed (lognormal, mean about 180)."""

    shape: str
    method: str
    trainer: str
    rows: str
    tokens: int
    steps: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


# A trainer, ready: takes so many optimizer steps over all rows; returns the mean loss and the seconds of each.
Run = Callable[[int], tuple[list[float], list[float]]]


def stepwise(step: Callable[[], float], device: torch.device) -> Run:
    """A trainer from a function that takes one step and returns its loss."""

    def run(steps: int) -> tuple[list[float], list[float]]:
        losses: list[float] = []
        return losses, [_timed(lambda: losses.append(step()), device) for _ in range(steps)]

    return run


def lengths_of(case: Case) -> list[int]:
    """Lengths of the documents of a step; they add up to `case.tokens`."""
    drawn, lengths = random.Random(0), []
    while (left := case.tokens - sum(lengths)) > 0:
        length = 512 if case.rows == "equal" else max(20, int(drawn.lognormvariate(math.log(160), 0.48)))
        lengths.append(min(length, left))
    return lengths


def draw(case: Case) -> tuple[Batch, list[torch.Tensor]]:
    """The step's documents packed, all tokens but the first of each supervised, and one by one."""
    generator, lengths = torch.Generator().manual_seed(0), lengths_of(case)
    ids = torch.randint(4, SHAPES[case.shape]["vocab_size"], (case.tokens,), generator=generator)
    starts = [0, *accumulate(lengths)]
    targets = ids.roll(-1)
    targets[[end - 1 for end in starts[1:]]] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = Batch(*(tensor.to(case.device) for tensor in (ids, positions, targets)), starts)
    return packed, [ids[a:b] for a, b in pairwise(starts)]


def build(case: Case, quantized: bool) -> Any:
    """A frozen Llama of this shape, filled layer by layer on the device: NF4 never holds all weights in 16 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = LlamaConfig(max_position_embeddings=8192, rope_theta=500_000.0, **SHAPES[case.shape])
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes).to(case.dtype)
    with case.device:  # its frequencies are computed, not loaded
        model.model.rotary_emb = LlamaRotaryEmbedding(sizes)
    for name, module in list(model.named_modules()):
        if quantized and type(module) is torch.nn.Linear and module is not model.lm_head:
            model.set_submodule(name, _nf4(module, case))
        elif "weight" in module._parameters and not (module is model.lm_head and sizes.tie_word_embeddings):
            weight = torch.empty(module.weight.shape, dtype=case.dtype, device=case.device)
            filled = weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
            module.weight = torch.nn.Parameter(filled, requires_grad=False)
    model.tie_weights()
    if quantized:
        model.is_loaded_in_4bit = True
        settle(model, tuple(n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"))
    return model.requires_grad_(False).eval()


def _nf4(linear: torch.nn.Linear, case: Case) -> torch.nn.Module:
    nn = import_bitsandbytes().nn
    layer = nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=case.dtype,
                          compress_statistics=True, quant_type="nf4", device="meta")  # fmt: skip
    weight = torch.empty(linear.weight.shape, dtype=case.dtype, device=case.device).normal_(0, 0.02)
    # Moving it to its device is what quantizes it.
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        case.device
    )
    return layer


def lora_ft_run(case: Case, facts: dict[str, Any]) -> Run:
    """Ours, as `lora-ft train` puts it together; `facts` receives what was checked and chosen."""
    model, name = build(case, case.method == "qlora"), "adapter0"
    batch, _ = draw(case)
    peft_model = attach.attach(model, config.Adapter(r=RANK, alpha=ALPHA), name, 0, [])
    parameters = attach.trainable(peft_model, name)
    for parameter_name, parameter in parameters.items():
        if attach.is_lora_b(parameter_name):  # zero at the start, where no gradient reaches lora_A
            parameter.data.normal_(0, 0.01)
    flat = optimizers.flatten(parameters)
    optimizer = optimizers.build(flat, config.Optim(lr=RATE))
    peft_model.train()

    def gradient(over: Batch) -> float:
        flat.gradients.zero_()
        loss = token_loss_sum(model, over, paths)
        loss.backward()
        supervised = int((over.targets != -100).sum())
        flat.gradients.div_(supervised)
        return float(loss.detach()) / supervised

    # Two documents of the step, all layers recomputed: the plain paths need more memory than what is measured.
    end = batch.starts[min(2, len(batch.starts) - 1)]
    few = Batch(batch.ids[:end], batch.positions[:end], batch.targets[:end], [s for s in batch.starts if s <= end])
    recompute_layers(model, "every_1")
    switches = {field.name: False for field in dataclasses.fields(config.Fast)}
    paths = choose_paths(model, config.Fast(**switches))
    plain = gradient(few), flat.gradients.clone()
    paths = choose_paths(model, config.Fast())
    facts["paths"] = [*paths.reasons, *use_fast_blocks(model, norm=True, mlp=True, rope=True)]
    facts["paths"] += fast.use_fast_forwards(peft_model, name)
    facts["check"] = compared(plain, (gradient(few), flat.gradients), case.dtype)
    setting, reason = settle_checkpoint(model, paths, case.tokens)
    facts["paths"].append(reason)
    recompute_layers(model, setting)

    def step() -> float:
        loss = gradient(batch)
        optimizers.clip(flat.gradients, 1.0)
        optimizer.step()
        return loss

    return stepwise(step, case.device)


def compared(
    plain: tuple[float, torch.Tensor], found: tuple[float, torch.Tensor], dtype: torch.dtype
) -> dict[str, float | bool]:
    """How far loss and gradient lie from the plain ones, and whether that is rounding of `dtype`."""
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    loss = abs(found[0] - plain[0]) / abs(plain[0])
    norm = float(found[1].norm() / plain[1].norm())
    cosine = float(torch.nn.functional.cosine_similarity(found[1].double(), plain[1].double(), dim=0))
    # A NaN compares false, and so fails.
    passed = loss < tolerance and abs(norm - 1) < tolerance and 1 - cosine < tolerance and float(plain[1].norm()) > 0
    return {"loss_difference": loss, "gradient_norm_ratio": norm, "gradient_cosine": cosine, "passed": passed}


def peft_run(case: Case, facts: dict[str, Any]) -> Run:
    """A plain loop over padded rows, as PEFT's documentation shows it, with checkpointing."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = build(case, case.method == "qlora")
    if case.method == "qlora":
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return padded_loop(get_peft_model(model, _peft_config()).train(), case)


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def padded_loop(model: Any, case: Case) -> Run:
    """One step over the rows padded to the longest, with labels and a mask."""
    _, documents = draw(case)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(d) for d in documents], batch_first=True).to(case.device)
    ids = pad(documents, batch_first=True).to(case.device)
    labels = ids.masked_fill(mask == 0, -100)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast(case.device.type, dtype=torch.bfloat16, enabled=case.dtype is torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return stepwise(step, case.device)


def trl_run(case: Case, facts: dict[str, Any]) -> Run:
    """TRL's SFTTrainer with its defaults; its own loop, timed from the beginning of a step to its end."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began.append(_now(case.device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended.append(_now(case.device))

    _, documents = draw(case)
    model = build(case, case.method == "qlora")

    def run(steps: int) -> tuple[list[float], list[float]]:
        clock = Clock()
        settings = SFTConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(documents), max_steps=steps, max_length=None,
            learning_rate=RATE, bf16=case.dtype is torch.bfloat16, use_cpu=case.device.type == "cpu", logging_steps=1,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, processing_class=_tokenizer(SHAPES[case.shape]["vocab_size"]),
            train_dataset=Dataset.from_list([{"input_ids": document.tolist()} for document in documents * steps]),
            peft_config=_peft_config(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, [end - start for start, end in zip(clock.began, clock.ended, strict=True)]

    return run


def unsloth_run(case: Case, facts: dict[str, Any]) -> Run:
    """Unsloth's patched model with its own checkpointing, in the plain loop; it loads from a folder only."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        source = build(case, quantized=False)
        source.save_pretrained(folder)
        _tokenizer(SHAPES[case.shape]["vocab_size"]).save_pretrained(folder)
        del source
        _reset_memory(case.device)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=max(lengths_of(case)), dtype=case.dtype, load_in_4bit=case.method == "qlora"
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=names, use_gradient_checkpointing="unsloth"
    )
    return padded_loop(model.train(), case)


def _tokenizer(vocabulary: int) -> Any:
    """A tokenizer in name only: rows come as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>", pad_token="<3>")


RUNS: dict[str, Callable[[Case, dict[str, Any]], Run]] = {
    "lora_ft": lora_ft_run, "peft": peft_run, "trl": trl_run, "unsloth": unsloth_run,
}  # fmt: skip


def flops_per_token(case: Case) -> float:
    """Operations of one step a token: products with frozen weights forward and for dx, LoRA, causal attention."""
    s = SHAPES[case.shape]
    h, f, layers, heads = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"], s["num_attention_heads"]
    kv = h // heads * s["num_key_value_heads"]
    linears = [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]
    frozen = layers * sum(i * o for i, o in linears) + h * s["vocab_size"]
    adapter = layers * RANK * sum(i + o for i, o in linears)
    lengths = lengths_of(case)
    mean_length = sum(n * n for n in lengths) / sum(lengths)  # of the document that a token lies in
    # Nothing below the first projections trains, so they need no gradient of their input.
    unneeded = sum(2 * i * o + 2 * RANK * i for i, o in linears[:3])
    # Scores and values forward are 2 products, and 5 backward; half of each square is masked.
    attention = layers * (2 + 5) * 2 * h * mean_length / 2
    return 4 * frozen + 6 * adapter - unneeded + attention


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_timed(lambda: a @ b, device) for _ in range(10))


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    started = _now(device)
    function()
    return _now(device) - started


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process: what was checked and chosen, and its figures; or why it was skipped."""
    facts: dict[str, Any] = {}
    ceiling = matmul_ceiling(case.device, case.dtype)
    _reset_memory(case.device)
    try:
        run = RUNS[case.trainer](case, facts)
        if facts.get("check", {}).get("passed", True) is False:
            return facts | {"failed": "loss or gradient differs from the plain paths: not timed"}
        _reset_memory(case.device)  # the check is no part of what is measured
        losses, seconds = run(WARM_UP + case.steps)
    except torch.OutOfMemoryError:
        return facts | {"skipped": "out of memory"}
    if not all(map(math.isfinite, losses)):
        return facts | {"failed": f"losses {losses}"}
    speed = case.tokens / statistics.median(seconds[WARM_UP:])
    reserved = torch.cuda.max_memory_reserved(case.device) if case.device.type == "cuda" else None
    return facts | {
        "tokens_per_second": speed,
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": peak_memory_bytes(case.device),
        "reserved_bytes": reserved,
        "matmul_flops_per_second": ceiling,
        "share": speed * flops_per_token(case) / ceiling,
    }


def in_own_process(case: Case) -> dict[str, Any]:
    """Measure a case in a fresh interpreter; a crash of it is a reason like any other."""
    if case.trainer in PACKAGES and importlib.util.find_spec(PACKAGES[case.trainer]) is None:
        return {"skipped": f"{PACKAGES[case.trainer]} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case)), "--out", str(result)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode or not result.exists():
            return {"failed": (done.stdout.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
        return json.loads(result.read_text("utf-8"))


def environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "bitsandbytes", "flash-attn", "liger-kernel", *PACKAGES.values())
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "cuda": torch.version.cuda, "versions": versions}


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="median of steps; share: of the matmul ceiling; cosine: of our gradient to the plain one's")
    for column in ("shape", "method", "trainer", "tokens/s", "peak GiB", "reserved", "share", "cosine"):
        shown.add_column(column, justify="left" if column in ("shape", "method", "trainer") else "right")
    for result in results:
        case = result["case"]
        names = (case["shape"], case["method"], case["trainer"])
        if "tokens_per_second" not in result:
            shown.add_row(*names, "-")
            continue
        reserved, check = result["reserved_bytes"], result.get("check")
        shown.add_row(
            *names,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
            "-" if reserved is None else f"{reserved / 2**30:.2f}",
            f"{result['share']:.0%}",
            f"{check['gradient_cosine']:.6f}" if check else "-",
        )
    return shown


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    tiny = not torch.cuda.is_available()
    parser.add_argument("--tiny", action="store_true", default=tiny, help="a tiny shape; the default without a GPU")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all but tiny, or tiny")
    parser.add_argument("--methods", default=",".join(METHODS), help="qlora (NF4, double quantization), lora")
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--rows", choices=("equal", "mixed"), default="equal", help="equal: 512 tokens, no padding")
    parser.add_argument("--tokens", type=int, help="tokens of a step; default 4096, tiny 256")
    parser.add_argument("--steps", type=int, help="timed steps, after two that are not; default 8, tiny 2")
    parser.add_argument("--out", type=Path, help="file of results; default benchmarks/results/gpu-DATE.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case as JSON, in its own process
    given = parser.parse_args(words)
    given.shapes = (given.shapes or ("tiny" if given.tiny else ",".join(n for n in SHAPES if n != "tiny"))).split(",")
    given.methods, given.trainers = given.methods.split(","), given.trainers.split(",")
    given.tokens = given.tokens or (256 if given.tiny else 4096)
    given.steps = given.steps or (2 if given.tiny else 8)
    for name, known in (("shapes", SHAPES), ("methods", METHODS), ("trainers", TRAINERS)):
        if unknown := set(getattr(given, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return given


def main(words: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a trainer failed, else 0."""
    given = arguments(words)
    if given.case:
        durable.write_json(given.out, measure(Case(**json.loads(given.case))))
        return 0
    console, results = Console(), []
    for shape in given.shapes:
        for method in given.methods:
            for trainer in given.trainers:
                case = Case(shape, method, trainer, given.rows, given.tokens, given.steps)
                console.print(f"{shape} {method} {trainer} ...", highlight=False)
                results.append({"case": dataclasses.asdict(case)} | in_own_process(case))
    now = datetime.datetime.now(datetime.UTC)
    report = {"date": now.isoformat(timespec="seconds"), "environment": environment(case.device), "results": results}
    out = given.out or RESULTS / f"gpu-{now:%Y-%m-%d-%H%M%S}.json"
    durable.make_folder(out.parent)
    durable.write_json(out, report)
    console.print(table(results))
    for result in results:
        for outcome in ("skipped", "failed"):
            if outcome in result:
                names = " ".join(result["case"][key] for key in ("shape", "method", "trainer"))
                console.print(f"{names} {outcome}: {result[outcome]}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {out}", highlight=False, soft_wrap=True)
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
