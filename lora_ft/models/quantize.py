"""Quantize the frozen linear layers and experts through bitsandbytes, and verify the result.

    quant=nf4     every linear layer except the head -> Linear4bit: 4-bit codes, one scale per 64 weights
    quant=int8    ... -> Linear8bitLt: 8-bit codes, one scale per row; multiplies by codes * scale / 127
    parameters of experts (models/quantize_experts.py) -> the same codes, dequantized when they are read
    embeddings, norms, routers, lm_head              -> not quantized

bitsandbytes' own int8 forward rounds activations to 8 bits, finds outliers over all rows of a pack, so that one
document changes the result of another, and waits for the GPU. It also computes other numbers in training on a CPU
than in evaluation. Here every int8 product is that of the dequantized weight (`exact_int8`).

On a CPU, this module turns off two things that bitsandbytes 0.50 does. It repacks weights in place at the first
inference, which changes their bytes and computes float32 inputs in bfloat16. And it searches 4-bit levels so slowly
that loading 135M parameters takes a second longer. Its import would also load torch's compiler (2.7 s), which is not
used here. On GPUs its own kernels run. (io/process.py keeps it from downloading compiled kernels from the hub.)
"""

import contextlib
import copy
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import process
from lora_ft.models import heads, quantize_experts
from lora_ft.models.stored import Stored
from lora_ft.ops.weights import frozen_linear, frozen_weight

_CHUNK = 1 << 16  # float32 values: 256 KB, small enough for a core's own cache

# On CUDA, bitsandbytes 0.50 computes 4-bit products of one to four rows and of up to 1,536 rows by kernels of their
# own, and of more rows by dequantizing the weight, as training mostly does.
_TESTED_ROWS = (1, 8, 2048)


def bitsandbytes_config(quant: config.Quant, compute: torch.dtype, files: Stored | None = None) -> Any:
    """Return transformers' config object for `quant`, or None for quant.kind=none.

    The list of layers to skip is not set, because that would replace transformers' own list, and lm_head would be
    quantized (transformers issue 45674). `check_plan` verifies the result. Files that are quantized already name the
    layers that they skip.
    """
    if quant.kind is config.QuantKind.none:
        return None
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = None if files is None or files.skipped is None else list(files.skipped)
    if quant.kind is config.QuantKind.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind.value,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=files.storage if files else None,
        llm_int8_skip_modules=skipped,
    )


def import_bitsandbytes() -> Any:
    """Import bitsandbytes with our CPU kernel, without torch's compiler and without kernels from the hub."""
    process.prepare()
    if "bitsandbytes" not in sys.modules:
        with _without_compiler():
            importlib.import_module("bitsandbytes")
    _register_cpu_kernel()
    return sys.modules["bitsandbytes"]


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep bitsandbytes from compiling its CPU optimizer when it is imported; it then uses the plain Python version.

    Loading torch's compiler takes 2.7 s of every start, and nothing here uses the CPU optimizer.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torch.compile is disabled while bitsandbytes is imported")

    compiler, torch.compile = torch.compile, refuse
    try:
        yield
    finally:
        torch.compile = compiler


@functools.cache
def _register_cpu_kernel() -> None:
    # Keep the kernel of a later bitsandbytes that has one.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU"):
        torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu", quantize_4bit)


