"""Predict what a run downloads, writes to the disk, and needs in memory while the base is loaded.

    storage(cfg, base.config, num_trainable, steps, base, machine.target)
        -> Storage(download_bytes=16_070_000_000, adapter_file_bytes=..., loading_device_bytes=..., ...)

Loading, as transformers 5.23 does it: the weight files are mapped, and tensors go to the device one after the other,
in the order of their names. With a quantization each is quantized there before the next one is read, so the peak is
all that is quantized, one weight in 16 bits, and what bitsandbytes allocates for it. Without one, nothing is twice on
the device.

A parameter of experts is put together on the device from the tensors of the single experts, as most checkpoints store
them: meanwhile it is there twice in 16 bits. One expert of it after the other is quantized.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_ft import config, objectives
from lora_ft.adapters import attach, files, targets
from lora_ft.models import build, heads, quantize
from lora_ft.models.described import Described
from lora_ft.models.device import dtype_on
from lora_ft.models.stored import Stored, agreed, of_config
from lora_ft.models.stored_layers import keep_meta
from lora_ft.ops.device import GPU, Target
from lora_ft.training import checkpoint
from lora_ft.training.state import NAME

# Tokenizer and configs, in bytes for each token of the vocabulary, where the files are not known: 57 for GPT-2, 69 for
# SmolLM2, 71 for Llama 3, 105 for Qwen3, 145 for Gemma 3.
_TOKENIZER_BYTES = 100
_MANY_STEPS = 10_000  # of a run whose steps are not known: enough for all checkpoints that it keeps

# Threads of transformers that read an unquantized base, each of which may hold one tensor in another dtype.
_READERS = 4
_TESTED_ROWS = 2048  # of the test of a quantized layer
# Temporary float32 and byte arrays of a weight that is quantized on a CPU, in bytes per value (models/quantize.py).
_QUANTIZING_ON_CPU = 8


@dataclass(frozen=True)
class Storage:
    """Bytes on the disk and in memory around a run, besides the training step.

    download_bytes: of weights and tokenizer, 0 if they are on this machine. assumed: "" if their sizes are listed,
    else a sentence that says what was assumed. converted_bytes: of the folder that a GGUF file is converted to once.
    run_bytes: of the run folder at its largest, with checkpoints and adapter. adapter_file_bytes: of
    adapter_model.safetensors.
    loading_device_bytes: peak of a GPU's memory while loading; 0 on a CPU. loading_host_bytes: peak of the process's
    own main memory then. mapped_bytes: of the mapped weight files, which count as memory of the process as long as the
    system has no other use for it; a CPU that computes in the stored dtype reads the weights from there in every step.
    """

    download_bytes: int
    assumed: str
    converted_bytes: int
    run_bytes: int
    adapter_file_bytes: int
    loading_device_bytes: int
    loading_host_bytes: int
    mapped_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Download, converted weights and run folder."""
        return self.download_bytes + self.converted_bytes + self.run_bytes


def storage(
    cfg: config.TrainRun,
    model_config: Any,
    num_trainable: int,
    steps: int | None,
    base: Described | None = None,
    device: Target = GPU,
) -> Storage:
    """Predict the storage of a run. `base`: what is known of the base's files. `steps`: None if unknown.

    Raises the errors of `attach` for an adapter that does not fit the base.
    """
    cfg = objectives.complete(cfg)
    stored = (base.dtype if base else model_config.dtype) or torch.float32
    loaded = _load(cfg, model_config, device, stored)
    network, weights, files, stored = loaded.network, loaded.weights, loaded.files, loaded.stored
    in_files = (
        base.weight_bytes if base and base.weight_bytes else sum(each.in_files(files, stored) for each in weights)
    )
    on_device, on_host = _loading(weights, device, stored, files)
    is_gguf = base is not None and base.source == "GGUF file"
    others = base.other_bytes if base and base.other_bytes and not is_gguf else None
    tokenizer = _TOKENIZER_BYTES * _vocabulary(network) if others is None else others
    return Storage(
        download_bytes=0 if base and base.here else in_files + tokenizer,
        assumed="" if base and (base.here or (base.weight_bytes and others)) else _assumption(base, stored),
        converted_bytes=in_files if is_gguf else 0,
        run_bytes=checkpoint.bytes_needed(num_trainable, steps or _MANY_STEPS, cfg) + tokenizer,
        adapter_file_bytes=_adapter_file(network, cfg),
        loading_device_bytes=on_device,
        loading_host_bytes=on_host,
        mapped_bytes=in_files,
    )


def loading_bytes(cfg: config.TrainRun, model_config: Any, device: Target = GPU) -> int:
    """Return the peak of a GPU's memory while the base is loaded; 0 on a CPU."""
    if device.kind != "cuda":
        return 0
    loaded = _load(cfg, model_config, device, torch.float32)
    return _loading(loaded.weights, device, loaded.stored, loaded.files)[0]


