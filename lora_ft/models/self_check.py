"""Self-check of a loaded base: compare two short packed documents on fast paths with one document on the plain path.

    reference   second document, plain forward            -> loss, gradient at its embeddings
    checked     first | second packed, or side by side, on the fast paths  -> the same loss and gradient, and

    gradient at the first document is exactly 0           no token sees another document
    gradient after the last supervised token is 0         no token sees a later one

The two zeros hold in every dtype and for weights of every size: a masked score has probability 0, not a small one.
A classifier (models/heads.py) is checked by the loss of one class at the last token but one of the second document.

Loss and gradient are compared within the rounding of the dtype. Sliding windows are longer than these documents, so
the windows that packed attention receives are compared with those in the config. The check costs one forward and one
backward of a few tokens each, less than a training step.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from lora_ft.models import heads
from lora_ft.models.build import first_line
from lora_ft.ops import attention
from lora_ft.ops.batch import IGNORED, Batch
from lora_ft.ops.class_logits import class_logits
from lora_ft.ops.logits import PRODUCT, LogitMap, at_least_float32
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths, similar_lengths, token_loss_sum

_LENGTHS = (9, 7)  # the second is padded where documents are rows side by side
# Largest difference of loss and gradient, relative to the norm. Families round to float32 inside even in float64.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# Settings of factors and caps of logits, as Cohere, Granite, Falcon-H1 and the Gemmas name them.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_ROUNDINGS = 4  # operations that a model rounds between its head and the logits
_SAME_BITS = 1e-6  # the same function, except for the order of a few sums


class Reference(NamedTuple):
    """Two packed documents, with loss and gradient [T, E] at the embeddings of the second one on the plain path.

    logit_map: the function from the product of the last hidden state with the head to the logits, so that the loss may
    compute the head for some rows only. None if the logits are made in another way.
    """

    packed: Batch
    loss: float
    gradient: Tensor
    logit_map: LogitMap | None


def make_reference(model: PreTrainedModel) -> tuple[Reference | None, str]:
    """Compute the reference with the current forwards; return None with the reason if that fails."""
    try:
        reference = _plain_reference(model, _draw(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, f"the self-check fails with {_named(error)}"
    if not (math.isfinite(reference.loss) and reference.gradient.isfinite().all()):
        return None, f"the loss of the self-check is {reference.loss}, or its gradient is not finite"
    return reference, ""


def is_same(model: PreTrainedModel, reference: Reference) -> bool:
    """Return True if the plain forward still computes the same, except for the last bits."""
    again = _plain_reference(model, reference.packed)
    return _distance(reference, again.loss, again.gradient) <= _SAME_BITS


def find_problem(model: PreTrainedModel, paths: Paths, reference: Reference) -> str:
    """Describe the difference between the loss on `paths` and the reference; "" if there is no difference.

    Any error counts as a problem of these paths, except running out of memory, which is raised.
    """
    length = _LENGTHS[1]
    # The plain loss of a classifier is the model's own forward, which takes one document, without its class.
    is_alone = heads.is_classifier(model) and not paths.supervised_rows_only
    batch = reference.packed if paths.share_a_pass and not is_alone else reference.packed.documents()[1]
    try:
        with attention.recorded_calls() as calls:
            loss, gradient = loss_and_gradient(model, lambda: _loss_sum(model, batch, paths))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _named(error)
    gradient = pad(gradient[0], (0, 0, 0, 1)) if is_alone else _in_one_row(gradient, batch)
    if gradient[batch.starts[-1] :].any():
        return "documents see the padding"
    gradient = gradient[: batch.starts[-1]]
    if gradient[:-length].any():
        return "packed documents see each other"
    if gradient[-1].any():
        return "tokens see later tokens"
    if not (distance := _distance(reference, loss, gradient[-length:])) <= tolerance(model):
        return f"loss {loss:.4f} instead of {reference.loss:.4f}, relative error of loss or gradient {distance:.1e}"
    if paths.packs and _has_chunks(model):
        return "attention counts chunks along a row"
    return _ignored_windows(model, calls) if paths.passes_starts else ""


@torch.no_grad()
def find_failure(model: PreTrainedModel, paths: Paths) -> str:
    """Return the error of a forward on `paths`, "" if it runs: for models without values, which have no reference."""
    try:
        _loss_sum(model, _draw(model), paths)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _named(error)
    return ""


def _loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the loss of the last document of a batch on some paths."""
    if not heads.is_classifier(model):
        return token_loss_sum(model, batch, paths)
    logits = class_logits(model, batch, paths)[-1:]
    return cross_entropy(logits, batch.targets.new_zeros(1), reduction="sum")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _draw(model: PreTrainedModel) -> Batch:
    """Draw two documents from the middle of the vocabulary, away from special tokens; only the second has targets.

    Documents of a classifier have one target each, the last.
    """
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size // 8, size // 2 + 1, (sum(_LENGTHS),), generator=generator)
    targets = ids.roll(-1)
    targets[: _LENGTHS[0]] = targets[_LENGTHS[0] + 2] = targets[-1] = IGNORED
    if heads.is_classifier(model):
        targets[:] = IGNORED
        targets[_LENGTHS[0] - 2] = targets[-2] = 0
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])
    return Batch(ids, positions, targets, [0, _LENGTHS[0], sum(_LENGTHS)]).to(model.device)