def quantize_4bit(
    weight: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute bitsandbytes' quantize_4bit on a CPU bit for bit, three times faster: codes (n/2, 1), absmax (float32).

    Counting the levels below a value takes 15 comparisons over a chunk that stays in the cache; torch.bucketize, which
    bitsandbytes uses, searches the levels for each value separately.
    """
    from bitsandbytes.backends.utils import _get_4bit_code

    code = _get_4bit_code(quant_type, weight.device)
    order = torch.argsort(code)
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    flat = weight.reshape(-1).float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = rows.abs().amax(dim=-1)
    scaled = rows * (1.0 / absmax.clamp(min=1e-38))[:, None]
    if flat.numel() % blocksize:  # bitsandbytes divides by absmax in a last, shorter block
        absmax[-1:].clamp_(min=1e-38)
        scaled[-1] = rows[-1] / absmax[-1]
    levels = _levels_below(scaled.view(-1)[: flat.numel() + flat.numel() % 2].numpy(), midpoints.numpy())
    # bytes.translate is the fastest table lookup: numpy and torch first make indices of eight bytes each.
    table = bytes(order.tolist()).ljust(256)
    codes = torch.frombuffer(bytearray(levels.tobytes().translate(table)), dtype=torch.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    return packed.view(quant_storage).unsqueeze(1), absmax


def _levels_below(values: np.ndarray[Any, Any], midpoints: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    counts = np.zeros(values.shape, np.uint8)
    for start in range(0, len(values), _CHUNK):
        chunk, count = values[start : start + _CHUNK], counts[start : start + _CHUNK]
        for midpoint in midpoints:
            count += (chunk > midpoint).view(np.uint8)
    return counts


def adopt(model: Any, files: Stored, dtype: torch.dtype) -> None:
    """Give the layers of a model that was loaded from quantized files the form of layers that are quantized here.

    The codes and scales stay as they are. Storage of another dtype is viewed as bytes, and the weights are dequantized
    to `dtype`, to which the other weights are cast. Raises ConfigError for a layer whose weights in the files are not
    quantized as config.json says.
    """
    import bitsandbytes

    _cast(model, dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            _refuse_unless(layer.weight.dtype is torch.int8 and layer.weight.SCB is not None, name, files)
        elif isinstance(layer, bitsandbytes.nn.Linear4bit):
            state: Any = getattr(layer.weight, "quant_state", None)
            _refuse_unless(state is not None, name, files)
            _refuse_unless((state.quant_type, state.nested) == (files.kind.value, files.double), name, files)
            layer.weight.data = layer.weight.data.view(torch.uint8).view(-1, 1)
            layer.weight.quant_storage = layer.quant_storage = torch.uint8
            state.dtype = dtype


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantized as transformers does for other files; here it keeps the stored dtype."""
    with torch.device("meta"):
        built = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in built.named_parameters()}
    plan = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and type(parameter) is torch.nn.Parameter:
            kept = next((plan[key] for key in plan if re.search(key.replace("*", ".*"), name)), dtypes[name])
            parameter.data = parameter.data.to(kept)


def _refuse_unless(is_right: bool, name: str, files: Stored) -> None:
    if not is_right:
        double = " with quantized scales" if files.double else ""
        raise ConfigError(
            f"the weights of {name} are not stored in {files.kind.value}{double}, as config.json says: weights and "
            "config.json do not belong together"
        )


def check_plan(model: Any, files: Stored | None = None) -> tuple[str, ...]:
    """Return the names of the quantized layers and of the quantized parameters of experts, in order.

    Raises ConfigError unless they are the planned ones: transformers may quantize lm_head as well or
    leave out layers (transformers issue 45674).
    """
    import bitsandbytes

    classes = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    planned, modules = planned_layers(model, files), dict(model.named_modules())
    quantized = {
        n for n, m in modules.items() if isinstance(m, classes) and m.weight.dtype in (torch.uint8, torch.int8)
    }
    planned += planned_experts(model, files)
    quantized |= set(quantize_experts.quantized_parameters(model))
    if quantized != set(planned):
        remedy = "set model.path to the model in 16 bits" if files and files.trains else "set quant=none for this model"
        raise ConfigError(
            f"the quantized layers are not the planned ones: missing {sorted(set(planned) - quantized) or 'none'}, "
            f"unexpected {sorted(quantized - set(planned)) or 'none'}: {remedy}"
        )
    return tuple(planned)


def planned_experts(model: Any, files: Stored | None = None) -> list[str]:
    """Return the names of the parameters of experts that quantization must change, in order.

    Files that train as they are stored hold them in 16 bits, as transformers writes them.
    """
    return [] if files and files.trains else quantize_experts.planned_parameters(model)


def planned_layers(model: Any, files: Stored | None = None) -> list[str]:
    """Return the names of the layers that quantization must change, in order: every linear layer but the head.

    A subclass of Linear is not one of them, as transformers does not replace it: it may compute something else, like a
    router. Neither are the layers that quantized files leave in 16 bits. Raises ConfigError for a model that has only
    such layers.
    """
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    classes = (Conv1D, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    linear = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear or isinstance(m, classes)}
    skipped = list(files.skipped or ()) if files else []
    planned = [
        name
        for name, module in linear.items()
        if module is not heads.head(model) and should_convert_module(name, skipped)
    ]
    if not planned:
        raise ConfigError(f"{model.config.model_type} has no linear layer of torch's class to quantize: set quant=none")
    return planned