class _Loaded(NamedTuple):
    """The model without values, its parameters, the codes of its files that train as stored, and the files' dtype."""

    network: Any
    weights: list["_Weight"]
    files: Stored | None
    stored: torch.dtype


def _load(cfg: config.TrainRun, model_config: Any, device: Target, stored: torch.dtype) -> _Loaded:
    model_config = copy.deepcopy(model_config)  # a model sets its dtype
    model_class, dtype = objectives.find(cfg.objective).model_class, dtype_on(cfg.model.dtype, device)
    network = build.on_meta(model_config, dtype, model_class, cfg.model.path)
    files = of_config(model_config)
    quant = agreed(cfg.quant, files)
    if files and not files.trains:  # dequantized weights are new tensors, whatever their dtype
        stored = torch.uint8
        if quant.kind is config.QuantKind.none:
            keep_meta(network, files)
        files = None
    return _Loaded(network, list(_weights(network, quant, files)), files, stored)


@dataclass(frozen=True)
class _Weight:
    """A parameter while loading: its values, their dtype, the bytes that stay, and the bytes needed meanwhile.

    meanwhile: on a GPU. on_cpu: if a CPU quantizes it, without those of a cast. stacked: from tensors of experts, which
    are dropped then, cast or not. sizes: inputs and outputs of a linear layer that is quantized, else None.
    """

    count: int
    dtype: torch.dtype
    kept: int
    meanwhile: int = 0
    on_cpu: int = 0
    stacked: bool = False
    sizes: tuple[int, int] | None = None

    @property
    def is_quantized(self) -> bool:
        """Return True for a parameter that is quantized while it is loaded."""
        return self.on_cpu > 0

    def in_files(self, files: Stored | None, dtype: torch.dtype) -> int:
        """Return the bytes in files that are quantized already, or in files of this dtype."""
        return self.kept if files and self.sizes else self.count * dtype.itemsize


def _weights(network: Any, quant: config.Quant, files: Stored | None = None) -> Iterator[_Weight]:
    """Yield the parameters of a model without values in the order in which transformers loads them, tied ones once."""
    from transformers.core_model_loading import dot_natural_key
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = list(files.skipped or ()) if files else []
    head, modules = heads.head(network), dict(network.named_modules())
    experts = set() if quant.kind is config.QuantKind.none else set(quantize.planned_experts(network, files))
    put_together = _put_together(network) if experts else ()
    for name, parameter in sorted(network.named_parameters(), key=lambda item: dot_natural_key(item[0])):
        module, (count, size) = modules[name.rpartition(".")[0]], (parameter.numel(), parameter.nbytes)
        size += parameter.exponents.nbytes if hasattr(parameter, "exponents") else 0  # of MXFP4
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head and name.endswith(".weight")
        if name in experts:
            twice = any(target in name for target in put_together)
            yield _experts(parameter, module.is_transposed, twice, quant)
            continue
        is_linear = is_linear and should_convert_module(name.rpartition(".")[0], skipped)
        if quant.kind is config.QuantKind.none or not is_linear:
            yield _Weight(count, parameter.dtype, size)
            continue
        transposed = isinstance(module, Conv1D)
        sizes = (parameter.shape[0], parameter.shape[1])
        kept, meanwhile = _quantized(count, sizes[1] if transposed else sizes[0], quant)
        if files:
            yield _Weight(count, parameter.dtype, kept, sizes=sizes)
            continue
        copied = size if transposed and quant.kind is not config.QuantKind.int8 else 0  # int8 is copied on the host
        yield _Weight(count, parameter.dtype, kept, size + copied + meanwhile, _QUANTIZING_ON_CPU * count, sizes=sizes)


