"""Verify a merged model: load the written folder with plain transformers, and compare its logits.

attached model --probe--> logits [T, V] ----------------------+
written folder --from_pretrained, in this process--> logits --+--> distance <= tolerance, or MismatchError
"""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.errors import MismatchError
from lora_ft.models import heads
from lora_ft.models.acceleration import plain_attention, replaced_forwards
from lora_ft.models.build import quiet
from lora_ft.ops.dropout import evaluating

_PROBE_TOKENS = 64
_ROUNDINGS, _MOST = 3, 10  # see `allowed`


@dataclass(frozen=True)
class Probe:
    """Logits [T, V] in float32, on the CPU, of a model with its adapter attached, for token ids [T].

    V are the words of the vocabulary, or the classes of a classifier.

    dtype, device: where the model computed them. Two devices round differently, so the comparison uses the same one.
    rounding: the `distance` of the logits from those of another order of summation, a measure of how far this model's
    logits are moved by rounding.
    """

    ids: Tensor
    logits: Tensor
    rounding: float
    dtype: torch.dtype
    device: torch.device
    classifies: bool = False


def probe(model: PeftModel, num_tokens: int) -> Probe:
    """Compute the attached adapter's logits for tokens spread over the vocabulary, the last one included.

    Quantized layers multiply by their dequantized weights here: 4-bit kernels round as well, and merging does not
    preserve that.
    """
    base: PreTrainedModel = model.get_base_model()
    length = min(_PROBE_TOKENS, getattr(base.config, "max_position_embeddings", None) or _PROBE_TOKENS)
    ids = torch.linspace(0, num_tokens - 1, length).long()
    quantized, plain = linear_layers(base)
    with plain_attention(base):
        with exact_products(quantized):
            logits = _logits(base, ids)
        with replaced_forwards({layer: functools.partial(_halves, layer) for layer in quantized + plain}):
            rounding = distance(_logits(base, ids), logits, base.dtype)
    return Probe(ids, logits, rounding, base.dtype, base.device, heads.is_classifier(base))


def exact_products(layers: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Let quantized layers multiply by their dequantized weights until the block ends."""
    return replaced_forwards({layer: functools.partial(_product, layer) for layer in layers})


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of each token; a classifier gives those of the last one, and its head makes the others."""
    rows: list[Tensor] = []
    hook = None
    if heads.is_classifier(model):
        hook = heads.head(model).register_forward_hook(lambda _, __, output: rows.append(output[0]))
    with torch.no_grad(), evaluating(model):
        output = model(input_ids=ids[None].to(model.device), use_cache=False)
    if hook:
        hook.remove()
    logits = torch.cat([rows[0][:-1], output.logits]) if rows else output.logits[0]
    return logits.float().cpu()


def linear_layers(base: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the quantized linear layers, and the others whose forward is the usual one."""
    layers = [layer for layer in base.modules() if isinstance(layer, nn.Linear | Conv1D)]
    quantized = [layer for layer in layers if type(layer.weight).__name__ in ("Params4bit", "Int8Params")]
    return quantized, [layer for layer in layers if type(layer) in (nn.Linear, Conv1D)]


def _product(layer: Any, inputs: Tensor) -> Tensor:
    return linear(inputs, dequantized(layer).to(inputs.dtype), _bias(layer, inputs))


def _halves(layer: Any, inputs: Tensor) -> Tensor:
    """Multiply the two halves of the inputs separately, and add the products."""
    weight = dequantized(layer).to(inputs.dtype)
    weight = weight.T if isinstance(layer, Conv1D) else weight
    half = inputs.shape[-1] // 2
    first = linear(inputs[..., :half], weight[:, :half])
    return first + linear(inputs[..., half:], weight[:, half:], _bias(layer, inputs))


def _bias(layer: Any, inputs: Tensor) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(inputs.dtype)


def dequantized(layer: Any) -> Tensor:
    """Return the weight that a layer computes with, dequantized by bitsandbytes if it is quantized."""
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.detach()


def load(folder: Path, *, classifies: bool = False) -> PreTrainedModel:
    """Load a merged model on the CPU with plain transformers; raises MismatchError if tensors do not match."""
    with quiet():
        model, report = heads.auto_class(classifies=classifies).from_pretrained(
            folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise MismatchError(
            f"the merged model cannot be loaded: {len(wrong)} tensors are missing, unexpected or of another shape, "
            f"first {wrong[0]}; nothing was written"
        )
    loaded: PreTrainedModel = model
    return loaded


def check(folder: Path, expected: Probe) -> tuple[float, float]:
    """Load the written folder; return the `distance` of its logits from the expected ones, and the allowed distance.

    Raises MismatchError if tensors are missing or unexpected, or if the distance is above the allowed one: `allowed`
    of the coarser dtype.
    """
    model = load(folder, classifies=expected.classifies).to(expected.device)
    coarser = max(model.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    found, most = distance(_logits(model, expected.ids), expected.logits, coarser), allowed(coarser, expected.rounding)
    if not found <= most:
        raise MismatchError(
            f"the merged model differs from base and adapter: its logits are {found:.1e} away from theirs, "
            f"{most:.1e} is allowed in {coarser}; nothing was written"
        )
    return found, most


def distance(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the relative distance of logits [T, V] from the expected ones.

    In float32: the largest difference over the largest logit. In half precision: the norm of the difference over
    the norm, as the median over tokens, because rounding moves some tokens (attention sinks) ten times as far.
    """
    difference = logits - expected
    if dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / expected.abs().max())
    return float((difference.norm(dim=1) / expected.norm(dim=1)).median())


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest `distance` that rounding explains: 1e-5, or 8 u in half precision.

    Every weight and activation is rounded by up to u (2^-8 in bfloat16, 2^-11 in float16). Random adapters on tiny
    models and on SmolLM2-135M were 2 to 3.5 u away at any depth. An adapter that is lost or added twice is far beyond
    the limit, unless it hardly changes its base.
    """
    return 1e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps / 2


def allowed(dtype: torch.dtype, rounding: float) -> float:
    """Return the largest `distance` of a right merge: `tolerance`, or more for a model that rounding moves further.

    Merged models of 12 families were 0.6 to 2 times their measured rounding away. In some it is above `tolerance`, as
    in Gemma 4 in bfloat16. The limit of ten times `tolerance` is for models of which rounding leaves nothing.
    """
    usual = tolerance(dtype)
    return min(max(usual, _ROUNDINGS * rounding), _MOST * usual)