def _plain_reference(model: PreTrainedModel, packed: Batch) -> Reference:
    """Compute the second document by the model's own forward."""
    second = packed.documents()[1]
    if heads.is_classifier(model):
        value, gradient = loss_and_gradient(model, lambda: _loss_sum(model, second, PLAIN_PATHS))
        return Reference(packed, value, pad(gradient[0], (0, 0, 0, 1)), PRODUCT)  # of the class, which is not read
    seen: dict[str, Tensor] = {}

    def loss() -> Tensor:
        seen["logits"] = logits = model(input_ids=second.ids[None], use_cache=False).logits
        return cross_entropy(at_least_float32(logits[0]), second.targets, ignore_index=IGNORED, reduction="sum")

    def note_hidden(_: nn.Module, __: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def note_head(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(taken=inputs[0], made=output)

    body, head = getattr(model, model.base_model_prefix or "model", None), model.get_output_embeddings()
    hooks = []
    if body is not None and head is not None:
        hooks = [body.register_forward_hook(note_hidden), head.register_forward_hook(note_head)]
    try:
        value, gradient = loss_and_gradient(model, loss)
    finally:
        for hook in hooks:
            hook.remove()
    # If the model calls parts of its body directly, no hidden state is recorded; find_problem compares the results.
    taken, hidden = seen.get("taken"), seen.get("hidden", seen.get("taken"))
    logit_map = None
    if taken is not None and hidden is not None and torch.equal(taken.float(), hidden.float()):
        same = torch.equal(seen["made"].float(), seen["logits"].float())
        logit_map = PRODUCT if same else _measured_logit_map(model, second)
    return Reference(packed, value, gradient[0], logit_map)


def expected_logit_map(model: PreTrainedModel) -> LogitMap:
    """Return the map that the names of the model's settings suggest."""
    return _logit_maps(model)[0]


def _logit_maps(model: PreTrainedModel) -> list[LogitMap]:
    """Return the maps that the model's settings allow: a factor may multiply (Cohere) or divide (Granite)."""
    settings = [getattr(model.config.get_text_config(), name, None) for name in (*_FACTORS, *_CAPS)]
    factors, caps = (
        [float(value) for value in values if isinstance(value, int | float) and value > 0]
        for values in (settings[: len(_FACTORS)], settings[len(_FACTORS) :])
    )
    scales = [scale for factor in factors for scale in (factor, 1 / factor)]
    return [LogitMap(scale, cap) for cap in (*caps, None) for scale in (*scales, 1.0)]


def _measured_logit_map(model: PreTrainedModel, document: Batch) -> LogitMap | None:
    """Return the map that the model applies to given outputs of its head, from small to large; None for another."""
    probe: list[Tensor] = []

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        probe.append(torch.linspace(-100, 100, output.numel(), device=output.device, dtype=output.dtype))
        return probe[-1].view(output.shape)

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        with torch.no_grad():
            logits = model(input_ids=document.ids[None], use_cache=False).logits.flatten()
    finally:
        hook.remove()
    rounding = _ROUNDINGS * torch.finfo(logits.dtype).eps
    for logit_map in _logit_maps(model):
        expected = logit_map(at_least_float32(probe[-1]))
        if probe[-1].shape == logits.shape and ((expected - logits).abs() <= rounding * expected.abs()).all():
            return logit_map
    return None


def _in_one_row(gradient: Tensor, batch: Batch) -> Tensor:
    """Return a gradient [T, E] of packed documents, from that of one row or of the documents side by side."""
    if len(gradient) == 1:
        return gradient[0]
    lengths = [end - start for start, end in pairwise(batch.starts)]
    rows = {document: row for row, document in enumerate(next(iter(similar_lengths(lengths))))}
    kept = [gradient[rows[document], :length] for document, length in enumerate(lengths)]
    padding = [gradient[rows[document], length:] for document, length in enumerate(lengths)]
    return torch.cat([*kept, *padding])


def _distance(reference: Reference, loss: float, gradient: Tensor) -> float:
    of_gradient = float((gradient - reference.gradient).norm() / reference.gradient.norm())
    of_loss = abs(loss - reference.loss) / abs(reference.loss)
    return max(of_gradient, of_loss) if math.isfinite(of_gradient + of_loss) else math.inf


def tolerance(model: PreTrainedModel) -> float:
    """Return the tolerance of the least exact dtype in which a part of the model computes."""
    dtypes = {model.get_input_embeddings().weight.dtype}
    # Quantized layers compute in a dtype of their own (quant.compute_dtype).
    dtypes |= {module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")}
    return max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def _has_chunks(model: PreTrainedModel) -> bool:
    """Return True if attention counts chunks from the first token of a row, so that documents may not share one."""
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    return "chunked_attention" in types or getattr(text, "attention_chunk_size", None) is not None


def _ignored_windows(model: PreTrainedModel, calls: list[attention.Call]) -> str:
    """Describe limits on attention that the config has and packed attention did not receive, or ""."""
    text = model.config.get_text_config()
    layer_types = list(getattr(text, "layer_types", None) or ())
    if not calls:
        return "the model does not call packed attention"
    given = sum(call.window is not None for call in calls)
    window = getattr(text, "sliding_window", None)
    expected = layer_types.count("sliding_attention") if layer_types else int(window is not None)
    if window is not None and given < expected:
        return f"{expected - given} layers have a sliding window that packed attention does not receive"
    return ""


def loss_and_gradient(model: PreTrainedModel, loss: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Compute a loss in evaluation mode, and its gradient [B, T, E] in float32 (or float64) at the embeddings."""
    embedded: list[Tensor] = []

    def as_leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    hook = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            value = loss()
            (gradient,) = torch.autograd.grad(value, embedded[:1])
    finally:
        hook.remove()
        for module, was_training in modes.items():
            module.training = was_training
    return float(value.detach()), at_least_float32(gradient)