def _put_together(network: Any) -> tuple[str, ...]:
    """Return the parts of names by which transformers recognizes parameters that it stacks from those of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    found = [each for each in get_model_conversion_mapping(network) if isinstance(each, WeightConverter)]
    stacked = [each for each in found if any(isinstance(operation, MergeModulelist) for operation in each.operations)]
    return tuple(target for each in stacked for target in each.target_patterns)


def _experts(parameter: Any, transposed: bool, twice: bool, quant: config.Quant) -> _Weight:
    """Return a parameter of experts; twice: it is stacked from tensors that are there as well meanwhile."""
    count, size = parameter.numel(), parameter.nbytes
    one = count // len(parameter)
    kept, scales = _quantized(count, len(parameter) * parameter.shape[2 if transposed else 1], quant)
    codes = one + 2 * one if quant.kind is config.QuantKind.int8 else one // 2 + 4 * one // 64
    scales = 0 if quant.kind is config.QuantKind.int8 else scales
    quantizing, whole = size + max(codes, scales), 2 * size if twice else size
    on_cpu = (size if twice else 0) + max(scales, _QUANTIZING_ON_CPU * one)
    on_cpu = max(whole - kept, on_cpu) if twice else on_cpu
    return _Weight(count, parameter.dtype, kept, max(whole - kept, quantizing), on_cpu, twice)


def _quantized(count: int, rows: int, quant: config.Quant) -> tuple[int, int]:
    """Return the bytes of a quantized weight, and those that bitsandbytes needs meanwhile beside the weight itself."""
    if quant.kind is config.QuantKind.int8:
        return count + 4 * rows, 2 * count  # a scale for each row; a copy in float16
    blocks = math.ceil(count / 64)  # with a scale each, in float32; and a table of 16 levels
    if not quant.double:
        return count // 2 + 4 * blocks + 64, 0
    # The scales in 8 bits, and a table of 256 levels. Meanwhile the scales, and the same less their mean.
    return count // 2 + blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 64, 8 * blocks


def _loading(weights: list[_Weight], device: Target, stored: torch.dtype, files: Stored | None) -> tuple[int, int]:
    """Return the peaks of the device's and of the host's own memory while the weights are loaded."""
    quantized = [each for each in weights if each.sizes or each.is_quantized]
    if device.kind != "cuda" and files:  # the codes stay mapped
        plain = [each for each in weights if not each.sizes]
        return 0, _casting(plain, stored, len(plain)) + sum(_self_test(quantized))
    if device.kind != "cuda":
        return 0, _quantizing_on_cpu(weights, stored) if quantized else _casting(weights, stored, len(weights))
    live = peak = 0
    for each in weights:
        peak = max(peak, live + each.kept + each.meanwhile)
        live += each.kept
    if not quantized:
        # Mapped pages go to the GPU as they are; another dtype needs a copy on the host first.
        return peak, _casting(weights, stored, _READERS)
    test_on_device, test_on_host = _self_test(quantized)
    # Linear layers go to int8 by way of the host.
    to_int8 = max((each.meanwhile for each in quantized if each.sizes and each.kept > each.count), default=0)
    return max(peak, live + test_on_device), max(to_int8, _casting(weights, stored, 1), test_on_host)


def _casting(weights: list[_Weight], stored: torch.dtype, most: int) -> int:
    """Return the bytes of the largest `most` weights in another dtype than the stored one."""
    return sum(sorted(each.count * each.dtype.itemsize for each in weights if each.dtype is not stored)[-most:])


def _self_test(quantized: list[_Weight]) -> tuple[int, int]:
    """Return what testing the smallest quantized layer needs on the device and on the host (models/quantize.py)."""
    smallest = min((each for each in quantized if each.sizes), key=lambda each: each.count)
    rows, size = _TESTED_ROWS * sum(smallest.sizes or ()), smallest.dtype.itemsize
    # Inputs and gradients are drawn in float32 and cast; on the device are both, and the results.
    cast = 0 if smallest.dtype is torch.float32 else size * rows
    return size * (smallest.count + 2 * rows), 4 * (smallest.count + rows) + cast


def _quantizing_on_cpu(weights: list[_Weight], stored: torch.dtype) -> int:
    """Return the peak of the process's own memory while a base is quantized on a CPU.

    Weights that are not quantized stay mapped if they have the stored dtype. At the end they are copied one by one
    (models/storage.py).
    """
    peak = live = 0
    for each in weights:
        cast = each.count * each.dtype.itemsize if each.dtype is not stored and not each.stacked else 0
        if each.is_quantized:
            peak = max(peak, live + each.kept + cast + each.on_cpu)
        live += each.kept if each.is_quantized or cast else 0
    smallest = min((each for each in weights if each.sizes), key=lambda each: each.count)
    on_device, on_host = _self_test([smallest])
    test = max(on_host, 4 * smallest.count + on_device)
    twice = max((each.kept for each in weights if not each.is_quantized and each.dtype is not stored), default=0)
    return max(peak, live + test, sum(each.kept for each in weights) + twice)


def _adapter_file(network: Any, cfg: config.TrainRun) -> int:
    """Return the size of adapter_model.safetensors: PEFT's tensors in float32, and their names."""
    added = len(cfg.model.added_tokens) * network.get_input_embeddings().weight.shape[1]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        codes = of_config(network.config)
        planned = targets.to_be_quantized(network, agreed(cfg.quant, codes), codes)
        model = attach.attach(
            network.requires_grad_(False), cfg.adapter, NAME, cfg.seed, [],
            objectives.find(cfg.objective).task_type, planned,
        )  # fmt: skip
    return files.size_of(model, NAME) + 4 * added


def _vocabulary(network: Any) -> int:
    return int(network.get_input_embeddings().weight.shape[0])


def _assumption(base: Described | None, stored: torch.dtype) -> str:
    parts = [f"tokenizer of {_TOKENIZER_BYTES} bytes a token"]
    if base is None or base.weight_bytes is None:
        parts.append(f"weights stored in {str(stored).removeprefix('torch.')}, tied ones once")
    return ", ".join(reversed(parts))
