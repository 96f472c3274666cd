"""The trainers that gpu.py measures, each in a process of its own, and the check that ours computes the right thing.

    python benchmarks/gpu_trainers.py unsloth '{"shape": "tiny", ...}' result.json     # what gpu.py starts

All train LoRA on all linear layers of the same random model (Unsloth: on one of the same sizes) over the same
documents, every step. `share` of a result is the operations that the maths needs (ceiling.py) at the measured
speed, over what one large matrix product reaches here.
"""

import sys

if __name__ == "__main__" and sys.argv[1] == "unsloth":
    import unsloth  # noqa: F401  it patches transformers, peft and trl as they are imported: before all of them

import contextlib
import dataclasses
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from ceiling import flop
from gpu import SHAPES, Case, lengths_of

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.io import durable
from lora_ft.models.acceleration import accelerate, accelerated, accelerated_lora
from lora_ft.models.quantize import import_bitsandbytes, settle
from lora_ft.ops.batch import Batch
from lora_ft.ops.gradient_checkpointing import recompute_layers, settle_checkpoint
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.training import optimizers
from lora_ft.training.metrics import peak_memory_bytes

RANK, ALPHA, RATE = 16, 32.0, 2e-4
WARM_UP = 2  # steps in which kernels are chosen, compiled and loaded; not counted
# What of a gradient may be off whatever the plain paths' own error: sums in another order.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}

# A mean loss, and the gradient of each parameter by its name.
Gradient = tuple[float, dict[str, torch.Tensor]]
# A trainer, ready: takes so many optimizer steps over all rows; returns the mean loss and the seconds of each.
Run = Callable[[int], tuple[list[float], list[float]]]


def stepwise(step: Callable[[], float], device: torch.device) -> Run:
    """A trainer from a function that takes one step and returns its loss."""

    def run(steps: int) -> tuple[list[float], list[float]]:
        losses: list[float] = []
        return losses, [_timed(lambda: losses.append(step()), device) for _ in range(steps)]

    return run


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
    peft_model = attach.attach(model, config.Adapter(r=RANK, lora_alpha=ALPHA), name, 0, [])
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

    # Two documents of the step, all layers recomputed: the plain paths need more memory than what is measured, and the
    # reference holds what is not quantized in float32, 32 GB of the largest shape by lora.
    end = batch.starts[min(2, len(batch.starts) - 1)]
    few = Batch(batch.ids[:end], batch.positions[:end], batch.targets[:end], [s for s in batch.starts if s <= end])

    def of_few() -> Gradient:
        return gradient(few), {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}

    recompute_layers(model, "every_1")
    with accelerated(
        model, config.Fast(**dict.fromkeys((f.name for f in dataclasses.fields(config.Fast)), False))
    ) as off:
        paths = off.paths
        plain = of_few()
        compute_in(model, torch.float32)
        reference = of_few()
        compute_in(model, case.dtype)
    # Without storage, which has to come before adapters do, and plain paths come first here; drawn weights offer it
    # nothing: they are bfloat16 already, or float32 of all bits.
    made, adapter = accelerate(model, config.Fast(storage=False)), contextlib.ExitStack()
    paths = made.paths
    facts["paths"] = [*made.reasons, *adapter.enter_context(accelerated_lora(peft_model, name, config.Fast()))]
    facts["check"] = compared(of_few(), plain, reference, FLOOR[case.dtype])
    del plain, reference
    setting = case.checkpoint
    if setting == "auto":
        setting, reason = settle_checkpoint(model, paths, case.tokens)
        facts["paths"].append(reason)
    recompute_layers(model, setting)

    def step(_: object = adapter) -> float:  # accelerated for as long as steps follow
        loss = gradient(batch)
        optimizers.clip(flat.gradients, 1.0)
        optimizer.step()
        return loss

    return stepwise(step, case.device)


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let the frozen base compute in another dtype, one weight after the other; wider and back keeps every bit."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype


def compared(found: Gradient, plain: Gradient, reference: Gradient, floor: float) -> dict[str, Any]:
    """Whether a loss and each parameter's gradient are as near to float32's as those of the plain paths.

    Their distance from the reference may be twice that of the plain paths, which is what the dtype costs, and
    `floor` of the reference's norm. `largest_error` is in units of that bound, and `at` is where it is.
    """
    tensors = [{"loss": torch.tensor(loss, dtype=torch.float64), **of} for loss, of in (found, plain, reference)]
    errors = {}
    for name, exact in tensors[2].items():
        error, plain_error = (float((tensor[name] - exact).norm()) for tensor in tensors[:2])
        bound = 2 * plain_error + floor * float(exact.norm())
        # Where nothing reaches a parameter, agreement says nothing; and a NaN is in no order with a number.
        errors[name] = error / bound if bound > 0 and math.isfinite(error) else math.inf
    at = max(errors, key=errors.__getitem__)
    return {"passed": errors[at] < 1, "largest_error": min(errors[at], sys.float_info.max), "at": at}


def peft_run(case: Case, facts: dict[str, Any]) -> Run:
    """A plain loop over padded rows, as PEFT's documentation shows it."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = build(case, case.method == "qlora")
    recompute = case.checkpoint == "every_1"
    if case.method == "qlora":
        model = prepare_model_for_kbit_training(model, recompute, {"use_reentrant": False})
    elif recompute:
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
    """TRL's SFTTrainer with its defaults, but the rows in order; its own loop, each step timed from begin to end."""
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
            gradient_checkpointing=case.checkpoint == "every_1",
            train_sampling_strategy="sequential",  # so that each step has the drawn rows, whose tokens are counted
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
    """Unsloth's patched model in the plain loop; it loads from a folder only."""
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
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=names,
        use_gradient_checkpointing="unsloth" if case.checkpoint == "every_1" else False,
    )  # fmt: skip
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
    except torch.OutOfMemoryError as error:
        return facts | {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
    if not all(map(math.isfinite, losses)):
        return facts | {"failed": f"losses {losses}"}
    speed = case.tokens / statistics.median(seconds[WARM_UP:])
    lengths = lengths_of(case)
    operations = flop(SHAPES[case.shape], lengths, case.tokens - len(lengths), RANK).total
    reserved = torch.cuda.max_memory_reserved(case.device) if case.device.type == "cuda" else None
    return facts | {
        "tokens_per_second": speed,
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": peak_memory_bytes(case.device),
        "reserved_bytes": reserved,
        "matmul_flops_per_second": ceiling,
        "share": speed * operations / case.tokens / ceiling,
    }


def main() -> None:
    _, case, out = sys.argv[1:]
    durable.write_json(Path(out), measure(Case(**json.loads(case))))


if __name__ == "__main__":
    main()