def settle(model: Any, quantized: tuple[str, ...]) -> None:
    """Prevent later changes of the quantized layers by bitsandbytes, and test one layer against plain arithmetic.

    Experts are dequantized by the kernel that the layer's backward uses, and multiplied by torch.
    """
    keep_as_quantized(model, quantized)
    _self_test(min(_layers(model, quantized), key=lambda layer: layer.weight.numel()))


def _layers(model: Any, quantized: tuple[str, ...]) -> list[Any]:
    experts = set(quantize_experts.quantized_parameters(model))
    return [model.get_submodule(name) for name in quantized if name not in experts]


def keep_as_quantized(model: Any, quantized: tuple[str, ...]) -> None:
    """Prevent later changes of the quantized layers by bitsandbytes."""
    for layer in _layers(model, quantized):
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.dtype is torch.int8:
            layer.__class__, layer.compute_dtype = exact_int8(), model.dtype
        if layer.bias is not None:  # otherwise the first forward would do this, and change the base
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)


@functools.cache
def exact_int8() -> Any:
    """Return a subclass of bitsandbytes' Linear8bitLt that multiplies by its dequantized weight in `compute_dtype`.

    In training, evaluation and generation, on every device: activations are not rounded. The scales stay on the
    weight, from where bitsandbytes' forward would move them: PEFT's DoRA moves the weight between devices, and a
    weight without scales cannot be moved. The name is bitsandbytes', by which other code recognizes these layers.
    """
    import bitsandbytes

    return type("Linear8bitLt", (bitsandbytes.nn.Linear8bitLt,), {"forward": _int8_forward})


def _int8_forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    weight = frozen_weight(layer, layer.compute_dtype)
    assert weight is not None  # frozen_weight returns None only for another dtype than compute_dtype
    return frozen_linear(inputs, weight, layer.bias)


@torch.no_grad()
def _self_test(layer: Any) -> None:
    """Compare one layer's products and input gradients with a reference on the CPU.

    Kernels have been wrong on some hardware. bitsandbytes chooses the kernel by the number of rows, and has another
    one for the backward. Rows do not depend on each other, so a few of them are compared, whatever the layer's size.
    Raises ResourceError if the relative error is above 2 %; rounding of bfloat16 products, 1 part in 256, averages out.
    """
    weight, device, generator = dequantize_reference(layer), layer.weight.device, torch.Generator().manual_seed(0)
    bias = torch.zeros(()) if layer.bias is None else layer.bias.detach().float().cpu()
    for rows in _TESTED_ROWS:
        compared = torch.linspace(0, rows - 1, min(rows, 8)).long()
        inputs, grads = (torch.randn(rows, size, generator=generator) for size in reversed(weight.shape))
        inputs, grads = inputs.to(layer.compute_dtype), grads.to(layer.compute_dtype)
        leaf = inputs.to(device).requires_grad_()
        with torch.enable_grad():
            output = layer(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, grads.to(device))
        _check_close("products", rows, output[compared], inputs[compared].float() @ weight.T + bias)
        _check_close("gradients", rows, gradient[compared], grads[compared].float() @ weight)


def _check_close(name: str, rows: int, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.detach().float().cpu() - expected).norm() / expected.norm())
    if not error < 0.02:
        raise ResourceError(
            f"bitsandbytes computes wrong {name} on {found.device} for {rows} rows (relative error {error:.1e}): "
            "update bitsandbytes, or set quant=none"
        )


def dequantize_reference(layer: Any) -> torch.Tensor:
    """Return the float32 weight (out, in) of a quantized layer on the CPU, by the definition code x scale."""
    weight = layer.weight
    if weight.dtype is torch.int8:
        return weight.detach().cpu().float() * weight.SCB.cpu().float()[:, None] / 127
    state, packed = weight.quant_state, weight.detach().cpu().view(torch.uint8).view(-1)
    absmax = state.absmax.cpu()
    if state.nested:
        nested = state.state2
        outer = nested.absmax.cpu().repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code.cpu()[absmax.long()] * outer + state.offset.cpu()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    values = state.code.cpu()[codes.long()] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return values[: state.shape.numel()].view(state.shape)
