"""Runs whose peak memory is predicted and measured on a CPU: small models of real proportions, and SmolLM2-135M.

case = Case("llama", (512,), quant="nf4", rank=16, recompute="every_2")
predicted(case).peak_bytes          from the config alone, by a traced step
measured(case, tmp_path)            of the second step of a real run, by torch's profiler
"""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from states import IDENTITY, OFF, Report
from tiny import tiny_tokenizer
from torch._C._profiler import _EventType
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lora_ft import config
from lora_ft.data.dataset import Dataset, EvalPrompts
from lora_ft.data.examples import Examples
from lora_ft.data.rows import Example
from lora_ft.memory.trace import StepTrace, trace_step
from lora_ft.models.acceleration import accelerate
from lora_ft.models.load import Base, load_base
from lora_ft.ops.device import CPU
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.training.callbacks import Callback
from lora_ft.training.state import attached
from lora_ft.training.trainer import fit

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from shapes import config_of

_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 192, "n_layer": 3, "n_head": 3, "vocab_size": 4096, "n_positions": 2048,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 4096,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6144, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, "sliding_window": 256,
        "query_pre_attn_scalar": 64, "max_position_embeddings": 4096,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 768, "num_hidden_layers": 3,
        "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192, "sliding_window": 256,
        "query_pre_attn_scalar": 64, "max_position_embeddings": 4096,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3,
        "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "num_experts": 16,
        "num_experts_per_tok": 4, "max_position_embeddings": 4096,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 4096,
    },
    "wide llama": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 4096,
    },
    "wide gpt2": {
        "model_type": "gpt2", "n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 16384, "n_positions": 2048,
    },
}  # fmt: skip


class Case(NamedTuple):
    """A run. lengths: tokens of the documents of each step. recompute: train.gradient_checkpointing."""

    shape: str
    lengths: tuple[int, ...]
    quant: str = "none"
    rank: int = 16
    recompute: str = "off"
    fast: bool = True
    optimizer: str = "adamw"
    checkpoint: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.shape:12} {'+'.join(map(str, self.lengths)):>11} {self.quant:5} r={self.rank:<3} "
            f"{self.recompute:8} {'fast' if self.fast else 'plain':5} {self.optimizer:10} {self.checkpoint}"
        )

    @property
    def settings(self) -> config.TrainRun:
        """The settings of the run, of two steps with all documents."""
        return config.TrainRun(
            quant=config.Quant(kind=config.QuantKind(self.quant)),
            adapter=config.Adapter(r=self.rank),
            train=config.Train(
                gradient_checkpointing=self.recompute, max_steps=2, tokens_per_step=sum(self.lengths), samples=0
            ),
            optim=config.Optim(name=config.Optimizer(self.optimizer)),
            fast=config.Fast() if self.fast else OFF,
        )

    @property
    def config(self) -> PretrainedConfig:
        """The config of the model, as its checkpoint has it."""
        if self.shape in _SHAPES:
            settings = _SHAPES[self.shape] | _IDS
            made = AutoConfig.for_model(settings.pop("model_type"), **settings)
        else:
            made = config_of(self.shape)
        made.dtype = getattr(torch, self.checkpoint)
        return made


def predicted(case: Case) -> StepTrace:
    """Trace a step of a case on a CPU, from its config alone."""
    return trace_step(case.settings, case.config, case.lengths, CPU)


def measured(case: Case, folder: Path) -> int:
    """Train two steps of a case and return the most bytes of tensors that were live in the second one."""
    cfg, base = case.settings, _base(case, folder)
    switch_off_dropout(base.model)
    made = accelerate(base.model, cfg.fast)
    dataset = Dataset(
        Examples.of(_rows(case.lengths)),
        Examples.of([]),
        EvalPrompts(Examples.of([]), []),
        answers=None,
        report=Report(),
    )
    observer = _SecondStep()
    with attached(cfg, folder, base, dataset, made.paths, "f") as state:
        fit(state, [observer])
    return observer.peak


def _base(case: Case, folder: Path) -> Base:
    if case.quant != "none" or case.checkpoint != "float32":  # through its files, as in a run
        model_folder = model_files(case, folder)
        return load_base(config.Model(path=str(model_folder)), case.settings.quant, "cpu", tiny_tokenizer())
    model = AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    return Base(model.requires_grad_(False).eval(), tiny_tokenizer(), IDENTITY, ())


def model_files(case: Case, folder: Path) -> Path:
    """Save the model of a case and a tokenizer for it, as transformers saves them."""
    saved = folder / "model"
    AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.checkpoint)).save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    return saved


def _rows(lengths: tuple[int, ...]) -> list[Example]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, 500, length).astype(np.int32) for length in lengths]
    return [Example(each, np.arange(len(each)) > 0, f"rows:{i}") for i, each in enumerate(ids)]


class _SecondStep(Callback):
    """Measures the bytes of all tensors between two steps, and what the second step adds to them."""

    peak = 0

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:
            self.resident = sum({s.data_ptr(): s.nbytes() for s in _storages()}.values())
            self.profile = torch.autograd.profiler.profile(profile_memory=True)
            self.profile.__enter__()
        else:
            self.profile.__exit__(None, None, None)
            self.peak = self.resident + _most_allocated(self.profile)


def _storages() -> Iterator[torch.UntypedStorage]:
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.is_cpu:
            yield each.untyped_storage()


def _most_allocated(profile: Any) -> int:
    """Return the most bytes that torch's allocator for CPUs had handed out during a profile, above those at its begin.

    The allocator's total also has what earlier profiles of the process left.
    """
    events = sorted(_allocations(profile))
    _, size, total = events[0]
    return max(total for _, _, total in events) - (total - size)


def _allocations(profile: Any) -> Iterator[tuple[int, int, int]]:
    """Yield time, bytes (negative if freed) and the total afterwards of each event."""
    waiting = list(profile.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        tag, fields = event.typed
        if tag == _EventType.Allocation:
            yield event.start_time_ns, fields.alloc_size, fields.total_allocated
